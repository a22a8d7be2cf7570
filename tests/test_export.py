"""What a trained generator is used for: single PNGs, grids, files that draw elsewhere.  Each script's Drawer
draws what the script itself draws, and the exported program and the shipped weights draw the same."""

import csv
import importlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, script
from PIL import Image
from test_gpu import RUNS, folder  # noqa: F401 (a fixture)

from common import UserError, data, export, run

NETS = ["gan", "gan convolutions", "cgan", "cgan dcgan28", "dcgan", "aae prior", "aae likelihood",
        "aae style", "aae semi", "aae cluster", "aae reduce", "vaegan", "vaegan vae", "text2image", "infogan",
        "infogan faces"]
PAPER = {"cgan dcgan28": ["--paper"], "dcgan": ["--paper"]}     # drawn with each batch's own statistics


def trained(name, folder, out, *more):  # noqa: F811
    """(module, folder of a run of two steps without its figures)."""
    module = importlib.import_module(name.split()[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "report", lambda *_: None)
        module.main([*RUNS[name][0], "--width", ".1", "--steps", "2", "--batch-size", "8", "--seed", "3",
                     "--no-amp", "--out", str(out), "--data-dir", str(folder), *more])
    made, = out.iterdir()
    return module, made


def drawer(module, where):
    args = module.parse_args(["--resume", str(where), "--sample", "1", "--device", "cpu"])
    r = run.Run(args)
    with r.aside():
        return export.load(r, module.drawer)[0]


@pytest.mark.parametrize("name", NETS)
def test_files_draw_what_the_run_draws_without_its_data(name, folder, tmp_path, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        module, made = trained(name, folder, tmp_path / "runs", *PAPER.get(name, []))
    monkeypatch.chdir(tmp_path)                                 # the data are elsewhere now
    for file in ("g.pt2", "g.npz"):
        module.main(["--resume", str(made), "--export", str(tmp_path / file)])
    draws = drawer(module, made)
    inputs = draws.draw(4)
    torch.manual_seed(0)                                        # of dropout and fresh z, where G has them
    x = draws.pictures(inputs)
    assert 0 <= x.min() < x.max() <= 1 and x.shape[0] == 4
    program = torch.export.load(tmp_path / "g.pt2").module()
    torch.manual_seed(0)
    assert torch.allclose(program(*inputs), x, atol=1e-5)
    assert len(program(*(t[:1] for t in inputs))) == 1
    shipped = drawer(module, tmp_path / "g.npz")
    torch.manual_seed(0)
    assert torch.allclose(shipped.pictures(inputs), x, atol=0.05)       # bfloat16
    numbers = sum(t.numel() for t in draws.nets.state_dict().values())
    assert (tmp_path / "g.npz").stat().st_size < 2.1 * numbers + 9e4

    module.main(["--resume", str(made), "--sample", "12", "--seed", "5"])
    drawn = sorted((made / "samples").glob("*.png"))
    assert [f.name for f in drawn] == [f"{i:05d}.png" for i in range(12)]
    if draws.knobs:
        rows = list(csv.DictReader((made / "samples" / "labels.csv").open()))
        assert len(rows) == 12 and list(rows[0]) == ["file", *draws.knobs]


def test_the_lines_of_readme_draw(folder, tmp_path, monkeypatch):  # noqa: F811
    with monkeypatch.context() as patch:
        patch.chdir(folder)
        infogan, made = trained("infogan", folder, tmp_path / "runs")
        infogan.main(["--resume", str(made), "--export", str(tmp_path / "g.pt2")])
    made.rename(tmp_path / "runs" / "infogan-mnist")
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    block = re.sub(r"(x = .*)", r"\1\nprint(*x.shape, bool(0 <= x.min() < x.max() <= 1))", block)
    result = script("-c", block, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert result.stdout.splitlines() == ["16 1 28 28 True"] * 2, result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "weights").glob("*.npz")), ids=lambda p: p.stem)
def test_shipped_generators_draw(path, tmp_path, monkeypatch):
    assert path.stat().st_size <= 1.5e6
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(path.stem)
    draws = drawer(module, path)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        inputs = draws.draw(64)
        x = draws.pictures(inputs)
    assert x.std(0).mean() > 0.1                                # pictures differ
    assert x.std((1, 2, 3)).mean() > 0.1                        # and are not flat
    if path.stem in ("cgan", "aae"):                            # and obey: a label's mean is its digit's
        mnist = data.load("mnist", ROOT / "data")
        images, labels = mnist.images[:5000].float(), mnist.labels[:5000]
        means = torch.stack([images[labels == k].mean(0) for k in range(10)])
        drawn = torch.stack([x[inputs[1] == k].mean(0) for k in range(10)])
        near = torch.corrcoef(torch.cat([drawn.flatten(1), means.flatten(1) / 255]))[:10, 10:].argmax(1)
        assert (near == torch.arange(10)).float().mean() >= 0.8


