"""Two ranks with half the batch each are one process with the whole batch: a small network under torchrun,
and every script in forked processes."""

import copy
import importlib
import math
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from torch import nn
from torch.nn import functional as F

from common import render, run
from common.fuse import SGD


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launched(out):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_addr=127.0.0.1",
            f"--master_port={free_port()}",
            "tests/ranks.py",
            str(out),
            "8",
        ],
        cwd=ROOT,
        timeout=240,
        text=True,
        capture_output=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    alone = script("tests/ranks.py", one, 16, PYTHONPATH=str(ROOT))
    assert alone.returncode == 0, alone.stderr
    ranks = launched(two)
    assert ranks.returncode == 0, ranks.stderr
    return one, two


def test_two_ranks_equal_one_process_with_twice_the_batch(both):
    one, two = both
    expected = torch.load(one / "rank0of1.pt", weights_only=True)["net"]
    for rank in range(2):
        net = torch.load(two / f"rank{rank}of2.pt", weights_only=True)["net"]
        for k, v in expected.items():
            torch.testing.assert_close(net[k], v, rtol=1e-5, atol=1e-6)


def test_ranks_draw_their_own_noise(both):
    noise = [torch.load(both[1] / f"rank{rank}of2.pt", weights_only=True)["noise"] for rank in range(2)]
    assert not torch.equal(*noise)


def test_one_folder_and_one_log_for_all_ranks(both):
    folder = both[1] / "ranks-ranks"
    assert (folder / "checkpoint.pt").exists()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 4
    assert len(list(folder.glob("events.out.tfevents*"))) == 1


# ------------------------------------------------------------------------------------------- every script


class Done(Exception):
    """After the last step: what the figures and numbers would take is saved."""


def still(module):
    """Without what a batch and its halves do not share: no noise, no dropout, no statistics of BatchNorm."""
    def rows(low, high):  # alike in every row, apart in every column
        def draw(*shape, device=None, **_):
            shape = shape if isinstance(shape[0], int) else tuple(shape[0])
            row = torch.linspace(low, high, math.prod(shape[1:])).view(1, *shape[1:])
            return row.repeat(shape[0], *(1,) * (len(shape) - 1)).to(device)
        return draw

    # Adam's first steps are signs of gradients, which rounding turns where they are almost zero.
    module.Adam = lambda params, *_, **__: SGD(params, 1.0)
    torch.rand, torch.randn = rows(0, 0.99), rows(-2, 2)
    torch.randn_like = lambda t: torch.randn(*t.shape, device=t.device)
    torch.randint = lambda *words, device=None: torch.zeros(words[-1], dtype=torch.int64, device=device)
    F.dropout = lambda x, *_, **__: x
    F.batch_norm = lambda x, mean, var, w, b, *_, **__: x * w.view(-1, *(1,) * (x.ndim - 2)) + b.view(
        -1, *(1,) * (x.ndim - 2))


