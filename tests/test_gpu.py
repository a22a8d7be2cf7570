"""Every script as on a GPU, on a pretended one: the step as one CUDA graph equals the plain step to the bit,
in each phase of a run; host and device do not mix; the loop never waits.  And every script on an accelerator
of another make."""

import contextlib
import importlib
import itertools
import json
import shutil
import time

import numpy as np
import pretend
import pytest
import torch
from test_fuse import gan_step
from torch.nn import functional as F
from torch.utils._pytree import MappingKey, keystr, tree_flatten_with_path

import gan
from common import UserError, bench, data, fuse, metrics, render
from common.run import Run, _device, _one_line

HEADS = "--dataset", "heads.npz", "--net"
DIGITS = "--dataset", "digits.npz"
SHAPES = "--dataset", "shapes.npz", "--width", ".05", "--encoder-steps", "6", "--style-steps", "6"
RUNS = {  # each with what it draws
    "gan": ((*DIGITS, "--width", ".1"), "fig2a"),
    "gan alternate": ((*HEADS, "tfd", "--width", ".01", "--k", "2", "--alternate"), "fig2b"),
    "gan convolutions": ((*HEADS, "cifar-conv", "--width", ".02"), "fig2d"),
    "cgan": ((*DIGITS, "--width", ".1", "--nn-samples", "100"), "fig2"),
    "cgan dcgan28": ((*DIGITS, "--net", "dcgan28", "--width", ".1", "--nn-samples", "100"), "fig2"),
    "dcgan": ((*HEADS, "svhn", "--width", ".1"), "fig8"),
    "aae prior": ((*DIGITS, "--width", ".1"), "fig4a"),
    "aae likelihood": ((*DIGITS, "--width", ".1", "--task", "likelihood"), "samples"),
    "aae style": ((*DIGITS, "--width", ".1", "--task", "style"), "fig7"),
    "aae semi": ((*DIGITS, "--width", ".1", "--task", "semi", "--nn-steps", "6"), "styles"),
    "aae cluster": ((*DIGITS, "--width", ".1", "--task", "cluster"), "fig9"),
    "aae reduce": ((*DIGITS, "--width", ".1", "--task", "reduce"), "fig11"),
    "vaegan": ((*HEADS, "32", "--width", ".1", "--conditional", "--gating"), "fig4"),
    "vaegan vae": ((*DIGITS, "--net", "28", "--width", ".1", "--z-dim", "2", "--model", "vae"), "plane"),
    "text2image": (SHAPES, "fig3"),
    "text2image int-cls": ((*SHAPES, "--variant", "int-cls"), "fig3"),
    "infogan": ((*DIGITS, "--net", "mnist", "--gan-steps", "6"), "fig2a"),
    "infogan faces": ((*HEADS, "faces", "--gan-steps", "0"), "fig3a"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, digits):
    path = tmp_path_factory.mktemp("gpu")
    for name, found in (("heads", render.faces(n=160, size=32)), ("shapes", render.shapes(120))):
        found.pop("attribute_values", None)
        found = {k: v.numpy() if torch.is_tensor(v) else v for k, v in found.items()}
        np.savez(path / f"{name}.npz", **found)
    (path / "digits.npz").write_bytes(digits.read_bytes())
    return path


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Two minibatches calibrate BatchNorm, 5 steps train a classifier: the pretended GPU is slow."""
    calibrate, train = fuse.calibrate, metrics._train
    for name in ("cgan", "text2image", "vaegan"):
        monkeypatch.setattr(importlib.import_module(name), "calibrate",
                            lambda net, batches: calibrate(net, itertools.islice(batches, 2)))
    monkeypatch.setattr(metrics, "_train", lambda clf, x, y, steps, seed: train(clf, x, y, 5, seed))


def differences(a, b):
    """The names of what two runs' checkpoints do not have in common, to the bit."""
    a, b = (tree_flatten_with_path(torch.load(run / "checkpoint.pt", weights_only=True)["parts"])[0]
            for run in (a, b))
    assert [path for path, _ in a] == [path for path, _ in b]
    return [keystr(path) for (path, x), (_, y) in zip(a, b) if path[-1] != MappingKey("capturable")
            and not (torch.equal(x, y) if torch.is_tensor(x) else x == y)]


@pytest.mark.parametrize("name", RUNS)
def test_a_graph_equals_the_plain_step_and_the_loop_never_waits(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    script, words = importlib.import_module(name.split()[0]), RUNS[name][0]
    words = [*words, "--steps", "6", "--batch-size", "8", "--no-amp", "--no-compile", "--seed", "3",
             "--data-dir", str(folder)]
    waits, graph = {}, fuse.Graph.__call__
    with pretend.gpu():
        script.main([*words, "--device", "cuda", "--no-graph", "--out", str(tmp_path / "plain")])
    with pretend.gpu() as device:
        def call(step, *inputs):
            waits.setdefault(step, []).append(device.waits)
            return graph(step, *inputs)

        monkeypatch.setattr(fuse.Graph, "__call__", call)
        script.main([*words, "--device", "cuda", "--out", str(tmp_path / "graph")])
    assert waits and all(step.graph and len(counts) >= 6 for step, counts in waits.items())
    assert all(counts[1:-1] == counts[1:2] * (len(counts) - 2) for counts in waits.values()), waits.values()
    (plain,), (fused,) = ((list((tmp_path / mode).iterdir())) for mode in ("plain", "graph"))
    assert (fused / f"{RUNS[name][1]}.png").exists()
    assert not differences(plain, fused)
    a, b = (json.loads((run / "results.json").read_text()) for run in (plain, fused))
    assert b["mode"].startswith("step: cuda-graph") and b["machine"] == "pretended GPU"
    assert a["results"].keys() == b["results"].keys()


@pytest.mark.parametrize("mode, device", [("fused", "cuda:0"), ("graph", "cuda:0"), ("fused", "mps:0")])
def test_the_benchmark_measures_a_step_of_each_mode(mode, device, folder, monkeypatch):
    monkeypatch.chdir(folder)
    turns, words = [], ["--batch-size", "32", "--device", device, "--data-dir", str(folder), "--no-amp"]
    with pretend.gpu() if device == "cuda:0" else pretend.accelerator("mps"):
        found = bench.work({"script": "dcgan", "mode": mode, "seconds": 0.01, "began": time.time(),
                            "count": mode == "fused", "device": device, "words": [
                                *RUNS["dcgan"][0], *bench.ENDLESS, *bench.MODES[mode], *words]},
                           lambda: turns.append(1))    # an epoch is 5 steps, after which dcgan draws Fig. 2
    assert len(turns) == 1 and found["step"] > 0 and found["batch"] == 32
    assert bool(found["gpu"]) == (device == "cuda:0")
    assert mode == "graph" or min(found["flops"], found["bytes"]) > 1e6


@pytest.mark.parametrize("name", ["gan", "aae semi"])
def test_resumed_steps_equal_uninterrupted_ones(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    script = importlib.import_module(name.split()[0])
    words = [*RUNS[name][0], "--batch-size", "8", "--no-amp", "--no-compile", "--device", "cuda",
             "--data-dir", str(folder), "--out", str(tmp_path)]
    run = tmp_path / f"{name.split()[0]}-digits"
    with pretend.gpu():
        script.main([*words, "--steps", "10"])
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Run, "_all_stop", lambda self, step: step == 5)       # as Ctrl-C does
            script.main([*words, "--steps", "10", "--name", "half"])
        script.main(["--resume", f"{run}-half"])
        script.main(["--resume", f"{run}-half", "--sample", "3"])
    assert not differences(run, run.with_name(f"{run.name}-half"))
    assert len(list((run.with_name(f"{run.name}-half") / "samples").glob("*.png"))) == 3


# ------------------------------------------------------------------------------ accelerators of other makes

DEFAULTS = ["gan", "cgan", "cgan dcgan28", "dcgan", "aae prior", "vaegan", "text2image", "infogan",
            "infogan faces"]


def runs(folder, tmp_path, words, script):
    """Run `script` on the pretended mps; the run's folder."""
    script.main([*words, "--batch-size", "8", "--seed", "3", "--data-dir", str(folder), "--device", "mps",
                 "--out", str(tmp_path)])
    run, = tmp_path.iterdir()
    return run


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_run_on_another_accelerator_gets_to_its_figures(name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    script, words = importlib.import_module(name.split()[0]), [*RUNS[name][0], "--steps", "6"]
    with pretend.accelerator("mps"):
        run = runs(folder, tmp_path, words, script)
        script.main(["--resume", str(run), "--sample", "2"])
        if name == "dcgan":
            script.main(["--resume", str(run), "--features", "digits.npz"])     # the L2-SVM
    assert (run / f"{RUNS[name][1]}.png").exists() and len(list((run / "samples").glob("*.png"))) == 2
    report = json.loads((run / "results.json").read_text())
    assert report["mode"].startswith("step: plain") and report["mode"].endswith("mps:0")
    assert report["machine"].startswith("mps:0 of ") and report["results"]


def test_the_toy_on_another_accelerator(folder, tmp_path, capsys):
    with pretend.accelerator("mps"):
        run = runs(folder, tmp_path, ["--dataset", "toy", "--steps", "12", "--save-every", "6"], gan)
        gan.main(["--resume", str(run), "--steps", "14"])
    assert (run / "fig1.png").exists() and json.loads((run / "results.json").read_text())["results"]


def test_another_accelerator_resumes_to_the_bit_and_others_from_it_with_a_word(folder, tmp_path, monkeypatch,
                                                                             capsys):
    monkeypatch.chdir(folder)
    words = [*RUNS["gan"][0], "--steps", "10"]
    with pretend.accelerator("mps"):
        whole = runs(folder, tmp_path / "whole", words, gan)
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Run, "_all_stop", lambda self, step: step == 5)
            runs(folder, tmp_path / "half", words, gan)
        half, = (tmp_path / "half").iterdir()
        shutil.copytree(half, tmp_path / "other")
        gan.main(["--resume", str(half)])
    assert not differences(whole, half)
    assert "bit for bit" not in capsys.readouterr().out
    gan.main(["--resume", str(tmp_path / "other"), "--device", "cpu"])
    assert "was written on mps: on cpu the run continues, but not bit for bit" in capsys.readouterr().out
    state = torch.load(tmp_path / "other" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 10 and "random_mps" not in state


def test_aside_leaves_the_random_numbers_of_another_accelerator_alone(tmp_path, digits):
    with pretend.accelerator("mps"):
        r = Run(gan.parse_args(["--device", "mps", "--dataset", str(digits), "--out", str(tmp_path)]))
        state = torch.mps.get_rng_state()
        drawn = []
        for _ in range(2):
            with r.aside():
                drawn.append(torch.randn(3, device="mps").tolist())
        assert drawn[0] == drawn[1] and torch.equal(state, torch.mps.get_rng_state())


def test_what_another_accelerator_can_is_tried():
    fuse.can.cache_clear()
    with pretend.accelerator("mps"):
        assert {what: fuse.can("mps", what) for what in ("float64", "channels_last", "bf16", "fused")} == {
            "float64": False, "channels_last": False, "bf16": True, "fused": False}
        assert fuse.precise(torch.ones(2, device="mps")).device.type == "cpu"
    assert fuse.can("cuda", "fused") and fuse.can("cpu", "float64")
    assert not fuse.can("xpu", "fused")         # none here
    fuse.can.cache_clear()


def test_the_plain_update_is_the_fused_one(monkeypatch):
    found = []
    for able in (True, False):
        monkeypatch.setattr(fuse, "can", lambda device, what, able=able: able)
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        opt = fuse.Adam(net.parameters(), 1e-2)
        for _ in range(9):
            fuse.descend(net(torch.ones(4, 3)).square().mean(), opt)
        found.append((net.weight.detach().clone(), opt.state[net.weight]["step"]))
    torch.testing.assert_close(*found)
    assert found[1][1] == 9


def test_a_warp_continues_edges_as_border_padding_does(monkeypatch):
    grids, affine_grid = [], F.affine_grid
    monkeypatch.setattr(F, "affine_grid", lambda *a, **k: grids.append(affine_grid(*a, **k)) or grids[-1])
    x = torch.rand(40, 2, 28, 28, requires_grad=True)
    y = data.warp(x)
    expected = F.grid_sample(x, grids[0], padding_mode="border", align_corners=False)
    assert grids[0].abs().max() > 1.2
    torch.testing.assert_close(y, expected)
    w = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad((t * w).sum(), x)[0] for t in (y, expected)))


def test_auto_names_another_accelerator_and_takes_the_cpu(capsys):
    with pretend.accelerator("mps"):
        assert str(_device("auto")) == "cpu" and str(_device("mps")) == "mps:0"
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and "--device mps" in said and "not been run" in said
        with pytest.raises(UserError, match=r"xpu found, cpu or .*mps \(one rank\) expected"):
            _device("xpu")


def test_an_operation_that_apples_gpus_lack_is_a_line(capsys):
    error = NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS device. As "
                                "a temporary fix, you can set the environment variable "
                                "`PYTORCH_ENABLE_MPS_FALLBACK=1` to use the CPU as a fallback for this op.")
    _one_line("gan")(NotImplementedError, error, None)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "aten::x" in said and "PYTORCH_ENABLE_MPS_FALLBACK=1" in said


