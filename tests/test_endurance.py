"""Faults that really happen: kill -9, a full disk, flipped bits, read-only folders, signals at any moment,
code in data files, and command lines that nobody would type.  After each one clear line, and nothing lost
that had been saved."""

import importlib
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_run import assert_equal
from torch import nn

from common import UserError, data, metrics, prepare, run
from common.fuse import SGD, descend

resource = pytest.importorskip("resource", reason="needs fork and limits: not Windows")
NAMES = sorted(p.stem for p in ROOT.glob("*.py"))


def parse(*words, script="infogan.py"):
    p = run.parser(script, "doc", dataset="mnist", steps=10, batch_size=4)
    return run.parse(p, [str(w) for w in ("--device", "cpu", *words)])


class Counter(nn.Module):
    """Parameters that are all equal to the step at which they were saved."""

    def __init__(self):
        super().__init__()
        self.p = nn.ParameterList([torch.zeros(n) for n in (5, 3000, 20000)])

    def set(self, step):
        for p in self.p:
            p.data.fill_(step)


def loaded(folder, **parts):
    r = run.Run(parse("--resume", folder))
    r.keep(**(parts or {"counter": Counter()}))
    return r


@contextmanager
def child(work):
    """A forked process that runs work(pipe); yields its number and the end of the pipe to read from."""
    receive, send = os.pipe()
    number = os.fork()
    if number == 0:
        try:
            torch.set_num_threads(1)  # the threads of the process that forked are not here
            os.close(receive)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            work(send)
        finally:
            os._exit(0)
    os.close(send)
    try:
        yield number, receive
    finally:
        os.close(receive)


def said(work):
    """The line with which work(), in a process of its own, ends; empty if all went well."""
    def tell(send):
        sys.stderr, sys.excepthook = os.fdopen(send, "w", buffering=1), run._one_line("gan")
        try:
            work()
        finally:
            if sys.exc_info()[0]:
                sys.excepthook(*sys.exc_info())

    with child(tell) as (number, receive), os.fdopen(receive, closefd=False) as pipe:
        lines = [line for line in pipe.read().splitlines() if not line.startswith(("preparing", "training"))]
        os.waitpid(number, 0)
    assert len(lines) <= 1, lines
    return "".join(lines)


def limited(size, work):
    """work() where no file may grow beyond `size` bytes: what a full disk does, at a known place."""
    def inside():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()
    return said(inside)


