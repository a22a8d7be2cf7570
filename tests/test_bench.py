"""The benchmark: that its textbook loop computes what the scripts compute, a tiny real one, what it counts
and what it says of bad input."""

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import vaegan
from common import UserError, bench, data, fuse

RATES = {bench.FLOAT: 50.0, bench.COPY: 10.0}


@pytest.fixture
def limits(monkeypatch):
    """Without the process that measures the limits."""
    real = bench.Machine.measure
    monkeypatch.setattr(bench.Machine, "measure", lambda self, job: RATES if job["mode"] == "limits"
                        else real(self, job))


def nets():
    torch.manual_seed(0)
    return nn.Linear(3, 5), nn.Linear(5, 1)


def weights(*nets):
    return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])


# ----------------------------------------------------------------------------------------- the textbook loop


@pytest.mark.parametrize("together", [False, True])
def test_textbook_descent_takes_the_same_steps(together):
    found = []
    for descend, sgd in ((fuse.descend, fuse.SGD), (bench.descend, bench.optimizer(torch.optim.SGD))):
        G, D = nets()
        opt_G, opt_D = sgd(G.parameters(), 0.1, 0.5), sgd(D.parameters(), 0.05, 0.5)
        z = torch.randn(8, 3)
        for _ in range(4):
            loss = D(G(z)).square().mean()
            if together:
                descend(loss, opt_D, -loss, opt_G)
            else:
                descend(loss, opt_D)
                descend(-D(G(z)).mean(), opt_G)
        found.append(weights(G, D))
    torch.testing.assert_close(*found)


def test_textbook_descent_works_out_every_gradient():
    G, D = nets()
    bench.descend(D(G(torch.randn(8, 3))).mean(), bench.optimizer(torch.optim.SGD)(G.parameters(), 0.1))
    assert all(p.grad is not None for p in D.parameters())


@pytest.mark.parametrize("ours, theirs", [
    (lambda p: vaegan.RMSProp([{"params": list(p), "weight_decay": 1e-5}], 1e-2, 1e-8),
     lambda p: bench.optimizer(torch.optim.RMSprop, alpha=0.9, weight_decay=1e-5)(p, 1e-2)),
    (lambda p: fuse.Adam(p, 1e-2), lambda p: bench.adam(p, 1e-2)),
    (lambda p: fuse.Adam([{"params": list(p), "weight_decay": 0.3}], 1e-2),
     lambda p: bench.adam([{"params": list(p), "weight_decay": 0.3}], 1e-2))])
def test_textbook_optimizers_are_the_scripts_own(ours, theirs):
    found = []
    for make in (ours, theirs):
        net, _ = nets()
        opt = make(net.parameters())
        for _ in range(4):
            fuse.descend(net(torch.ones(2, 3)).square().mean(), opt)
        found.append(weights(net))
    torch.testing.assert_close(*found)
    group = opt.param_groups[0]
    group["lr"].div_(2).clamp_(min=1)  # as anneal() does
    assert group["lr"] == pytest.approx(1e-2) and group["lr"].item() == pytest.approx(1e-2)
    assert not group["foreach"] and not group.get("fused")


def test_textbook_loader_gives_each_picture_once_an_epoch():
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1) * 20
    found = bench.Loader(images, torch.arange(12), batch_size=4, seed=1, scale=(-1.0, 1.0))
    for _ in range(2):
        x, y = (torch.cat(t) for t in zip(*(next(found) for _ in range(3))))
        assert sorted(y.tolist()) == list(range(12))
        torch.testing.assert_close(x.flatten(), y * 20 / 127.5 - 1)
    assert found.per_epoch == data.Batches(images, batch_size=4).per_epoch == 3
    assert next(bench.Loader(images, batch_size=4)).shape == (4, 1, 1, 1)


# -------------------------------------------------------------------------------------------- what it counts


def test_bytes_read_and_written():
    a, b = torch.ones(10), torch.ones(10)
    with bench.Bytes() as moved:
        c = a + b
        c.view(2, 5)
    assert moved.total == 3 * 40
    with bench.Bytes() as moved:
        a.expand(100, 10).sum()  # what is read is 10 numbers
    assert moved.total == 40 + 4


def row(mode, runs):
    return bench.row_of({"script": "gan", "shown": "", "mode": mode}, runs)


