"""Two torchrun ranks with half the batch each are one process with the whole batch."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, script


def launched(out):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_addr=127.0.0.1",
            f"--master_port={port}",
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