@pytest.mark.parametrize("spoil, error", [
    (lambda x: x.double(), TypeError), (lambda x: x.to("cpu", torch.float64), TypeError),
    (lambda x: torch.ones(2, dtype=torch.float64).to("mps:0"), TypeError),
    (lambda x: x.contiguous(memory_format=torch.channels_last), RuntimeError),
    (lambda x: F.grid_sample(x, torch.zeros(1, 2, 2, 2, device="mps"),
                                               padding_mode="border", align_corners=False), RuntimeError)])
def test_what_the_other_accelerator_refuses(spoil, error):
    with pretend.accelerator("mps"), pytest.raises(error):
        spoil(torch.rand(1, 2, 3, 3, device="mps"))


# ------------------------------------------------------------------------------------- the pretence itself


def test_warm_up_capture_and_replay_are_one_update_a_call():
    found = []
    with pretend.gpu():
        for graph in (False, True):
            G, D, _, opt_G, step, count = gan_step("cuda:0", graph=graph)
            torch.manual_seed(1)
            x, z = torch.randn(8, 6, device="cuda:0"), torch.randn(8, 4, device="cuda:0")
            losses = [{k: v.item() for k, v in step(x + i, z - i).items()} for i in range(7)]
            assert count.item() == 7 and isinstance(step, fuse.Graph) == graph
            found.append((losses, [p.tolist() for net in (G, D) for p in net.parameters()],
                          opt_G.param_groups[0]["lr"].item()))
    assert found[0] == found[1] and found[0][-1] == pytest.approx(1e-2 * 0.9**7)