def test_shares_and_ratios():
    one = {"cpu": 0.1, "start": 1.0, "compile": 0.0, "host": 1e6, "gpu": None, "batch": 2}
    rows = [row("textbook", [one | {"step": s} for s in (0.1, 0.2, 0.3)]), row("compiled", []),
            row("fused", [one | {"step": 0.1, "flops": 2.5e9, "bytes": 0.5e9}])]
    bench.compare(rows, RATES)
    assert [row["x textbook"] for row in rows] == [1.0, None, 2.0]
    assert [row["arithmetic %"] for row in rows] == [pytest.approx(25), None, pytest.approx(50)]
    assert [row["bytes %"] for row in rows] == [pytest.approx(25), None, pytest.approx(50)]
    assert rows[0]["high"] == 20 and rows[0]["repeats"] == 3 and rows[0].keys() == rows[1].keys()
    assert rows[0]["compile s"] is None and rows[1]["ms"] is None
    rows = [row("textbook", []), row("graph", [one | {"step": 0.1}])]
    bench.compare(rows, {})  # neither the first row nor the limits
    assert rows[1]["x textbook"] is None is rows[1]["arithmetic %"] and rows[1]["compile s"] == 0


def test_limits():
    found = bench.limits(torch.device("cpu"), 0.01)
    assert {bench.FLOAT, bench.COPY} <= set(found) and min(found.values()) > 0.01


# ------------------------------------------------------------------------------------------------ whole runs


def test_a_tiny_bench(digits, tmp_path, limits, capsys):
    file = tmp_path / "bench.json"
    bench.main(["gan", "--modes", "fused,textbook", "--repeats", "1", "--seconds", ".1", "--device", "cpu",
                "--json", str(file), "--dataset", str(digits), "--batch-size", "8"])
    report = json.loads(file.read_text())
    assert {"machine", "torch", "date", "limits", "rows"} <= set(report)
    assert [row["mode"] for row in report["rows"]] == ["textbook", "fused"]
    for row in report["rows"]:
        assert row["batch"] == 8 and row["repeats"] == 1 and row["images/s"] > 0 and row["start s"] > 0
        assert row["low"] <= row["images/s"] <= row["high"] and 0 < row["arithmetic %"] < 1000
    # G and D forward, both backward: of 4.1 million products for a sample less D's first gradient and others.
    assert 8 * 2 * 3e6 < report["rows"][1]["flops"] < 8 * 2 * 20e6
    lines = capsys.readouterr().out.strip().splitlines()
    names = [name.strip() for name in lines[2].strip("|").split("|")]
    assert names[:5] == ["script", "flags", "batch", "mode", "images/s"] and "x textbook" in names
    assert "gpu MB" not in names and len(lines) == 6
    assert all(line.count("|") == len(names) + 1 for line in lines[2:])


def test_a_mode_that_fails_leaves_an_empty_row_and_the_others_go_on(digits, tmp_path, monkeypatch, capsys):
    real, tried, file = bench.Machine.measure, [], tmp_path / "bench.json"

    def measure(self, job):
        tried.append(job["mode"])
        return real(self, job | {"words": ["--no-such-flag"]} if job["mode"] == "compiled" else job)

    monkeypatch.setattr(bench.Machine, "measure", measure)
    with pytest.raises(SystemExit) as e:
        bench.main(["gan", "--modes", "fused,compiled", "--repeats", "2", "--seconds", ".1", "--jobs", "2",
                    "--device", "cpu", "--json", str(file), "--dataset", str(digits), "--batch-size", "8"])
    assert e.value.code == 1
    rows, (out, err) = json.loads(file.read_text())["rows"], capsys.readouterr()
    assert [r["mode"] for r in rows] == ["fused", "compiled"] and rows[0]["repeats"] == 2
    assert rows[0]["arithmetic %"] > 0 and rows[1]["images/s"] is None and rows[1]["repeats"] == 0
    said = [line for line in err.splitlines() if "compiled" in line]
    assert said and said[0].startswith("gan compiled: ") and "--no-such-flag" in said[0]
    assert tried[0] == "limits" and tried[1] == "compiled"  # what takes longest begins first
    assert len([line for line in out.splitlines() if line.startswith("| gan")]) == 2


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows suspends no processes")
def test_only_one_process_measures_at_a_time(tmp_path, monkeypatch):
    """While one process has its turn, the others, which never pause, stand still."""
    program = """if True:
        import json, sys, threading, time
        print("ready", flush=True)
        log = open(sys.argv[1], "w")
        def tick():
            while True:
                print(time.time(), file=log, flush=True)
                time.sleep(.01)
        threading.Thread(target=tick, daemon=True).start()
        sys.stdin.readline()
        began = time.time()
        time.sleep(.4)
        print(json.dumps([began, time.time()]), flush=True)
    """
    popen, found, number = subprocess.Popen, [], itertools.count()

    def start(command, **more):
        return popen([sys.executable, "-c", program, tmp_path / str(next(number))], **more)

    monkeypatch.setattr(bench.subprocess, "Popen", start)
    machine = bench.Machine(3, str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(machine.measure, [{"mode": "limits"}] * 3))
    turns = sorted(found)
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(turns))
    ticks = [[float(t) for t in (tmp_path / str(i)).read_text().split()] for i in range(3)]
    for began, ended in turns:
        within = sorted(sum(began + 0.1 < t < ended - 0.05 for t in times) for times in ticks)
        assert within[:2] == [0, 0] and within[2] > 5, within
    assert not machine.processes