def flipped(whole, rng):
    """The bytes with one bit turned over."""
    i = rng.randrange(len(whole))
    return whole[:i] + bytes([whole[i] ^ 1 << rng.randrange(8)]) + whole[i + 1:]


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What torch imports at the first optimizer, once here and not in every child."""
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(120):
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


# --------------------------------------------------------------------------------------------------- kill -9


def test_killed_at_any_moment_of_saving(tmp_path):
    r = run.Run(parse("--out", tmp_path))
    counter = Counter()
    r.keep(counter=counter)
    r.save()
    rng = random.Random(0)

    def save(send):
        while True:
            r.step += 1
            counter.set(r.step)
            r.save()
            os.write(send, b"%d\n" % r.step)

    began = time.perf_counter()
    for _ in range(5):
        r.save()
    once, total = (time.perf_counter() - began) / 5, 0
    for _ in range(25):
        with child(save) as (number, receive):
            os.read(receive, 1)  # it is at it
            time.sleep(rng.random() * 3 * once)
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
            steps = os.read(receive, 10**6).split()
        r.step = total = max(int(steps[-1]) if steps else 0, total + 1)
        found = Counter()
        again = loaded(r.folder, counter=found)
        assert again.step >= total  # nothing that was reported as saved is lost
        assert all(p.eq(again.step).all() for p in found.p)
        r.step = total = again.step
    assert total > 25


def test_killed_at_any_moment_of_preparing(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 8)
    expected = data.load(pictures, tmp_path / "reference", 8).images
    began = time.perf_counter()
    with child(lambda send: data.load(pictures, tmp_path / "timed", 8)) as (number, _):
        os.waitpid(number, 0)
    once, rng, cut, kept = time.perf_counter() - began, random.Random(0), 0, 0
    cache = tmp_path / "cache"
    for turn in range(100):                 # on a busy machine few are cut off between two blocks
        if turn >= 15 and cut and kept:
            break
        with child(lambda send: data.load(pictures, tmp_path, 8)) as (number, _):
            time.sleep(rng.random() * 1.2 * once)
            os.kill(number, signal.SIGKILL)
            os.waitpid(number, 0)
        made = [p for p in cache.glob("*") if p.is_dir() and ".tmp" not in p.name]
        cut += not made
        kept += any(p.stat().st_size for p in cache.glob("*.tmp*/checksums"))
        for path in made:  # a name without .tmp is whole
            assert torch.equal(data.load(pictures, tmp_path, 8).images, expected)
            path.rename(tmp_path / f"{time.time_ns()}")
    assert cut and kept
    assert torch.equal(data.load(pictures, tmp_path, 8).images, expected)
    assert not list(cache.glob("*.tmp*"))


def test_preparing_holds_some_blocks_in_memory(tmp_path, monkeypatch):
    """63 MB of pictures, begun, cut off, looked through and ended within a quarter of that."""
    folder, drawn = tmp_path / "pictures", itertools.count()
    folder.mkdir()
    few = tmp_path / "few"
    few.mkdir()
    for i in range(320):
        (folder / f"{i:03d}.png").touch()
        (few / f"{i % 16:03d}.png").touch()

    def picture(*_, **__):
        if next(drawn) == 316:
            raise KeyboardInterrupt
        x = np.zeros((3, 256, 256), np.uint8)
        x[0, 0, 0] = 99  # all but black sets are refused
        return x

    def measure(send):
        def peak():  # in kilobytes; macOS counts bytes
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10 * (sys.platform == "darwin")

        data.load(few, tmp_path, size=256, channels=3)  # the program itself is in memory from here on
        before = peak()
        with pytest.raises(KeyboardInterrupt):
            data.load(folder, tmp_path, size=256, channels=3)
        n = len(data.load(folder, tmp_path, size=256, channels=3).images)
        os.write(send, b"%d %d %d" % (n, next(drawn), peak() - before))

    monkeypatch.setattr(prepare, "BLOCK", 8)
    monkeypatch.setattr(prepare, "decode", picture)
    with child(measure) as (number, receive):
        n, pictures, kilobytes = map(int, os.read(receive, 100).split())
        os.waitpid(number, 0)
    assert n == 320 and pictures < 356  # all but the block that was cut off once
    assert kilobytes < 16000


# ------------------------------------------------------------------------------------------------ a full disk


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    r = run.Run(parse("--out", tmp_path))
    counter = Counter()
    r.keep(counter=counter)
    r.save()
    size = (r.folder / "checkpoint.pt").stat().st_size
    r.step = 1
    counter.set(1)
    for limit in (0, 1, 100, size // 2, size - 1):
        text = limited(limit, r.save)
        assert "cannot write" in text and "earlier one is kept" in text
        assert {p.name for p in r.folder.iterdir()} == {"args.json", "metrics.jsonl", "checkpoint.pt", "lock"}
    assert loaded(r.folder).step == 0
    assert limited(size + 1000, r.save) == ""
    assert loaded(r.folder).step == 1


def test_a_full_disk_while_preparing(tmp_path, pictures):
    for limit in (50, 10000):
        assert "cannot be written" in limited(limit, lambda: data.load(pictures, tmp_path, 8))
        assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]
    assert len(data.load(pictures, tmp_path, 8).images) == 120


def test_a_full_disk_while_the_classifier_is_saved(tmp_path):
    images, labels = torch.randint(256, (20, 1, 16, 16), dtype=torch.uint8), torch.arange(20) % 2
    text = limited(1000, lambda: metrics.classifier(images, labels, "cpu", tmp_path, steps=1))
    assert "cannot be written" in text and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("limit", [0, 10, 3000, 12000])
def test_a_full_disk_ends_a_run_with_one_line(tmp_path, limit):
    """From the first file on, or in the midst, whatever it was that could not be written."""
    import gan

    words = ["--dataset", "toy", "--steps", "60", "--log-every", "1", "--save-every", "30", "--device", "cpu",
             "--batch-size", "8", "--out", str(tmp_path)]
    assert re.match(r"gan\.py: .*(cannot|be) writ", limited(limit, lambda: gan.main(words)))
    assert not list(tmp_path.glob("*/*.tmp"))


def test_a_full_disk_on_resuming_keeps_the_log(tmp_path):
    folder = train(("--out", tmp_path)).folder
    before = (folder / "metrics.jsonl").read_text()
    assert "writ" in limited(100, lambda: train(("--resume", folder, "--steps", 60)))
    assert (folder / "metrics.jsonl").read_text() == before
    train(("--resume", folder, "--steps", 60))
    assert (folder / "metrics.jsonl").read_text().startswith(before)


# --------------------------------------------------------------------------------------------- flipped bits


def test_a_checkpoint_with_a_flipped_bit_is_refused_or_whole(tmp_path):
    r = run.Run(parse("--out", tmp_path))
    counter = Counter()
    counter.set(7)
    r.keep(counter=counter)
    r.save()
    path, rng, refused = r.folder / "checkpoint.pt", random.Random(0), 0
    whole = path.read_bytes()
    for i in range(150):
        path.write_bytes(flipped(whole, rng) if i < 120 else whole[:rng.randrange(len(whole))])
        found = Counter()
        try:
            loaded(r.folder, counter=found)
        except UserError as e:
            assert "is damaged" in str(e) and "\n" not in str(e)
            refused += 1
        else:  # a bit of the padding between the arrays
            assert all(p.eq(7).all() for p in found.p)
    assert refused > 100
    path.write_bytes(whole)
    loaded(r.folder)


def test_a_cache_with_a_flipped_bit_is_refused_or_whole(tmp_path, pictures):
    def load():
        return data.load(pictures, tmp_path, 8)

    expected, rng = load(), random.Random(0)
    (made,) = [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]
    for name in ("images.npy", "rest.pt", "checksums"):
        path = made / name
        whole = path.read_bytes()
        for _ in range(100):
            path.write_bytes(flipped(whole, rng))
            try:
                found = load()
            except UserError as e:
                assert f"{made} is damaged: delete this folder" in str(e)
            else:
                assert torch.equal(found.images, expected.images) and found.extra == expected.extra
        path.write_bytes(whole)


def test_a_data_file_with_a_flipped_bit_is_refused_or_whole(tmp_path):
    path, rng, refused = tmp_path / "a.npz", random.Random(0), 0
    expected = np.random.default_rng(0).integers(256, size=(9, 1, 8, 8), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(path, images=expected, labels=np.arange(9)[::-1], words=np.array(["a", "b"]))
        whole = path.read_bytes()
        for _ in range(150):
            path.write_bytes(flipped(whole, rng))
            try:
                found = data.load(path)
            except UserError as e:
                assert str(path) in str(e) and "\n" not in str(e)
                refused += 1
            else:
                assert np.array_equal(found.images, expected[prepare.shuffled(range(9))])
    assert refused > 150


# ------------------------------------------------------------------------------------------ read-only folders


def test_a_read_only_folder_is_one_line(tmp_path_factory):
    """Root may write everywhere, so a child that is nobody tries."""
    if os.getuid() == 0:
        base = tmp_path_factory.mktemp("readable")
        for p in (base, *base.parents):
            if p.stat().st_uid == 0 and not p.stat().st_mode & 0o001:
                p.chmod(0o755)
    else:
        base = tmp_path_factory.mktemp("mine")
    r = run.Run(parse("--out", base))
    r.keep(counter=Counter())
    r.save()
    before = {p.name: p.read_bytes() for p in r.folder.iterdir()}
    r.folder.chmod(0o555)
    for p in r.folder.iterdir():
        p.chmod(0o444)

    def as_nobody(work):
        def inside():
            if os.getuid() == 0:
                os.setuid(65534)
            work()
        return said(inside)

    def resume():
        again = loaded(r.folder)
        for _ in again.loop():
            again.log({"V": torch.tensor(0.0)})

    assert "cannot write" in as_nobody(r.save)
    assert "cannot write" in as_nobody(lambda: run.Run(parse("--out", base, "--name", "b")))
    assert "cannot write" in as_nobody(resume)
    assert {p.name: p.read_bytes() for p in r.folder.iterdir()} == before
    r.folder.chmod(0o755)


# -------------------------------------------------------------------------------------------------- signals


def train(words, interrupt=()):
    """Steps of a network with BatchNorm, dropout and noise; `interrupt`: (step, moment) -> signal."""
    torch.manual_seed(1)
    r = run.Run(parse("--steps", 40, "--save-every", 7, "--log-every", 3, *words))
    images = torch.arange(30, dtype=torch.uint8).view(30, 1, 1, 1).expand(30, 1, 2, 2) * 8
    batches = data.Batches(images, batch_size=4, seed=0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    opt, adam = SGD(net[:3].parameters(), 0.1, 0.5), torch.optim.Adam(net[4].parameters(), fused=True)
    r.keep(net=net, opt=opt, adam=adam, batches=batches)

    def moment(name):
        if (r.step + 1, name) in interrupt:
            signal.raise_signal(interrupt[r.step + 1, name])

    for _ in r.loop():
        moment("first")
        x = next(batches)
        loss = (net(x + torch.randn_like(x)) - 1).square().mean()
        moment("midst")
        descend(loss, opt, loss, adam)
        r.log({"loss": loss})
        moment("last")
    return r


def test_stopped_at_any_step_by_either_signal_equals_uninterrupted(tmp_path, capsys):
    expected, rng = train(("--out", tmp_path)), random.Random(0)
    for name in "abc":
        words, stops = ("--out", tmp_path, "--name", name), 0
        while True:
            step = random.Random(f"{name}{stops}").randrange(1, 15)
            at = {(stops * 9 + step, rng.choice(("first", "midst", "last"))):
                  rng.choice((signal.SIGINT, signal.SIGTERM))}
            try:
                r = train(words, at)
                break
            except SystemExit as e:
                assert e.code == 130
                words, stops = ("--resume", tmp_path / f"infogan-mnist-{name}"), stops + 1
                assert "saved: continue with --resume" in capsys.readouterr().err
        assert stops >= 2
        a, b = (torch.load(x.folder / "checkpoint.pt", weights_only=True) for x in (expected, r))
        assert_equal(a, b)


# ---------------------------------------------------------------------------------------- code in data files


def test_no_file_that_is_read_can_run_code(tmp_path, pictures):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "payload ran"),)


    file = tmp_path / "checkpoint.pt"
    torch.save({"parts": {"Dis": Payload(), "G": Payload()}}, file)
    x, y = torch.zeros(4, 1, 16, 16, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    metrics.classifier(x, y, "cpu", tmp_path, steps=1)
    (classifier,) = (tmp_path / "cache").iterdir()
    classifier.write_bytes(file.read_bytes())
    data.load(pictures, tmp_path, 8)
    (rest,) = (tmp_path / "cache").glob("*/rest.pt")
    rest.write_bytes(file.read_bytes())
    np.savez(tmp_path / "a.npz", images=np.array([Payload()], dtype=object))
    for read in (lambda: data.load(pictures, tmp_path, 8), lambda: data.load(tmp_path / "a.npz"),
                 lambda: metrics.classifier(x, y, "cpu", tmp_path, steps=1),
                 lambda: run.fetch(tmp_path, "another", G=nn.Linear(1, 1))):
        with pytest.raises(UserError):
            read()
        assert not (tmp_path / "payload ran").exists()


# -------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize("size", [(2**42,), (2**31, 2**31), (10**30,)])
def test_absurd_sizes_are_one_line(size):
    assert re.match(r"gan\.py: not enough memory for batch, networks or data of this size \(.",
                    said(lambda: torch.empty(size)))


class Parsed(Exception):
    """The command line was taken."""


def stop(*_, **__):
    raise Parsed


@pytest.mark.parametrize("name", NAMES)
def test_no_command_line_makes_a_traceback(name, tmp_path, monkeypatch, capsys):
    """Any flags with any values: taken, or exit code 2 and a line, or a UserError.  Nothing is trained."""
    hypothesis = importlib.import_module("hypothesis")
    from hypothesis import strategies as st

    module = importlib.import_module(name)
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(run, "parse", lambda p, *_, **__: found.append(p) or stop())
        with pytest.raises(Parsed):
            module.parse_args([])
    a_run = tmp_path / "run"
    a_run.mkdir()
    (a_run / "args.json").write_text(json.dumps(vars(module.parse_args([]))))
    (tmp_path / "file").write_text("two\nlines")
    for owner, attribute in ((data, "load"), (run.Run, "keep"), (run.Run, "_claim"), (module, "networks")):
        monkeypatch.setattr(owner, attribute, stop)

    anything = st.one_of(
        st.sampled_from(["1", "2", "0.5", "64"]),
        st.sampled_from(["0", "-1", "1e9", "nan", "inf", "-inf", "", " ", "all", "auto", "cuda:9", "é☃",
                         "--", "-", "a b", "1,2", "10" * 30, "mnist", "faces", "shapes", "celeba", "x.npz",
                         *map(str, (tmp_path, tmp_path / "file", a_run, tmp_path / "none"))]),
        st.integers().map(str), st.floats().map(str),
        st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=5))

    def group(action):
        values = anything
        if action.choices:
            values = st.one_of(anything, *[st.sampled_from([str(c) for c in action.choices])] * 4)
        elif action.dest == "resume":
            values = st.sampled_from([str(a_run), str(a_run), str(tmp_path), "none"])
        count = {None: 1, 0: 0, "+": 2, "*": 2, "?": 1}.get(action.nargs, action.nargs)
        return st.tuples(st.sampled_from(action.option_strings), *[values] * count).map(list)

    groups = st.one_of([group(a) for a in found[0]._actions if a.dest != "help"])
    lines = st.lists(groups, max_size=6).map(lambda parts: [*itertools.chain.from_iterable(parts)])

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(lines)
    def holds(words):
        try:
            module.main(words)
        except Parsed:
            pass
        except UserError as e:
            assert str(e) and "\n" not in str(e)
        except SystemExit as e:
            assert e.code == 2
            last = capsys.readouterr().err.strip().splitlines()[-1]
            assert re.match(rf"python {name}\.py: error: .", last), last
        else:
            raise AssertionError("main() ended")

    holds()


# ----------------------------------------------------------------------------- sets that allow no measurement

BRIEFLY = {"gan": [], "cgan": ["--nn-samples", "50"], "infogan": [], "vaegan": ["--net", "28"],
           "dcgan": ["--net", "svhn"], "aae": ["--task", "likelihood", "--samples", "50"]}


def briefly(name, path, out):
    """results.json of two steps; None if the set was refused, in one line and before the first step."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(sys, "excepthook", sys.excepthook)
        try:
            importlib.import_module(name).main(
                ["--dataset", str(path), "--data-dir", str(out), "--out", str(out), "--device", "cpu",
                 "--steps", "2", "--batch-size", "2", "--width", ".02", "--log-every", "1", *BRIEFLY[name]])
        except UserError as e:
            assert "\n" not in str(e) and not any(f.stat().st_size for f in out.glob("*/metrics.jsonl"))
            return None
    (found,) = out.glob("*/results.json")
    return json.loads(found.read_text(), parse_constant=pytest.fail)["results"]


