"""Every script's whole iteration as one graph of torch.compile, in each phase of a run: no break, no second
compilation, and the plain step's numbers."""

import importlib

import pytest
import torch
from test_gpu import RUNS, folder  # noqa: F401

from common import fuse
from common.run import Run

MORE = {
    "aae style": ("--dataset", "digits.npz", "--width", ".1", "--task", "style"),
    "aae vae": ("--dataset", "digits.npz", "--width", ".1", "--prior", "gaussian", "--model", "vae"),
    "aae semi sgd": ("--dataset", "digits.npz", "--width", ".1", "--task", "semi", "--nn-steps", "0",
                     "--optimizer", "sgd"),
    "vaegan gan": ("--dataset", "heads.npz", "--net", "32", "--width", ".1", "--model", "gan", "--gating"),
    "cgan tags": ("--dataset", "shapes.npz", "--net", "tags", "--width", ".05"),
    "cgan dcgan32": ("--dataset", "heads.npz", "--net", "dcgan32", "--width", ".1", "--attributes", "hat"),
}
WORDS = {name: words for name, (words, _) in RUNS.items()} | MORE
SHORT = {"text2image": ("--encoder-steps", "2", "--style-steps", "2"),
         "text2image int-cls": ("--encoder-steps", "0", "--style-steps", "0")}      # those steps are the same


class Enough(Exception):
    """Leaves a script's main() after the last step."""


def trained(name, compiled, out, monkeypatch):
    """The log of three steps of a run, step by step, and its networks' parameters."""
    script, log, kept = importlib.import_module(name.split()[0]), [], {}
    loop, keep = Run.loop, Run.keep

    def measured(self, end=None):
        yield from loop(self, end)
        if self.step == sum(vars(self.args).get(k, 0) for k in ("encoder_steps", "steps", "style_steps")):
            raise Enough

    def kept_as_well(self, *about, **parts):
        kept.update(parts)
        keep(self, *about, **parts)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "loop", measured)
        patch.setattr(Run, "keep", kept_as_well)
        patch.setattr(Run, "log", lambda _, scalars: log.append(
            {k: torch.as_tensor(v).item() for k, v in scalars.items()}))
        patch.setattr(Run, "show", lambda *_: None)
        patch.setattr(fuse, "BACKEND", "aot_eager")
        with pytest.raises(Enough):
            script.main([*WORDS[name], *SHORT.get(name, ()), "--steps", "3", "--batch-size", "8",
                         "--no-amp", "--seed", "3", "--device", "cpu", "--out", str(out),
                         "--compile" if compiled else "--no-compile"])
    nets = [part for part in kept.values() if isinstance(part, torch.nn.Module)]
    return log, [p.detach().clone() for net in nets for p in net.parameters()]


@pytest.mark.parametrize("name", WORDS)
def test_the_whole_step_is_one_graph_like_the_plain_one(name, folder, tmp_path, monkeypatch):  # noqa: F811
    if fuse.cannot_compile(torch.device("cpu")):
        pytest.skip(fuse.cannot_compile(torch.device("cpu")))
    from torch._dynamo.utils import counters
    monkeypatch.chdir(folder)
    made, compiled = [], fuse.compiled
    monkeypatch.setattr(fuse, "compiled", lambda step: made.append(step) or compiled(step))
    torch._dynamo.reset()
    counters.clear()
    (plain, start), (fused, end) = (trained(name, flag, tmp_path / str(flag), monkeypatch)
                                    for flag in (False, True))
    steps = [tuple(line) for line in fused if not set(line) <= {"error", "ll"}]  # the rest is of evaluations
    run = len(set(steps))                                   # steps that ran: each logs names of its own
    assert counters["stats"]["unique_graphs"] == run <= len(made) and not counters["graph_break"]
    assert len(plain) == len(fused)
    for a, b in zip(plain, fused):                          # Adam enlarges rounding from step to step
        assert a == pytest.approx(b, rel=0.05, abs=0.02), name
    first = {tuple(line): line for line in reversed(plain)}, {tuple(line): line for line in reversed(fused)}
    key = tuple(plain[0])
    assert first[0][key] == pytest.approx(first[1][key], rel=1e-4, abs=1e-5)
    assert sum(torch.isfinite(p).all() for p in end) == len(end) == len(start)