def test_a_number_of_python_is_baked_in():
    rates = iter(range(100))
    with pretend.gpu():
        w = torch.zeros((), device="cuda:0")
        run = fuse.Graph(lambda x: {"w": w.add_(x * next(rates))}, warmup=1)
        x = torch.ones((), device="cuda:0")
        assert [run(x)["w"].item() for _ in range(4)] == [0, 1, 2, 3]          # not 0, 1, 3, 6


@pytest.mark.parametrize("spoil, said", [
    (lambda x: x.sum().item(), "not permitted when stream is capturing"),
    (lambda x: x[x > 0], "not permitted when stream is capturing"),
    (lambda x: torch.tensor([1.0], device=x.device), "not permitted when stream is capturing"),
    (lambda x: x.cpu(), "not permitted when stream is capturing"),
    (lambda x: x.tolist(), "not permitted when stream is capturing"),
    (lambda x: x + torch.ones(3), "cuda:0 and cpu"),
    (lambda x: torch.ones(3)[x.long()], "cuda:0 and cpu")])
def test_what_a_gpu_refuses_is_refused(spoil, said):
    with pretend.gpu() as device:
        run = fuse.Graph(lambda x: {"x": x.sum(), "y": spoil(x)}, warmup=0)
        x = torch.ones(3, device="cuda:0")
        assert not device.waits
        with pytest.raises(RuntimeError, match=said):
            run(x)