@pytest.mark.parametrize("name, kind", [
    *((name, "one class") for name in BRIEFLY), ("gan", "one rare class"), ("cgan", "one rare class"),
    ("vaegan", "one rare class"), ("vaegan", "other classes"), ("gan", "one test picture"),
    ("vaegan", "flat")])
def test_no_measure_of_what_cannot_be_measured(name, kind, tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.integers(256, size=(40, 1, 28, 28), dtype=np.uint8), np.arange(40) % 2
    test, test_y = x[:6], y[:6]
    if kind == "one class":
        y, test_y = 0 * y, 0 * test_y
    elif kind == "one rare class":  # among those held out
        y, test, test_y = 0 * y, None, None
        y[prepare.shuffled(range(40))[-1]] = 1
    elif kind == "other classes":
        test_y = test_y + 2
    elif kind == "one test picture":
        test, test_y = test[:1], test_y[:1]
    else:
        x = np.broadcast_to(x[:, :, :1, :1], x.shape)
        test = x[:6]
    arrays = {"images": x, "labels": y, "test_images": test, "test_labels": test_y}
    np.savez(tmp_path / "set.npz", **{k: a for k, a in arrays.items() if a is not None})
    found = briefly(name, tmp_path / "set.npz", tmp_path)
    assert (found is None) == (name == "cgan")
    keys = {k for entry in (found or {}).values() for k in entry} | set(found or {})
    judged = {"frechet", "agreement", "ig-cls", "vg-knn", "vg-attr"}
    if kind in ("one class", "one rare class"):
        assert not judged & keys, found
    if kind == "one test picture":
        assert "frechet" not in keys
    if name == "vaegan" and kind == "flat":
        assert found["vg-celeba-samples"]["value"] is None


@pytest.mark.parametrize("name, n", [("aae", 1), ("aae", 3), ("dcgan", 1), ("gan", 5), ("infogan", 2),
                                     ("vaegan", 3), ("vaegan", 4)])
def test_a_handful_of_pictures(name, n, tmp_path):
    x = np.random.default_rng(0).integers(256, size=(n, 1, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=x)
    found = briefly(name, tmp_path / "set.npz", tmp_path)
    assert n > 1 or found is None