def test_generators_are_shipped():
    files = [*(ROOT / "weights").glob("*.npz")]
    assert {p.stem for p in files} == {p.stem for p in ROOT.glob("*.py")}
    assert sum(p.stat().st_size for p in files) <= 8e6


def test_labels_come_in_turn_and_can_be_set(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder)
    cgan, made = trained("cgan", folder, tmp_path / "runs")
    cgan.main(["--resume", str(made), "--sample", "503"])
    rows = list(csv.DictReader((made / "samples" / "labels.csv").open()))
    assert [row["label"] for row in rows] == [str(i % 10) for i in range(503)]
    first = (made / "samples" / "00000.png").read_bytes()
    cgan.main(["--resume", str(made), "--sample", "3"])
    assert first == (made / "samples" / "00000.png").read_bytes()
    cgan.main(["--resume", str(made), "--sample", "3", "--seed", "8"])
    assert first != (made / "samples" / "00000.png").read_bytes()
    cgan.main(["--resume", str(made), "--sample", "3", "--label", "7", "--grid"])
    assert Image.open(made / "grid.png").size == (2 + 2 * 34, 2 + 2 * 34)
    for words in (["--grid"], ["--set", "label=7"]):
        cgan.main(["--resume", str(made), "--sample", "3", "--real", *words])
        assert {Image.open(f).size for f in (made / "real").iterdir()} == {(32, 32)}
        assert len(list((made / "real").iterdir())) == 3
        for f in (made / "real").iterdir():
            f.unlink()
    rows = list(csv.DictReader((made / "samples" / "labels.csv").open()))
    assert [row["label"] for row in rows] == ["7"] * 3
    for words, said in ((["--label", "12"], "one of 0, 1, 2"), (["--label", "-1"], "one of 0, 1, 2"),
                        (["--set", "label=-1"], "one of 0, 1, 2"), (["--set", "colour=1"], "takes label"),
                        (["--set", "label"], "NAME=VALUE expected")):
        with pytest.raises(UserError, match=said):
            cgan.main(["--resume", str(made), "--sample", "3", *words])
    assert len(list((made / "samples").glob("*.png"))) == 3     # a refusal leaves what was drawn


def test_attributes_can_be_asked_for_in_their_own_units(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder)
    vaegan, made = trained("vaegan", folder, tmp_path / "runs")
    draws = drawer(vaegan, made)
    y = draws.ask(draws.draw(4), {"glasses": "1", "hat": "0"})[1]
    asked = draws.asked((torch.zeros(4, 1), y))
    assert {(row["glasses"], row["hat"]) for row in asked} == {("1", "0")}
    i = draws.knobs["glasses"][1]
    assert y[:, i].unique().numel() == 1 and y[0, i] > 0                # standardised: above the mean


def test_what_cannot_be_done_is_one_line(folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(folder)
    infogan, made = trained("infogan", folder, tmp_path / "runs")
    for words, said in ((["--export", "g.onnx"], "ends in .pt2"),
                        (["--export", "missing/g.pt2"], "cannot write"),
                        (["--sample", "0"], "at least 1"),
                        (["--grid"], "--grid needs --sample N"),
                        (["--sample", "1", "--set", "c2=1e300"], "too large for float32"),
                        (["--explore", "runs/other"], "--explore RUN names the run")):
        with pytest.raises((UserError, SystemExit)) as e:
            infogan.main(["--resume", str(made), *words])
        assert said in str(e.value) + capsys.readouterr().err


def test_a_damaged_file_of_weights_is_refused(folder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(folder)
    infogan, made = trained("infogan", folder, tmp_path / "runs")
    infogan.main(["--resume", str(made), "--export", str(tmp_path / "g.npz")])
    good = (tmp_path / "g.npz").read_bytes()
    with np.load(tmp_path / "g.npz") as arrays:
        settings = json.loads(str(arrays["settings"]))
    assert not {"out", "data_dir", "resume", "name"} & settings.keys()
    for i, bad in enumerate((b"", good[:len(good) // 2], b"PK" + b"x" * 50, bytes(len(good)))):
        (tmp_path / f"{i}.npz").write_bytes(bad)
        with pytest.raises(UserError, match="damaged or not a file of --export"):
            infogan.main(["--resume", str(tmp_path / f"{i}.npz"), "--sample", "1", "--out", str(tmp_path)])
    for i in range(67, 260, 7):                             # zlib finds some, the checksum the others
        (tmp_path / "flip.npz").write_bytes(good[:i] + bytes([good[i] ^ 255]) + good[i + 1:])
        with pytest.raises(UserError, match="damaged or not a file of --export"):
            export.settings_in(tmp_path / "flip.npz")
    np.savez(tmp_path / "p.npz", settings=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="damaged or not a file of --export"):       # a pickle never runs
        infogan.main(["--resume", str(tmp_path / "p.npz"), "--sample", "1"])
    with pytest.raises(UserError, match="use it with --sample"):
        infogan.main(["--resume", str(tmp_path / "g.npz")])