def test_the_measured_loop_draws_nothing(digits, tmp_path, monkeypatch):
    """dcgan shows Fig. 2 after the first epoch, which the measured loop goes through."""
    turns, drawn = [], []
    monkeypatch.setattr(bench.log, "save_png", lambda *_: drawn.append(1))
    job = {"script": "dcgan", "mode": "fused", "seconds": 0.1, "count": False, "began": 0.0, "words": [
        "--dataset", str(digits), "--net", "svhn", "--width", ".02", "--batch-size", "128", "--device", "cpu",
        *bench.ENDLESS, *bench.EAGER]}
    found = bench.work(job, lambda: turns.append(1))
    assert found["batch"] == 128 and found["step"] > 0 and turns == [1] and not drawn


def test_scaling_goes_through_batches_and_sizes(monkeypatch, capsys):
    jobs = []

    def measure(self, job):
        if job["mode"] == "limits":
            return RATES
        words = job["words"]
        batch = int(words[words.index("--batch-size") + 1]) if "--batch-size" in words else 64
        jobs.append(job["shown"])
        return {"step": 0.5, "cpu": 0.5, "batch": batch, "compile": 0.0, "host": 1e6,
                "gpu": None, "start": 1.0}

    monkeypatch.setattr(bench.Machine, "measure", measure)
    bench.main(["vaegan", "--scaling", "--quick", "--repeats", "1", "--width", ".5", "--device", "cpu"])
    assert jobs == ["--width .5", *(f"--width .5 --batch-size {b}" for b in (32, 128)),
                    *(f"--width .5 --net {size}" for size in (28, 32, 64))]
    assert "| 256 |" in capsys.readouterr().out  # images/s of batch 128


def test_a_flag_goes_to_the_scripts_that_have_it(capsys):
    _, flags = bench.parse_args(["gan", "vaegan", "--z-dim", "8", "--batch-size=8", "--device", "cpu"])
    assert flags == {"gan": ["--batch-size=8"], "vaegan": ["--z-dim", "8", "--batch-size=8"]}
    assert list(bench.parse_args(["--quick"])[1]) == list(bench.SCRIPTS)


@pytest.mark.parametrize("words, said", [
    (["gam"], "gam found, expected out of gan, cgan"),
    (["gan", "--modes", "fast"], "mode fast found, expected out of textbook"),
    (["gan", "--repeats", "0"], "0 found, at least 1 expected"),
    (["gan", "--seconds", "nan"], "nan found, above 0 expected"),
    (["gan", "--z-dim", "8"], "--z-dim found, which none of gan has"),
    (["dcgan", "--width", "-1"], "-1 found, above 0 expected"),
    (["--quick", "gan"], "gan found after a flag: scripts come first")])
def test_bad_flags_exit_with_2_and_a_line(words, said, capsys):
    with pytest.raises(SystemExit) as e:
        bench.main(words)
    assert e.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1]


def test_modes_of_a_machine(monkeypatch):
    def modes(*words):
        return bench.parse_args(["gan", *words])[0].modes

    for bf16 in (True, False):
        monkeypatch.setattr(bench.fuse, "has_bf16", lambda device, has=bf16: has)
        monkeypatch.setattr(bench.run, "_device", torch.device)
        for device, more in (("cpu", []), ("cuda", ["graph", "compiled"])):
            every = ["textbook", "resident", "fused", *["bf16"] * bf16, *more]
            short = ["textbook", "bf16", *more] if bf16 else every
            assert modes("--device", device) == every and modes("--device", device, "--quick") == short
    assert modes("--device", "cpu", "--modes", "compiled,fused") == ["fused", "compiled"]
    assert modes("--device", "cuda", "--scaling") == ["graph"]
    assert modes("--device", "cpu", "--scaling") == ["fused"]


def test_mistakes_are_one_line(tmp_path, limits, capsys):
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory\)"):
        bench.main(["gan", "--json", str(tmp_path)])
    with pytest.raises(SystemExit):
        bench.main(["gan", "--dataset", "nope", "--device", "cpu", "--modes", "textbook"])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("gan textbook: gan.py: data set 'nope' is neither known")
