"""A run's folder, flags, checkpoints, resume, signals and errors, each as a user meets them."""

import importlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from common import UserError, data, log, prepare, run

SMALL = ("--batch-size", "8", "--log-every", "1", "--save-every", "20", "--device", "cpu")


def parse(*words, **defaults):
    return run.parse(
        run.parser("infogan.py", "doc", dataset="mnist", steps=10, batch_size=4, **defaults),
        [str(w) for w in words],
    )


def gan(digits, out, *words):
    """The words of a run of gan.py on the small digits."""
    folders = "--out", str(out), "--data-dir", str(digits.parent / "data")
    return ["gan.py", "--dataset", str(digits), *folders, *SMALL, *words]


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def assert_equal(a, b, where=""):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_equal(a[k], b[k], f"{where}/{k}")
    elif isinstance(a, (list, tuple)):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{i}")
    else:
        assert a == b, where


def failed(result, *said):
    """One line on stderr, exit code 1, no traceback."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for text in said:
        assert text in result.stderr


# ------------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize(
    "words",
    [
        ("--steps", 0),
        ("--steps", -1),
        ("--steps", "many"),
        ("--batch-size", 1),
        ("--seed", -1),
        ("--log-every", 0),
        ("--sample", 3),
        ("--no-such-flag",),
    ],
)
def test_bad_flags_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as e:
        parse(*words)
    assert e.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_number_says_what_was_found_and_expected():
    with pytest.raises(Exception, match="nan found, above 0 expected"):
        run.number(float, 0, open_low=True)("nan")
    with pytest.raises(Exception, match="inf found"):
        run.number(float, 0)("inf")
    assert run.number(float, 0, open_low=True)("1e-3") == 1e-3


def test_an_unknown_device_is_one_line():
    with pytest.raises(UserError, match="--device tpu:7 found, cpu "):
        run.Run(parse("--device", "tpu:7"))


def test_the_cpu_may_have_a_number(tmp_path):
    assert run.Run(parse("--device", "cpu:0", "--out", tmp_path)).args.device == "cpu"


def test_a_folder_is_named_by_the_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for dataset, name in (("photos.v1", "photos.v1"), ("photos.v2/", "photos.v2"), ("a/b.npz", "b"),
                          (".", tmp_path.name), ("mnist", "mnist")):
        r = run.Run(parse("--dataset", dataset, "--device", "cpu"))
        assert r.folder.name == f"infogan-{data.printable(name)}"


def test_a_home_is_found_where_the_shell_leaves_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    a = parse("--out=~/runs", "--data-dir=~/d", "--dataset=~/x.npz")
    assert [a.out, a.data_dir, a.dataset] == [f"{tmp_path}/{word}" for word in ("runs", "d", "x.npz")]
    assert parse("--dataset=~nobody-of-this-name/x").dataset == "~nobody-of-this-name/x"


# ------------------------------------------------------------------------------------------------ the folder


def test_a_folder_with_a_run_is_left_alone(tmp_path):
    r = started(tmp_path)
    r.save()
    before = (r.folder / "args.json").read_text()
    with pytest.raises(UserError, match="another process is training"):
        run.Run(parse("--out", tmp_path, "--device", "cpu", "--seed", 5))
    r.lock.close()  # as the end of its process does
    with pytest.raises(UserError, match="already holds a run.*--resume.*--name"):
        run.Run(parse("--out", tmp_path, "--device", "cpu", "--seed", 5))
    assert (r.folder / "args.json").read_text() == before
    run.Run(parse("--out", tmp_path, "--device", "cpu", "--name", "b"))


def test_a_run_without_a_checkpoint_is_taken_over(tmp_path):
    run.Run(parse("--out", tmp_path, "--device", "cpu", "--seed", 5)).lock.close()
    r = started(tmp_path)
    (r.folder / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0}\n')
    (r.folder / "frames").mkdir()
    (r.folder / "frames" / "00000001.png").touch()
    r.lock.close()  # killed before its first checkpoint
    with pytest.raises(UserError, match="before its first checkpoint.  Start it again without --resume"):
        run.Run(parse("--resume", r.folder)).keep(part=Part())
    again = started(tmp_path)
    assert log.history(again.folder) == [] and not (again.folder / "frames").exists()


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        run.Run(parse("--out", tmp_path / "file", "--device", "cpu"))


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "not found"),
        ("{", "cannot be read"),
        ("[]", "run of None"),
        ('{"script": "gan"}', "a run of gan.py"),
    ],
)
def test_resume_of_something_else_is_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "args.json").write_text(content)
    with pytest.raises(UserError, match=said):
        parse("--resume", tmp_path)


def test_the_command_in_the_results_holds_every_flag_that_was_given():
    given = {"seed": 0, "average": 0.0, "name": "", "net": None, "amp": False, "graph": True, "views": False,
             "rates": [1, 2], "alternate": True}
    assert run._flags(given) == ["--seed", "0", "--average", "0.0", "--no-amp", "--graph", "--no-views",
                                 "--rates", "1", "2", "--alternate"]


def test_resume_takes_the_flags_of_the_run_and_refuses_others(tmp_path):
    folder = started(tmp_path, "--seed", 3).folder
    assert parse("--resume", folder, "--steps", 20).seed == 3
    with pytest.raises(UserError, match="was run with --seed 3, 4 given"):
        parse("--resume", folder, "--seed", 4)


@pytest.mark.parametrize("drawing", [("--sample", 2), ("--prompt", "a red square")])
def test_another_seed_draws_other_pictures_of_a_run(tmp_path, drawing):
    folder = started(tmp_path, "--seed", 3).folder
    p = run.parser("infogan.py", "doc", dataset="mnist")
    p.add_argument("--prompt", action="append")
    words = [str(w) for w in ("--resume", folder, *drawing, "--seed", 4)]
    assert run.parse(p, words, free=("prompt",)).seed == 4
    with pytest.raises(SystemExit):
        run.parse(p, words[2:])


# ------------------------------------------------------------------------------------------------ checkpoints


class Part:
    """The least that a checkpoint can hold."""

    def __init__(self):
        self.value = torch.zeros(3)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def started(tmp_path, *words, **parts):
    r = run.Run(parse("--out", tmp_path, "--device", "cpu", *words))
    r.keep(**(parts or {"part": Part()}))
    return r


def test_cut_off_while_saving_the_old_checkpoint_is_whole(tmp_path, monkeypatch):
    r = started(tmp_path)
    r.parts["part"].value += 1
    r.step = 1
    r.save()

    def cut(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", cut)
    with pytest.raises(UserError, match="No space left"):
        r.save()
    monkeypatch.undo()
    again = run.Run(parse("--resume", r.folder))
    again.keep(part=Part())
    assert again.step == 1 and again.parts["part"].value.eq(1).all()
    assert not list(r.folder.glob("*.tmp"))


def test_damaged_checkpoints_are_one_line(tmp_path):
    r = started(tmp_path)
    r.save()
    path = r.folder / "checkpoint.pt"
    whole = path.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"not a checkpoint"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"checkpoint\.pt is damaged"):
            run.Run(parse("--resume", r.folder)).keep(part=Part())
    path.unlink()
    with pytest.raises(UserError, match="before its first checkpoint"):
        run.Run(parse("--resume", r.folder)).keep(part=Part())


def test_a_checkpoint_with_code_in_it_does_not_run_it(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "payload ran"),)

    r = started(tmp_path)
    torch.save({"parts": {"part": Payload()}, "step": 1}, r.folder / "checkpoint.pt")
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        run.Run(parse("--resume", r.folder)).keep(part=Part())
    assert not (tmp_path / "payload ran").exists()


def test_a_checkpoint_of_other_networks_is_refused(tmp_path):
    r = started(tmp_path, net=torch.nn.Linear(2, 2))
    r.save()
    with pytest.raises(UserError, match="damaged or not a checkpoint of this run"):
        run.Run(parse("--resume", r.folder)).keep(net=torch.nn.Linear(3, 2))
    with pytest.raises(UserError, match="differ in"):
        run.Run(parse("--resume", r.folder)).keep(net=torch.nn.Linear(2, 2), more=Part())


def test_random_numbers_go_on_where_they_were(tmp_path):
    r = started(tmp_path)
    torch.rand(3)
    r.save()
    expected = torch.rand(3)
    run.Run(parse("--resume", r.folder)).keep(part=Part())
    assert torch.equal(torch.rand(3), expected)


def test_aside_leaves_training_randomness_alone(tmp_path):
    r = started(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    with r.aside():
        drawn = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with r.aside():
        assert torch.equal(torch.rand(2), drawn)


# ------------------------------------------------------------------------------------------------ the loop


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path):
    r = started(tmp_path, "--save-every", 2, "--log-every", 1)
    with pytest.raises(UserError, match=r"step 3: V is nan.*is kept"):
        for step in r.loop():
            r.log({"V": torch.tensor(float("nan") if step == 3 else 1.0)})
    assert checkpoint(r.folder)["step"] == 2


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    net = torch.nn.Linear(2, 2)
    r = started(tmp_path, "--save-every", 2, net=net)
    with pytest.raises(UserError, match="a parameter of net"):
        for step in r.loop():
            r.log({"V": torch.tensor(1.0)})
            if step == 4:
                net.weight.data.fill_(float("inf"))
    assert checkpoint(r.folder)["step"] == 2


def test_metrics_are_means_over_the_interval_name_by_name(tmp_path):
    r = started(tmp_path, "--steps", 4, "--log-every", 2)
    for step in r.loop():
        r.log({"V": torch.tensor(float(step))})
        if step == 3:
            r.log({"now and then": torch.tensor(7.0)})
    lines = log.history(r.folder)
    assert [line["V"] for line in lines] == [1.5, 3.5]
    assert "now and then" not in lines[0] and lines[1]["now and then"] == 7.0


def test_a_resumed_run_does_not_repeat_lines(tmp_path):
    r = started(tmp_path, "--steps", 4, "--log-every", 1, "--save-every", 2)
    for step in r.loop():
        r.log({"V": torch.tensor(float(step))})
        if step == 3:
            break  # a kill after the checkpoint of step 2: line 3 may be there already
    (r.folder / "metrics.jsonl").open("a").write('{"step": 3, "V"')  # and a line cut off
    r.lock.close()
    again = run.Run(parse("--resume", r.folder))
    again.keep(part=Part())
    for step in again.loop():
        again.log({"V": torch.tensor(float(step))})
    assert [line["step"] for line in log.history(r.folder)] == [1, 2, 3, 4]


def test_phases_are_loops_one_after_the_other(tmp_path):
    r, steps = started(tmp_path, "--log-every", 3), []
    for end in (2, 2, 5):
        for step in r.loop(end):
            r.log({f"until {end}": torch.tensor(float(step))})
            steps.append((step, r.every(4)))
        assert checkpoint(r.folder)["step"] == end
    assert steps == [(1, False), (2, True), (3, False), (4, True), (5, True)]
    assert [(line["step"], set(line) & {"until 2", "until 5"}) for line in log.history(r.folder)] == [
        (2, {"until 2"}), (3, {"until 5"}), (5, {"until 5"})]


def test_check_exits_with_1_when_the_metric_is_missed(tmp_path):
    r = started(tmp_path, "--check")
    with pytest.raises(SystemExit) as e:
        r.results({"x": {"value": 1.0, "paper": 2}}, passed=False)
    assert e.value.code == 1
    report = json.loads((r.folder / "results.json").read_text())
    assert report["results"]["x"] == {"value": 1.0, "paper": 2}
    assert report["versions"]["torch"] == torch.__version__ and "--check" in report["command"]
    r.results({"x": {"value": 1.0}}, passed=True)


def test_the_recorded_command_can_be_pasted_into_a_shell(tmp_path):
    r = started(tmp_path / "two words")
    r.results({"x": {"value": 1.0}})
    command = json.loads((r.folder / "results.json").read_text())["command"]
    assert shlex.split(command)[2:] == ["--device", "cpu", "--out", str(tmp_path / "two words")]


# ------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """Sixty steps without a break."""
    out = tmp_path_factory.mktemp("whole")
    result = script(*gan(digits, out, "--steps", "60"))
    assert result.returncode == 0, result.stderr
    return out / "gan-digits"


def test_a_run_leaves_everything_behind(whole):
    names = {p.name for p in whole.iterdir()}
    assert {
        "args.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "results.json",
        "samples.png",
        "fig2a.png",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [line["step"] for line in log.history(whole)] == list(range(1, 61))
    for figure in ("fig2a", "fig3"):
        assert np.asarray(Image.open(whole / f"{figure}.png")).std() > 5, figure
    found = json.loads((whole / "results.json").read_text())["results"]["gan-mnist-on-digits-ll"]
    assert math.isfinite(found["value"]) and "paper" not in found


@pytest.mark.parametrize("how", [getattr(signal, name) for name in ("SIGHUP", "SIGKILL")
                                 if hasattr(signal, name)])
def test_stopped_and_resumed_equals_uninterrupted(digits, tmp_path, whole, how):
    folder = tmp_path / "gan-digits"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *gan(digits, tmp_path, "--steps", "60")]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.time() + 120
    while not (folder / "checkpoint.pt").exists() and time.time() < deadline:
        time.sleep(0.002)
    process.send_signal(how)
    _, stderr = process.communicate(timeout=120)
    stopped = checkpoint(folder)["step"]
    if how == signal.SIGKILL:
        assert stopped % 20 == 0
    else:
        assert process.returncode == 130, stderr
        assert "saved: continue with --resume" in stderr and "Traceback" not in stderr
    assert stopped < 60
    resumed = script("gan.py", "--resume", folder)
    assert resumed.returncode == 0, resumed.stderr
    assert_equal(checkpoint(whole), checkpoint(folder))
    assert [line["step"] for line in log.history(folder)] == list(range(1, 61))


def test_sample_writes_single_pictures(whole):
    result = script("gan.py", "--resume", whole, "--sample", 5)
    assert result.returncode == 0, result.stderr
    assert sorted(p.name for p in (whole / "samples").iterdir()) == [f"{i:05d}.png" for i in range(5)]


def test_a_users_mistake_is_one_line(tmp_path):
    failed(script("infogan.py", "--out", tmp_path, "--dataset", "no-such-set"), "no-such-set", "mnist")


def test_networks_of_another_run(tmp_path):
    net, file = torch.nn.Linear(3, 2), tmp_path / "checkpoint.pt"
    torch.save({"parts": {"D": net.state_dict()}}, file)
    for where in (tmp_path, file):
        D = torch.nn.Linear(3, 2)
        run.fetch(where, "a run", D=D)
        assert torch.equal(D.weight, net.weight)
    with pytest.raises(UserError, match=r"none cannot be read \(No such file.*\): a run expected"):
        run.fetch(tmp_path / "none", "a run", D=net)
    for nets in ({"G": net}, {"D": torch.nn.Linear(4, 2)}):
        with pytest.raises(UserError, match=f"holds no {next(iter(nets))} of these sizes: a run expected"):
            run.fetch(tmp_path, "a run", **nets)
    whole = file.read_bytes()
    at = whole.index(net.weight.detach().numpy().tobytes())
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:])
    with pytest.raises(UserError, match="is damaged"):
        run.fetch(tmp_path, "a run", D=net)


# ---------------------------------------------------------------------------------------- settings and tables

PAPER = {"a": {"steps": 100, "batch_size": 8, "lr": 0.1, "cats": (10,)}, "b": {"steps": 7, "lr": 0.3}}
TUNED = {"a": {"lr": 0.2}}
QUICK = {"a": {"steps": 5, "width": 0.25}}


def settled(*words, tuned=TUNED):
    p = run.parser("infogan.py", "doc", dataset="a")
    p.add_argument("--lr", type=run.number(float, 0))
    p.add_argument("--width", type=float, default=1.0)
    return run.parse(p, [str(w) for w in words], experiment=lambda args: args.dataset, paper=PAPER,
                     tuned=tuned, quick=QUICK)


def test_paper_tuned_quick_and_flags_in_their_order():
    found = [(a.lr, a.steps, a.width, a.settings) for a in (
        settled(), settled("--paper"), settled("--paper", "--lr", .5), settled("--quick"),
        settled("--quick", "--width", .5), settled("--dataset", "b"))]
    assert found == [(0.2, 100, 1.0, "tuned"), (0.1, 100, 1.0, "paper"), (0.5, 100, 1.0, "paper"),
                     (0.2, 5, 0.25, "quick"), (0.2, 5, 0.5, "quick"), (0.3, 7, 1.0, "tuned")]
    assert settled("--lr", .5).given == ["lr"] and settled().cats == (10,)
    with pytest.raises(SystemExit):
        settled("--paper", "--quick")


@pytest.mark.parametrize(("name", "words"), [
    ("gan", ""), ("dcgan", ""), ("dcgan", "--dataset celeba"), ("cgan", ""), ("infogan", ""),
    ("infogan", "--dataset faces"), ("aae", ""), ("aae", "--task style"),
    ("aae", "--task semi"), ("vaegan", ""), ("vaegan", "--model vae")])
def test_quick_settles_what_it_names_is_shorter_and_can_be_overruled(name, words):
    script = importlib.import_module(name)
    usual, quick = (script.parse_args([*words.split(), *more]) for more in ((), ["--quick"]))
    row = script.QUICK[quick.experiment]
    assert {k: getattr(quick, k) for k in row} == row and set(row) <= set(vars(usual))
    assert script.experiment(quick) == quick.experiment     # a resumed run finds its row
    work, usual_work = (a.steps * a.batch_size * a.width ** 2 for a in (quick, usual))  # multiplications
    assert quick.settings == "quick" and work < usual_work / 4
    by_hand = script.parse_args([*words.split(), "--quick", "--steps", "7", "--width", "0.3"])
    assert (by_hand.steps, by_hand.width, by_hand.batch_size) == (7, 0.3, quick.batch_size)


@pytest.mark.parametrize("name", ["gan", "dcgan", "cgan", "text2image", "infogan", "aae", "vaegan"])
def test_no_setting_of_a_table_has_the_name_of_a_flag_that_all_scripts_share(name):
    script, shared = importlib.import_module(name), set(vars(run.parser("x.py", "").parse_args([])))
    named = set().union(*script.PAPER.values(), *script.TUNED.values(), *script.QUICK.values())
    assert named & shared <= {"steps", "batch_size"}        # whose defaults the tables may replace


def test_a_resumed_run_keeps_its_settings_whatever_the_defaults_are_by_then(tmp_path):
    r = run.Run(settled("--out", tmp_path, "--device", "cpu", "--quick", "--seed", 4))
    r.keep(part=Part())
    r.save()
    again = settled("--resume", r.folder, tuned={"a": {"lr": 0.9, "batch_size": 99}})
    assert (again.lr, again.batch_size, again.steps, again.width, again.seed) == (0.2, 8, 5, 0.25, 4)
    assert again.settings == "quick" and again.given == ["device", "out", "quick", "resume", "seed"]
    assert settled("--resume", r.folder, "--dataset", "b").experiment == "a"     # the data have moved
    with pytest.raises(UserError, match="was run with --lr 0.2, 0.7 given"):
        settled("--resume", r.folder, "--lr", .7)


def test_relative_paths_are_resolved_when_a_run_starts(tmp_path, monkeypatch):
    """But not names of data sets.  An exported file holds no path of this machine."""
    monkeypatch.chdir(tmp_path)
    for name in ("pictures", "mnist"):
        (tmp_path / name).mkdir()
    (tmp_path / "picks.json").touch()
    for dataset in ("pictures", "mnist"):
        args = parse("--dataset", dataset, "--device", "cpu")
        r = run.Run(run.argparse.Namespace(**vars(args), encoder="universal", stage2="runs/x",
                                           exemplars="picks.json"))
        r.keep(part=Part())
        saved = json.loads((r.folder / "args.json").read_text())
        assert saved["dataset"] == (dataset if dataset == "mnist" else str(tmp_path / dataset))
        assert saved["exemplars"] == str(tmp_path / "picks.json")
        assert str(tmp_path) not in json.dumps(r.shipped())
        assert (r.shipped()["encoder"], r.shipped()["stage2"]) == ("universal", "path/to/x")
        assert r.shipped()["dataset"] == (dataset if dataset == "mnist" else f"path/to/{dataset}")


def test_huge_numbers_and_an_empty_name_are_bad_flags(capsys):
    for words in (["--steps", "9" * 310], ["--seed", "9" * 310], ["--dataset", ""]):
        with pytest.raises(SystemExit) as e:
            parse(*words)
        assert e.value.code == 2 and len(capsys.readouterr().err.splitlines()[-1]) < 200


def test_results_hold_null_for_what_is_no_number(tmp_path):
    r = started(tmp_path)
    r.results({"x": {"value": math.inf, "more": [math.nan, 1.0]}})
    found = json.loads((r.folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["results"]["x"] == {"value": None, "more": [None, 1.0]}


# --------------------------------------------------------------------------- consoles, signals, two processes


def test_a_closed_console_costs_nothing(digits, tmp_path):
    words = gan(digits, tmp_path, "--steps", "12")
    p = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    p.stdout.readline()
    p.stdout.close()  # as `| head -n 1` does
    assert p.wait(240) == 0
    said = p.stderr.read().decode().splitlines()  # the classifier's line, if no test has trained it yet
    assert all(line.startswith("training the classifier") for line in said), said
    (folder,) = tmp_path.iterdir()
    assert checkpoint(folder)["step"] == 12 and (folder / "results.json").exists()


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_hang_up_is_heard_unless_it_is_ignored(monkeypatch):
    assert signal.SIGHUP in run.stops()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert signal.SIGHUP not in run.stops()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.skipif(prepare.fcntl is None, reason="the lock of Windows is another")
def test_one_process_trains_in_a_folder_and_others_may_read(whole):
    with open(whole / "lock", "a+b") as lock:
        prepare.fcntl.flock(lock, prepare.fcntl.LOCK_EX)
        going_on = script("gan.py", "--resume", whole, "--steps", "80")
        assert going_on.returncode == 1 and "another process is training" in going_on.stderr
        assert len(going_on.stderr.splitlines()) == 1
        assert script("gan.py", "--resume", whole, "--sample", "2").returncode == 0
    assert checkpoint(whole)["step"] == 60


# ------------------------------------------------------------------------------------------ what a run leaves


def test_samples_are_drawn_early_and_become_an_animation(tmp_path):
    r, drawn = started(tmp_path, "--steps", 100, "--save-every", 50), []
    for step in r.loop():
        if r.draws():
            drawn.append(step)
            r.show("samples", torch.full((3, 600, 300), step, dtype=torch.uint8))
    r.results({"x": {"value": 1.0}})
    assert drawn == [2, 5, 10, 20, 50, 100]
    with Image.open(r.folder / "training.gif") as gif:
        assert gif.n_frames == 6 and gif.size == (240, 480)


def test_rank_0_alone_draws(tmp_path):
    r = started(tmp_path, "--steps", 1)
    for _ in r.loop():
        r.logger.start -= 61                                # seconds
        assert r.draws()
        r.lead = False
        assert not r.draws()
        r.lead = True


def test_the_rate_counts_every_minibatch_of_a_step(tmp_path):
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1)
    r = started(tmp_path, "--steps", 1, "--batch-size", 2, batches=data.Batches(images, batch_size=6))
    for _ in r.loop():                                      # gan.py --k 3
        assert r.logger.images_per_step == 6


def test_tensorboard_has_groups_and_the_settings_in_one_file(tmp_path):
    r = started(tmp_path, "--steps", 3, "--log-every", 1)
    for _ in r.loop():
        r.log({"V": torch.tensor(1.0), "GAN V": 2.0})
    r.results({"ig-cls": {"value": 3.5}})
    (file,) = r.folder.glob("events.out.*")
    events = EventAccumulator(str(r.folder)).Reload()
    assert set(events.Tags()["scalars"]) >= {"infogan/V", "gan/V", "speed/images_s"}
    plugins = {value.metadata.plugin_data.plugin_name for event in EventFileLoader(str(file)).Load()
               for value in event.summary.value}
    assert "hparams" in plugins


def test_a_terminal_sees_losses_and_a_rate_before_the_first_line(tmp_path, monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr(log.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(log, "say", lambda text, *_, **__: said.append(text))
    logger = log.Logger(tmp_path, 1000, 8, hint="; --quick")
    logger.tty = True
    for step in range(1, 9):
        clock[0] += 1.0
        logger.add({"V": -1.5})
        logger.progress(step)
    assert any("8 images/s" in text and "V -1.5" in text and "ETA 16:" in text for text in said)
    assert [text for text in said if text.startswith("about")] == ["about 17 minutes at 8 images/s; --quick"]