def forked(name, words, out, world, quiet=False, before=lambda self, step: None):
    """Start `world` forked ranks of a script, which write rankRofW.pt and errR to the folder `out` at the end
    of their loop; their process numbers.  `before` is called in each before each step."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork: not Windows")
    module, plain, port, numbers = importlib.import_module(name), run.Run.loop, free_port(), []

    def loop(self, end=None):
        nets = {k: part.state_dict() for k, part in self.parts.items() if isinstance(part, nn.Module)}
        start = copy.deepcopy(nets)
        for step in plain(self, end):
            before(self, step)
            yield step
        if self.step < sum(vars(self.args).get(k, 0) for k in ("encoder_steps", "steps", "style_steps")):
            return
        torch.save([start, nets], f"{out}/rank{self.rank}of{self.world}.pt")
        raise Done

    for rank in range(world):
        numbers.append(os.fork())
        if numbers[-1]:
            continue
        code = 1
        try:
            torch.set_num_threads(1)  # the threads of the process that forked are not here
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stderr = open(f"{out}/err{rank}", "w", buffering=1)  # noqa: SIM115
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            run.Run.loop = loop
            if quiet:
                still(module)
            module.main([*words, "--device", "cpu", "--no-amp", "--out", str(out)])
        except Done:
            code = 0
        except SystemExit as e:
            code = e.code
        finally:
            if sys.exc_info()[0] not in (None, Done, SystemExit):
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    return numbers


def ended(numbers, seconds=60):
    """The exit codes of processes; those that are not through in time are killed and named."""
    codes, end = {}, time.time() + seconds
    while len(codes) < len(numbers) and time.time() < end:
        for number in set(numbers) - set(codes):
            done, status = os.waitpid(number, os.WNOHANG)
            codes |= {number: os.waitstatus_to_exitcode(status)} if done else {}
        time.sleep(0.01)
    late = sorted(set(numbers) - set(codes))
    for number in late:
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
    assert not late, "ranks hang"
    return [codes[number] for number in numbers]


def states(name, words, out, world, **more):
    """The networks of each rank, flat, before and after a run that ends well."""
    out.mkdir(exist_ok=True)
    codes = ended(forked(name, words, out, world, **more))
    assert not any(codes), [(out / f"err{rank}").read_text()[-2000:] for rank in range(world)]
    found = [torch.load(out / f"rank{rank}of{world}.pt", weights_only=True) for rank in range(world)]
    return [[{f"{k}.{j}": t.double() for k, net in nets.items() for j, t in net.items()} for nets in pair]
            for pair in found]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """An .npz of captioned shapes."""
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # what it imports, here once and not in every rank
    d = render.shapes(60)
    path = tmp_path_factory.mktemp("captioned") / "captioned.npz"
    del d["attribute_values"]
    np.savez(path, **{k: v.numpy() if torch.is_tensor(v) else np.array(v) for k, v in d.items()})
    return path


SMALL = ("--steps", "2", "--log-every", "1", "--save-every", "2", "--width", ".125")
WORDS = {"gan": (), "cgan": ("--net", "mlp"), "dcgan": (), "aae": (), "infogan": (),
         "vaegan": ("--net", "28"),
         "text2image": ("--encoder-steps", "1", "--style-steps", "1", "--steps", "1")}


def words_of(name, digits, captioned, batch):
    dataset = captioned if name == "text2image" else digits
    return [*SMALL, *WORDS[name], "--dataset", str(dataset), "--batch-size", str(batch)]


@pytest.mark.parametrize("name", [name for name in WORDS if name != "text2image"])
def test_two_ranks_of_a_script_equal_one_process_with_the_whole_batch(name, digits, captioned, tmp_path):
    """But for what ranks do not share, see still()."""
    (start, alone), = states(name, words_of(name, digits, captioned, 8), tmp_path / "one", 1, quiet=True)
    (_, a), (_, b) = states(name, words_of(name, digits, captioned, 4), tmp_path / "two", 2, quiet=True)
    moved, apart, between = (sum((p[k] - q[k]).abs().nan_to_num().sum().item() for k in p
                                 if "tracked" not in k)     # rank 0 alone draws, with statistics of its own
                             for p, q in ((alone, start), (alone, a), (a, b)))
    assert between == 0 and apart < 1e-3 * moved, (moved, apart, between)


@pytest.mark.parametrize("name", WORDS)
def test_two_ranks_of_a_script_stay_alike(name, digits, captioned, tmp_path):
    (_, a), (_, b) = states(name, words_of(name, digits, captioned, 4), tmp_path, 2)
    for k in a:
        assert a[k].isfinite().all() or k == "best.ll", k
        if "running" not in k and "tracked" not in k:  # BatchNorm's are those of a rank's own batch
            assert torch.equal(a[k], b[k]), k
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert len(list(folder.glob("checkpoint*"))) == 1 and len(list(folder.glob("events*"))) == 1


def test_resumed_on_another_number_of_ranks(digits, captioned, tmp_path):
    words = words_of("gan", digits, captioned, 4)
    states("gan", words, tmp_path, 2)
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    alone = ["--resume", str(folder), "--steps", "4"]
    assert ended(forked("gan", alone, tmp_path, 1)) == [1]
    assert "batch of all ranks is 8, that of this run 4" in (tmp_path / "err0").read_text()
    states("gan", [*alone, "--batch-size", "8"], tmp_path, 1)
    states("gan", ["--resume", str(folder), "--steps", "6", "--batch-size", "4"], tmp_path, 2)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["step"] == 6 and saved["parts"]["batches"]["position"] == 6


def test_a_killed_rank_ends_the_others_with_one_line(digits, captioned, tmp_path):
    def die(self, step):
        if self.rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    words = [*words_of("gan", digits, captioned, 4), "--steps", "20"]
    assert ended(forked("gan", words, tmp_path, 2, before=die)) == [1, -signal.SIGKILL]
    lines = (tmp_path / "err0").read_text().splitlines()
    assert len(lines) == 1 and "gan.py: another rank has ended" in lines[0], lines
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 2


def test_ranks_stop_together(digits, captioned, tmp_path):
    def stop(self, step):
        if self.rank == 1 and step == 3:
            signal.raise_signal(signal.SIGTERM)

    words = [*words_of("gan", digits, captioned, 4), "--steps", "30"]
    assert ended(forked("gan", words, tmp_path, 2, before=stop)) == [130, 130]
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == 10
    assert "stopped after step 10 and saved" in (tmp_path / "err0").read_text()
    assert (tmp_path / "err1").read_text() == ""
