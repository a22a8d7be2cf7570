"""Shared by the tests: one thread each (the runs in subprocesses share the cores), small data, and a way to
run a script."""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def cuda(test):
    """Mark a test as one of `pytest -m gpu`, skipped where there is no card."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")(test))


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A small .npz of real digits: 256 training and 64 test images 28 x 28 with labels."""
    from common import data

    mnist = data.load("mnist", ROOT / "data")
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    np.savez(
        path,
        images=mnist.images[:256].numpy(),
        labels=mnist.labels[:256].numpy(),
        test_images=mnist.test_images[:64].numpy(),
        test_labels=mnist.test_labels[:64].numpy(),
    )
    return path


def script(*words, cwd=ROOT, timeout=240, **environment):
    """Run `python words...` from the repository; returns the completed process with its text output."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        timeout=timeout,
        text=True,
        capture_output=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def untrained(images, labels, device, data_dir, steps=None):
    """A classifier that knows nothing, in place of metrics.classifier()."""
    from common import metrics

    classes = int(labels.max()) + 1 if labels.ndim == 1 else labels.shape[1]
    return metrics.Classifier(images.shape[1:], classes).eval().requires_grad_(False)