N, S, I = torch.arange(3.0), torch.tensor(2.0), torch.tensor([2, 0])     # of the host
MEET = {  # x: a vector on the device; what a GPU does when host and device meet
    "x + S": lambda x: x + S,
    "S - x": lambda x: S - x,
    "x.mul_(S)": lambda x: x.clone().mul_(S),
    "x < S": lambda x: x < S,
    "maximum": lambda x: torch.maximum(x, S),
    "x ** S": lambda x: x ** S,
    "where(x, x, S)": lambda x: torch.where(x > 1, x, S),
    "where(x, S, S)": lambda x: torch.where(x > 1, S, -S),
    "masked_fill": lambda x: x.masked_fill(x > 1, S),
    "fill_(S)": lambda x: x.clone().fill_(S),
    "copy_(N)": lambda x: x.clone().copy_(N),
    "x[I]": lambda x: x[I],
    "x[I] = S": lambda x: x.clone().index_put_((I,), S),
    "foreach_add pairs": lambda x: torch.stack(torch._foreach_add([x, x], [x, S])),
    "foreach_add apart": lambda x: torch._foreach_add([x, N], [x, N])[0],
}
APART = {  # what it refuses
    "x + N": lambda x: x + N,
    "N.add_(x)": lambda x: N.clone().add_(x),
    "S.add_(x0)": lambda x: S.clone().add_(x[0]),
    "stack": lambda x: torch.stack([x[0], S]),
    "cat": lambda x: torch.cat([x, N]),
    "gather": lambda x: x.gather(0, I),
    "index_select": lambda x: x.index_select(0, I),
    "N[x]": lambda x: N[x.long()],
    "x[I] = N": lambda x: x.clone().index_put_((I,), N[:2]),
    "matmul": lambda x: x @ N,
    "addmm": lambda x: torch.addmm(S, x[:, None], x[None]),
    "clamp": lambda x: x.clamp(-S, S),
    "clamp(max)": lambda x: x.clamp(max=S),
    "where(N)": lambda x: torch.where(x > 1, x, N),
    "where(N > 1)": lambda x: torch.where(N > 1, x, x),
    "masked_fill(N > 1)": lambda x: x.masked_fill(N > 1, 0.0),
    "foreach_add(N)": lambda x: torch._foreach_add([x, x], [x, N]),
    "embedding": lambda x: F.embedding(I, x[:, None]),
    "batch_norm": lambda x: F.batch_norm(x[:, None], N[:1], N[1:2]),
}


