"""common/log.py: scalars of any kind, damaged metrics.jsonl, consoles that fail."""

import errno
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from common import log


@pytest.fixture
def logger(tmp_path):
    made = log.Logger(tmp_path, 100, 8)
    yield made
    made.close()


# ---- Scalars ----------------------------------------------------------------------------------------------

def test_numbers_and_tensors_of_every_type_are_averaged_in_the_order_they_came(logger, tmp_path):
    for i in range(4):
        logger.add({"tensor": torch.tensor(float(i), requires_grad=True), "number": 0.1 * i, "count": i,
                    "double": torch.tensor(i, dtype=torch.float64), "int": torch.tensor(i), "flag": i > 1,
                    "bf16": torch.tensor(i, dtype=torch.bfloat16), "numpy": np.float32(i)})
    logger.add({"now and then": 7, "count": 10})
    means = logger.write(4)
    assert means == {"tensor": 1.5, "number": pytest.approx(0.15), "count": 3.2, "double": 1.5, "int": 1.5,
                     "flag": 0.5, "bf16": 1.5, "numpy": 1.5, "now and then": 7.0}
    assert all(type(v) is float for v in means.values())
    line, = log.history(tmp_path)
    assert list(line) == ["step", "seconds", "images/s", *means]
    assert {k: line[k] for k in means} == means
    logger.add({"number": 0.3})
    assert logger.write(5) == {"number": 0.3}  # nothing of the last interval, and no float32 rounding


def test_a_name_may_be_a_number_in_one_step_and_a_tensor_in_the_next(logger):
    for v in (1, torch.tensor(2.0), 6.0):
        logger.add({"V": v})
    assert logger.write(3) == {"V": 3.0}


def test_the_sum_is_a_copy_of_an_output_that_the_next_step_overwrites(logger):
    v = torch.tensor(1.0)
    logger.add({"V": v})
    logger.add({"V": v.fill_(3.0)})
    assert logger.write(2) == {"V": 2.0}


def test_sums_stay_on_the_tensors_devices_and_are_never_mixed_or_read_in_a_step(logger):
    """A "meta" tensor has no value: reading it or adding it to one of the CPU would be an error."""
    for i in range(3):
        logger.add({"a": torch.tensor(0.5, device="meta"), "b": torch.tensor(float(i)), "c": i,
                    "d": torch.tensor(0.5, device="meta")})
    kinds = {str(device): list(sums) for (device, _), sums in logger.sums.items() if device.type == "meta"}
    assert kinds == {"meta": ["a", "d"]}
    assert all(total.device == device and total.dtype == dtype
               for (device, dtype), sums in logger.sums.items() for total in sums.values())
    del logger.sums[torch.device("meta"), torch.float32]
    assert {name: v for name, v in logger.write(3).items() if name in "bc"} == {"b": 1.0, "c": 1.0}


def test_scalars_of_host_and_device_on_the_pretended_gpu(logger):
    import pretend

    with pretend.gpu() as device:
        for i in range(2):
            values = {"V": torch.tensor(float(i), device="cuda:0"), "error": torch.tensor(10.0), "k": i}
            before = device.waits
            logger.add(values)
            assert device.waits == before
        means = logger.write(2)
        assert device.waits == before + 1
    assert means == {"V": 0.5, "error": 10.0, "k": 0.5}


# ---- metrics.jsonl ----------------------------------------------------------------------------------------

def line(step):
    return json.dumps({"step": step, "seconds": step / 8, "images/s": 50.0, "V": -1.25}).encode()


@pytest.mark.parametrize("bad", [b'{"step": 3, "V"', b"", b"\xff" + line(3), line(3)[1:], b"\0" * 40])
def test_damaged_lines_are_skipped_and_the_others_kept(tmp_path, bad):
    lines = [line(1), line(2), bad, *map(line, range(4, 30)), b""]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines))
    assert [found["step"] for found in log.history(tmp_path)] == [1, 2, *range(4, 30)]


def test_a_last_line_that_a_kill_cut_off_is_nothing_to_speak_of(tmp_path, capsys):
    assert log.history(tmp_path) == []
    for end in range(len(line(2))):
        (tmp_path / "metrics.jsonl").write_bytes(line(1) + b"\n" + line(2)[:end])
        assert [found["step"] for found in log.history(tmp_path)] == [1]
    assert capsys.readouterr().err == ""


def test_a_resumed_run_goes_on_after_damage_in_the_middle(tmp_path):
    content = [line(8), b"\xff\x00", *(line(i) for i in (24, 32, 40)), line(48)[:9]]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(content))
    logger = log.Logger(tmp_path, 100, 8, step=32)
    assert logger.before == 4.0
    logger.write(33)
    logger.close()
    assert [found["step"] for found in log.history(tmp_path)] == [8, 24, 32, 33]


# ---- Consoles that fail -----------------------------------------------------------------------------------

class Broken(io.StringIO):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, ""), OSError(errno.EIO, ""),
                                   OSError(errno.ENOSPC, ""), BlockingIOError(errno.EAGAIN, ""),
                                   ValueError("I/O operation on closed file.")])
def test_say_fails_in_silence(error):
    log.say("lost", Broken(error))


def test_say_prints_and_writes_what_an_encoding_lacks_in_escapes(capsys, monkeypatch):
    log.say("α")
    log.say("β", sys.stderr, end="")
    assert capsys.readouterr() == ("α\n", "β")
    for text, encoding, shown in (("α é", "ascii", b"\\u03b1 \\xe9\n"),
                                  ("α é", "cp1252", b"\\u03b1 \xe9\n"),
                                  ("\udcff", "utf-8", b"\\udcff\n")):  # a file name that is not UTF-8
        console = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="\n")
        log.say(text, console)
        assert console.buffer.getvalue() == shown
    monkeypatch.setattr(sys, "stdout", None)  # a process without a console
    log.say("nowhere")


def test_a_reader_that_goes_away_costs_no_line_of_the_log_and_no_exit_code(tmp_path):
    """As in `python script.py | head -n 1`."""
    program = ("import sys; from pathlib import Path; from common import log\n"
               "logger = log.Logger(Path(sys.argv[1]), 500, 1)\n"
               "for step in range(1, 501): logger.add({'V': step}); logger.write(step)\n"
               "logger.close(); print('a plain print is silent now, too')")
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, stdout=write,
                            stderr=subprocess.PIPE, text=True, timeout=240, check=False)
    os.close(write)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and len(log.history(tmp_path)) == 500


def test_progress_survives_a_terminal_that_is_closed(tmp_path, monkeypatch):
    class Terminal(Broken):
        def isatty(self):
            return True

        def fileno(self):
            raise OSError(errno.EIO, "")

    monkeypatch.setattr(sys, "stderr", Terminal(OSError(errno.EIO, "")))
    logger = log.Logger(tmp_path, 10, 1)
    logger.shown = 0
    logger.add({"V": 1.0})
    logger.write(1)
    logger.progress(1)
    logger.close()
    assert logger.shown > 0 and len(log.history(tmp_path)) == 1