def gpus():
    return [pytest.param(pretend.gpu, id="pretended"),
            pytest.param(contextlib.nullcontext, id="real", marks=[pytest.mark.gpu, pytest.mark.skipif(
                not torch.cuda.is_available(), reason="needs a CUDA GPU")])]


@pytest.mark.parametrize("gpu", gpus())
@pytest.mark.parametrize("name", MEET)
def test_where_host_and_device_may_meet(name, gpu):
    with gpu():
        found = MEET[name](torch.arange(3.0, device="cuda"))
        assert found.is_cuda and torch.equal(found.cpu(), MEET[name](torch.arange(3.0)))


@pytest.mark.parametrize("gpu", gpus())
@pytest.mark.parametrize("name", APART)
def test_where_host_and_device_may_not_meet(name, gpu):
    with gpu():
        x = torch.arange(3.0, device="cuda")
        with pytest.raises(RuntimeError, match="devices?"):
            APART[name](x)


@pytest.mark.parametrize("name", ["addcmul", "lerp"])
def test_what_older_versions_refuse_is_refused(name):
    with pretend.gpu():
        x = torch.ones(3, device="cuda:0")
        with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
            getattr(x, name)(x, S)


@pytest.mark.parametrize("gpu", gpus())
def test_a_graph_has_the_numbers_of_the_host_that_it_was_captured_with(gpu):
    with gpu():
        x, rate, done = torch.ones(3, device="cuda"), torch.tensor(2.0), []

        def step(x):
            done.append(rate.add_(1.0))         # on the host: in no graph
            return {"y": (x * rate).sum()}

        run = fuse.Graph(step, warmup=0)
        first = run(x)["y"].item()
        rate.fill_(7.0)
        assert first == run(x)["y"].item() == 9 and len(done) == 1 and rate == 7


def test_waits_are_counted_outside_of_a_capture():
    with pretend.gpu() as device:
        x = torch.ones(3, device="cuda:0")
        assert (x * 2 + torch.ones(())).sum().item() == 9 and device.waits == 1
        x.cpu(), x.tolist(), torch.nonzero(x), x[x > 0]
        assert device.waits == 5
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert x.device == torch.device("cuda:0") and x.is_cuda and not x.cpu().is_cuda and device.waits == 6
