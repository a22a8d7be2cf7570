"""common/data.py: data sets in their published layouts, bad ones of every kind, caches, minibatches."""

import gzip
import hashlib
import importlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import tarfile
import threading
import time
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cuda
from PIL import Image

import common
from common import UserError, data, prepare
from common.data import Batches, load

REPO = Path(__file__).resolve().parent.parent
RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path, a):
    """The array (H, W) or (H, W, C), or the picture, as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (a if isinstance(a, Image.Image) else Image.fromarray(a)).save(path)
    return path


def one_line(call, *words):
    """call() raises a UserError of a single line that has all the words in it."""
    with pytest.raises(UserError) as e:
        call()
    text = str(e.value)
    assert "\n" not in text
    for word in words:
        assert str(word) in text, text


def by_name(d):
    """The images of a folder in the order of their files' names."""
    return d.images[np.argsort(d.extra["files"])]


def cache_of(root):
    """The prepared and half-prepared sets under a data folder, without the lock files."""
    return sorted(p for p in (root / "cache").glob("*") if p.suffix != ".lock")


# ---- MNIST -----------------------------------------------------------------------------------------------


def test_mnist():
    d = load("mnist", REPO / "data")
    assert d.images.shape == (60000, 1, 28, 28) and d.test_images.shape == (10000, 1, 28, 28)
    assert d.images.dtype == torch.uint8 and d.labels.dtype == torch.int64
    assert d.labels[:5].tolist() == [5, 0, 4, 1, 9] and d.test_labels[:4].tolist() == [7, 2, 1, 0]
    assert d.labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert d.images.double().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)
    assert d.classes == list("0123456789")


@pytest.mark.parametrize("damage", ["missing", "cut off", "not gzip", "bit of file", "bit of content"])
def test_mnist_damaged(tmp_path, damage):
    raw, bad = tmp_path / "MNIST" / "raw", "train-labels-idx1-ubyte.gz"
    raw.mkdir(parents=True)
    for file in (REPO / "data" / "MNIST" / "raw").glob("*.gz"):
        if file.name != bad:
            (raw / file.name).symlink_to(file)
    packed = (REPO / "data" / "MNIST" / "raw" / bad).read_bytes()
    flipped, content = bytearray(packed), bytearray(gzip.decompress(packed))
    flipped[len(packed) // 2] ^= 1
    content[12345] ^= 1
    damaged = {
        "cut off": packed[:9000],
        "not gzip": b"<html>",
        "bit of file": flipped,
        "bit of content": gzip.compress(content, 1),
    }
    if damage != "missing":
        (raw / bad).write_bytes(damaged[damage])
    words = {"missing": ["missing", bad], "bit of content": ["md5", bad[:-3], data.MNIST[bad[:-3]]]}
    words = words.get(damage, ["damaged", "restore"])
    one_line(lambda: load("mnist", tmp_path), raw, *words)


# ---- names, size, channels -------------------------------------------------------------------------------


def test_unknown_name(tmp_path):
    one_line(lambda: load("minst", tmp_path), "'minst'", "mnist, faces", "celeba", "folder", ".npz")
    one_line(lambda: load(str(tmp_path / "gone.npz"), tmp_path), "gone.npz", "exists")
    one_line(lambda: load("a" * 5000, tmp_path), "exists")
    (tmp_path / "file").touch()
    one_line(lambda: load("mnist", tmp_path / "file"), tmp_path / "file" / "MNIST" / "raw", "missing")
    np.savez(tmp_path / "a.npz", images=noise(2, 1, 4, 4))
    assert len(load((tmp_path / "a.npz").rename(tmp_path / "A.NPZ")).images) == 2
    one_line(lambda: load(str(save(tmp_path / "a.png", noise(4, 4))), tmp_path), "a.png", "no .npz")


def test_picture_files_need_a_size(tmp_path):
    one_line(lambda: load("imagenet", tmp_path), "differ in size", "give load() a size")
    one_line(lambda: load(tmp_path, tmp_path), tmp_path, "differ in size")


def test_size_and_channels_of_arrays(tmp_path):
    a = noise(3, 3, 12, 20)
    np.savez(tmp_path / "a.npz", images=a[np.argsort(prepare.shuffled(range(3)))], test_images=a[:1])
    d = load(tmp_path / "a.npz", size=12, channels=1)
    assert d.images.shape == (3, 1, 12, 12) and d.test_images.shape == (1, 1, 12, 12)
    grey = np.asarray(Image.fromarray(a[0].transpose(1, 2, 0)).convert("L"))
    assert np.array_equal(d.images[0, 0], grey[:, 4:16])  # the middle, uncut in height
    d = load(tmp_path / "a.npz")
    assert np.array_equal(d.images, a)
    np.savez(tmp_path / "g.npz", images=np.full((2, 1, 6, 6), 77, np.uint8))
    d = load(tmp_path / "g.npz", size=3, channels=3)
    assert d.images.shape == (2, 3, 3, 3) and (d.images == 77).all()


def test_arrays_and_files_are_resized_alike(tmp_path):
    """Shrunk and enlarged, in grey and colour: torch's and Pillow's results differ by a level at most."""
    smooth = np.asarray(Image.fromarray(noise(7, 7, 3)).resize((33, 29), Image.Resampling.BICUBIC))
    save(tmp_path / "f" / "a.png", smooth)
    np.savez(tmp_path / "a.npz", images=smooth.transpose(2, 0, 1)[None])
    for size, channels in itertools.product((8, 13, 40), (1, 3)):
        x = load(tmp_path / "f", tmp_path, size, channels).images
        y = load(tmp_path / "a.npz", tmp_path, size, channels).images
        assert x.shape == y.shape == (1, channels, size, size)
        assert (x.int() - y.int()).abs().max() <= 1 and x.float().std() > 5


def test_halving_takes_the_mean_of_an_even_picture():
    checks = torch.tensor([[0, 255], [255, 0]], dtype=torch.uint8).repeat(8, 8)[None, None]
    assert (data.resize(checks, 4, 1) - 127).abs().max() <= 1  # aliasing would leave 0 or 255


# ---- folders ---------------------------------------------------------------------------------------------


def test_folder_with_classes(tmp_path):
    a = {f"{c}/{i}.png": noise(6, 6, 3) for c in ("dog", "cat") for i in range(3)}
    a["cat/deep/x.PNG"] = noise(6, 6, 3)
    for name, x in a.items():
        save(tmp_path / "pets" / name, x)
    save(tmp_path / "pets" / ".thumbnails" / "0.png", noise(6, 6, 3))
    (tmp_path / "pets" / "cat" / "._0.png").write_bytes(b"not a picture")
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not a picture")
    d = load(tmp_path / "pets", tmp_path, 6)
    assert d.name == "pets" and d.classes == ["cat", "dog"]
    assert d.labels.tolist() == [f.startswith("dog") for f in d.extra["files"]]
    assert (d.labels.diff() < 0).any()                      # mixed, so that a part held out has both
    assert d.labels.dtype == torch.int64 and d.images.shape == (7, 3, 6, 6) and d.images.dtype == torch.uint8
    assert sorted(d.extra["files"]) == sorted(a)
    for x, name in zip(d.images, d.extra["files"]):
        assert np.array_equal(x, a[name].transpose(2, 0, 1))


def test_flat_folder_in_several_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "BLOCK", 4)
    a = noise(10, 5, 5)
    for i, x in enumerate(a):
        save(tmp_path / "f" / f"{i}.png", x)
    d = load(str(tmp_path / "f"), tmp_path, 5)
    order = [int(f[0]) for f in d.extra["files"]]
    assert d.labels is None and d.classes is None and np.array_equal(d.images[:, 0], a[order])
    assert sorted(order) == list(range(10)) != order        # shuffled: names often tell the class
    assert "preparing f: 10 of 10 pictures" in capsys.readouterr().err


def test_mixed_sizes(tmp_path):
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :10], wide[:, 10:30, 1], wide[:, 30:] = (255, 0, 0), 200, (0, 0, 255)
    save(tmp_path / "f" / "a.png", wide)
    save(tmp_path / "f" / "b.png", noise(30, 20, 3))
    d = load(tmp_path / "f", tmp_path, size=10)
    assert d.images.shape == (2, 3, 10, 10)
    assert (d.images[0, 1] == 200).all() and not d.images[0, [0, 2]].any()  # the green middle alone


def test_kinds_of_pictures(tmp_path):
    f = tmp_path / "f"
    save(f / "1-grey.png", np.full((4, 4), 50, np.uint8))
    save(f / "2-clear.png", Image.new("RGBA", (4, 4), (10, 20, 30, 0)))
    save(f / "3-half.png", Image.new("RGBA", (4, 4), (10, 20, 30, 255)))
    save(f / "4-deep.png", np.full((4, 4), 128 << 8, np.uint16))
    save(f / "5-palette.png", Image.new("RGB", (4, 4), (0, 255, 0)).quantize(4))
    save(f / "6-cmyk.jpg", Image.new("CMYK", (4, 4), (0, 0, 0, 255)))
    save(f / "7-bits.png", Image.new("1", (4, 4), 1))
    d = load(f, tmp_path, 4)
    expected = [(50,) * 3, (255,) * 3, (10, 20, 30), (128,) * 3, (0, 255, 0), (0, 0, 0), (255,) * 3]
    assert d.images.shape == (7, 3, 4, 4)  # colour, since some have it
    for x, colour in zip(by_name(d), expected):
        assert (x.int() - torch.tensor(colour)[:, None, None]).abs().max() <= 3
    assert load(f, tmp_path, 4, channels=1).images.shape == (7, 1, 4, 4)
    for name in ("2-clear.png", "3-half.png", "5-palette.png", "6-cmyk.jpg"):
        (f / name).unlink()
    assert by_name(load(f, tmp_path, 4))[:, 0, 0, 0].tolist() == [50, 128, 255]  # grey, since all are
    assert load(f, tmp_path, 4).images.shape == (3, 1, 4, 4)


def test_picture_lying_on_its_side(tmp_path):
    a = np.zeros((20, 20), np.uint8)
    a[:10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    (tmp_path / "f").mkdir()
    Image.fromarray(np.rot90(a)).save(tmp_path / "f" / "a.png", exif=exif)
    assert np.array_equal(load(tmp_path / "f", tmp_path, 20).images[0, 0], a)


@pytest.mark.parametrize("channels", [None, 1])
def test_corrupt_picture_is_named(tmp_path, channels):
    f = tmp_path / "f"
    save(f / "a.png", noise(16, 16, 3))
    whole = save(f / "b.jpg", noise(16, 16, 3)).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"<html>404</html>", b""):
        (f / "b.jpg").write_bytes(damaged)
        one_line(lambda: load(f, tmp_path, 8, channels), f / "b.jpg", "cannot be read", "remove")
        assert cache_of(tmp_path) == []


def test_all_bad_pictures_are_listed_and_may_be_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "BLOCK", 4)
    good, f = [], tmp_path / "f"
    for i in range(12):
        file = save(f / "ab"[i % 2] / f"{i:02}.png", noise(8, 8, 3))
        if i in (0, 3, 7):
            file.write_bytes([b"", b"<html>", file.read_bytes()[:150]][i // 3])
        else:
            good.append(f"{'ab'[i % 2]}/{i:02}.png")
    one_line(lambda: load(f, tmp_path, 8), "00.png", "03.png", "07.png", "--skip-bad")
    assert cache_of(tmp_path) == []
    capsys.readouterr()
    d = load(f, tmp_path, 8, skip_bad=True)
    said = capsys.readouterr().err.splitlines()[0]
    assert all(word in said for word in ("left out", "00.png", "03.png", "07.png"))
    assert sorted(d.extra["files"]) == sorted(good) and len(d.images) == len(d.labels) == 9
    for x, y, name in zip(d.images, d.labels, d.extra["files"]):
        assert np.array_equal(x, np.asarray(Image.open(f / name)).transpose(2, 0, 1)) and "ab"[y] == name[0]
    for name in good:
        (f / name).write_bytes(b"")
    one_line(lambda: load(f, tmp_path, 8, skip_bad=True), "none of the 12 pictures", f)
    for part, content in (("train", noise(8, 8, 3)), ("test", None)):
        file = save(tmp_path / "parts" / part / "0.png", noise(8, 8, 3))
        if content is None:
            file.write_bytes(b"")
    one_line(lambda: load(tmp_path / "parts", tmp_path, 8, skip_bad=True), "none of the 1 test pictures")


def test_no_picture_reaches_another_program(tmp_path, monkeypatch):
    """Pillow hands EPS files to Ghostscript, whatever their names end in."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript runs"))
    f = tmp_path / "f"
    save(f / "a.png", noise(8, 8, 3))
    Image.fromarray(noise(8, 8, 3)).save(f / "b.eps")
    (f / "b.eps").rename(f / "b.png")
    one_line(lambda: load(f, tmp_path, 8), f / "b.png", "cannot be read")


def test_a_broken_exif_tag_does_not_matter(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x010E] = 6, 1.5, "x"
    a = np.zeros((16, 16, 3), np.uint8)
    a[:8] = 255
    path = tmp_path / "f" / "a.jpg"
    path.parent.mkdir()
    Image.fromarray(np.rot90(a).copy()).save(path, exif=exif)
    b = path.read_bytes()
    for old, new in ((b"", b""), (b"\x01\x0e\x00\x02", b"\x01\x0e\xff\x02"), (b"MM\x00*", b"MM\xff*"),
                     (b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")):
        assert old in b
        path.write_bytes(b.replace(old, new))
        x = load(tmp_path / "f", tmp_path, 16).images[0, 0]
        assert {int(x[0, 0]) > 200, int(x[-1, -1]) > 200} == {True, False}


def deep(f, *pictures):
    for i, a in enumerate(pictures):
        save(f / f"{i}.tif", Image.fromarray(np.broadcast_to(a, (4, 4)).copy()))
    return f


@pytest.mark.parametrize("values, expected", [
    (np.float32([0, 0.5, 1]), [0, 128, 255]), (np.float32([-1, 0, 1]), [0, 128, 255]),
    (np.float32([0, 100.4, 255]), [0, 100, 255]), (np.uint16([0, 100, 255]), [0, 100, 255]),
    (np.uint16([16, 1600, 4095]), [1, 100, 255]), (np.uint16([256, 25600, 65535]), [1, 100, 255]),
    (np.int32([0, 100, 255]), [0, 100, 255]), (np.int32([0, 25600, 65535]), [0, 100, 255]),
    (np.uint16([4, 400, 1023]), [1, 100, 255])])
def test_values_beyond_8_bits_are_scaled_alike(tmp_path, values, expected):
    d = load(deep(tmp_path / "f", *values), tmp_path, 4)
    assert by_name(d)[:, 0, 0, 0].tolist() == expected and d.images.shape[1] == 1


@pytest.mark.parametrize("values, words", [
    (np.float32([0, 7]), ["from 0 to 7"]), (np.float32([-1, 2]), ["from -1 to 2"]),
    (np.float32([0, np.nan]), ["nan"]), (np.float32([0, 1000]), ["to 1000"]),
    (np.int32([-1, 255]), ["from -1"]),
    (np.int32([0, 65536]), ["0 to 65536"]), (np.uint8([0, 1]), ["from 0 to 1", "255"]),
    (np.uint16([0, 1]), ["from 0 to 1"])])
def test_values_that_are_unclear_are_refused(tmp_path, values, words):
    f = deep(tmp_path / "f", *values)
    one_line(lambda: load(f, tmp_path, 4), "f ", "expected", *words)


def test_black_arrays_and_thin_pictures_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", images=noise(4, 1, 4, 4) % 2)
    one_line(lambda: load(tmp_path / "a.npz"), "from 0 to 1", "by 255")
    np.savez(tmp_path / "a.npz", images=noise(4, 1, 1, 500))
    one_line(lambda: load(tmp_path / "a.npz", size=8), "500x1", "one flat colour")
    save(tmp_path / "f" / "a.png", noise(500, 1))
    one_line(lambda: load(tmp_path / "f", tmp_path, 8), "1x500", "one flat colour")


def test_a_folder_with_the_name_of_a_set_is_a_folder(tmp_path):
    for c in "ab":
        save(tmp_path / "faces" / "unpacked" / c / "0.png", noise(4, 4))
    np.savez(tmp_path / "mnist.npz", images=noise(3, 1, 4, 4), labels=[3, 7, 7])
    assert load(tmp_path / "faces", tmp_path, 4).classes == ["a", "b"]
    assert load(tmp_path / "mnist.npz").classes == ["3", "7"]


def test_folders_that_are_no_data_set(tmp_path):
    (tmp_path / "f").mkdir()
    one_line(lambda: load(tmp_path / "f", tmp_path, 4), tmp_path / "f", "no pictures", ".png")
    save(tmp_path / "f" / "a.png", noise(4, 4))
    save(tmp_path / "f" / "cat" / "b.png", noise(4, 4))
    one_line(lambda: load(tmp_path / "f", tmp_path, 4), "1 pictures beside 1 in sub-folders")


def loaded(path, tmp_path, capsys):
    """(Data, what was said of what was left out)."""
    capsys.readouterr()
    d = load(path, tmp_path, 4)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out")]
    return d, "\n".join(lines)


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes on Linux alone")
def test_names_of_any_bytes(tmp_path):
    f = os.fsdecode(os.fsencode(tmp_path) + b"/\xffset")
    for name in ("a\nb/1.png", "c/2.png"):
        save(Path(f) / name, noise(4, 4))
    d = load(f, tmp_path, 4)
    assert d.name == r"\udcffset" and d.classes == [r"a\nb", "c"] and len(d.images) == 2
    (Path(f) / "a\nb" / "1.png").write_bytes(b"")
    one_line(lambda: load(f, tmp_path, 4), r"a\nb/1.png")


def test_a_closed_console_does_not_end_preparing(tmp_path, pictures):
    code = "import sys; from common import data; print(len(data.load(sys.argv[1], sys.argv[2], 8).images))"
    with subprocess.Popen([sys.executable, "-c", code, pictures, tmp_path], cwd=REPO, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as p:
        p.stderr.close()
        assert p.stdout.read() == b"24\n" and p.wait() == 0


def test_folders_are_read_once(tmp_path, capsys):
    f = tmp_path / "f"
    for c in "ab":
        for i in range(3):
            save(f / c / f"{i}.png", noise(4, 4))
    away = save(tmp_path / "away" / "x.png", noise(4, 4))
    for link, to in (("a/loop", f), ("b/loop", f / "b"), ("a/up", tmp_path),
                     ("a/0 again.png", f / "a" / "0.png"), ("a/away.png", away), ("b/away.png", away),
                     ("a/self.png", "self.png"), ("b/gone.png", tmp_path / "gone.png"), ("c", away.parent),
                     ("0", f / "a")):
        (f / link).symlink_to(to)
    d, said = loaded(f, tmp_path, capsys)
    assert d.classes == ["a", "b", "c"]
    assert sorted(d.extra["files"]) == sorted([
        *(f"{c}/{i}.png" for c in "ab" for i in range(3)), "a/0 again.png", "a/away.png", "b/away.png",
        "c/x.png"])                                          # links to files are files, folders are read once
    assert "2 dangling links" in said and "links to what is read already" in said and "\n" not in said


def test_what_is_no_picture_is_counted(tmp_path, capsys, monkeypatch):
    f, scandir = tmp_path / "f", os.scandir
    for i in range(3):
        save(f / "cat" / f"{i}.png", noise(4, 4))
        (f / "cat" / f"{i}.heic").write_bytes(b"")
    (f / "cat" / "x.AVIF").write_bytes(b"")
    (f / "cat" / "README").write_bytes(b"")
    save(f / "dog" / "0.png", noise(4, 4))
    save(f / "secret" / "0.png", noise(4, 4))
    fifo = hasattr(os, "mkfifo")  # not on Windows
    if fifo:
        os.mkfifo(f / "cat" / "pipe.png")

    def refuse(at):
        if str(at).endswith("secret"):
            raise PermissionError
        return scandir(at)

    monkeypatch.setattr(os, "scandir", refuse)
    d, said = loaded(f, tmp_path, capsys)
    assert len(d.images) == 4 and d.classes == ["cat", "dog"]
    for words in ("3 .heic", "1 .avif", "1 files without an ending", *["1 pipes"] * fifo,
                  "1 folders that cannot be"):
        assert words in said
    assert "\n" not in said
    assert loaded(save(tmp_path / "g" / "0.png", noise(4, 4)).parent, tmp_path, capsys)[1] == ""


@pytest.mark.parametrize("names, labels, test_labels, classes", [
    ("train/cat/0 train/dog/1 test/cat/2 test/dog/3", {0: 0, 1: 1}, {2: 0, 3: 1}, ["cat", "dog"]),
    ("all/Train/cat/0 all/Train/dog/1 all/val/dog/3", {0: 0, 1: 1}, {3: 1}, ["cat", "dog"]),
    ("train/cat/0 train/dog/1 test/dog/3 val/cat/4", {0: 0, 1: 1}, {3: 1}, ["cat", "dog"]),
    ("training/cat/0 training/dog/1 test/cow/3", {0: 0, 1: 1}, {3: None}, ["cat", "dog"]),
    ("training_set/cat/0 training_set/dog/1 test_set/dog/2", {0: 0, 1: 1}, {2: 1}, ["cat", "dog"]),
    ("train/in/cat/0 train/in/dog/1 test/cat/2 test/dog/3", {0: 0, 1: 1}, {2: 0, 3: 1}, ["cat", "dog"]),
    ("train/cat/0 train/dog/1 val2017/images/cat/2 val2017/images/dog/3 m/4", {0: 0, 1: 1}, {2: 0, 3: 1},
     ["cat", "dog"]),
    ("cat/0 dog/1 __MACOSX/cat/2 @eaDir/3", {0: 0, 1: 1}, {}, ["cat", "dog"]),
    ("caf\u00e9/0 cafe\u0301/1 tea/2", {0: 0, 1: 0, 2: 1}, {}, ["caf\u00e9", "tea"]),
    ("train/0 train/1 test/2", {0: None, 1: None}, {2: None}, None),
    ("train/cat/0 train/dog/1 test/2", {0: 0, 1: 1}, {2: None}, ["cat", "dog"]),
    ("animals/cat/0 animals/dog/1", {0: 0, 1: 1}, {}, ["cat", "dog"]),
    ("x/y/train/cat/0 x/y/train/dog/1", {0: 0, 1: 1}, {}, ["cat", "dog"]),
    ("animals/0 animals/1", {0: None, 1: None}, {}, None),
    ("train/0 other/1", {0: 1, 1: 0}, {}, ["other", "train"])])
def test_layout_of_folders(tmp_path, names, labels, test_labels, classes):
    for name in names.split():
        save(tmp_path / "f" / f"{name}.png", np.full((4, 4), 60 * int(name[-1]), np.uint8))
    d = load(tmp_path / "f", tmp_path, 4)
    assert d.classes == (classes and sorted(classes))
    test = d.test_images, d.test_labels, d.extra.get("test_files"), test_labels
    for images, y, files, expected in ((d.images, d.labels, d.extra["files"], labels), test):
        if not expected:
            assert images is y is files is None
            continue
        numbers = [int(Path(f).stem) for f in files]
        assert images[:, 0, 0, 0].tolist() == [60 * i for i in numbers]
        found = {i: None if y is None else classes.index(d.classes[k])
                 for i, k in zip(numbers, [None] * len(files) if y is None else y.tolist())}
        assert found == expected


def test_parts_without_train_are_no_classes(tmp_path):
    for name in ("val/cat/0", "test/dog/1"):
        save(tmp_path / "f" / f"{name}.png", noise(4, 4))
    with pytest.raises(UserError, match="holds test and val, but no train: expected train and test"):
        load(tmp_path / "f", tmp_path, 4)


# ---- the cache -------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    for i in range(24):
        save(tmp_path / "f" / f"{i:02}.png", noise(8, 8, 3))
    return tmp_path / "f"


def test_cache_is_reused_until_the_pictures_change(tmp_path, pictures, monkeypatch):
    count, decode = itertools.count(), prepare.decode
    monkeypatch.setattr(prepare, "decode", lambda *a, **k: (next(count), decode(*a, **k))[1])
    first = load(pictures, tmp_path, 8)
    (made,) = cache_of(tmp_path)
    stamp = (made / "images.npy").stat().st_mtime_ns
    second = load(pictures, tmp_path, 8)
    assert next(count) == 24 and (made / "images.npy").stat().st_mtime_ns == stamp
    assert torch.equal(first.images, second.images) and first.extra == second.extra
    load(pictures, tmp_path, size=4)
    assert next(count) == 24 + 1 + 24  # another size is another cache
    save(pictures / "03.png", noise(8, 8, 3))
    assert not torch.equal(by_name(load(pictures, tmp_path, 8))[3], by_name(first)[3])
    assert next(count) == 24 + 1 + 24 + 1 + 24


def test_cache_is_mapped_and_read_only(tmp_path, pictures, recwarn):
    torch.set_warn_always(True)
    try:
        d = load(pictures, tmp_path, 8)
    finally:
        torch.set_warn_always(False)
    assert not recwarn.list
    if Path("/proc/self/maps").exists():
        (made,) = cache_of(tmp_path)
        lines = Path("/proc/self/maps").read_text().splitlines()
        (line,) = (x for x in lines if x.endswith(f"{made.name}/images.npy"))
        assert line.split()[1].startswith("r--")
    assert d.images.sum() > 0


@pytest.mark.parametrize("damage", ["short", "long", "garbage", "a pixel", "swapped", "no rest", "bad rest"])
def test_damaged_cache_is_named(tmp_path, pictures, damage, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 4)
    first = load(pictures, tmp_path, 8).images.clone()
    (made,) = cache_of(tmp_path)
    images, rest = made / "images.npy", made / "rest.pt"
    whole = images.read_bytes()
    if damage == "short":
        os.truncate(images, images.stat().st_size - 1)
    elif damage == "long":
        os.truncate(images, images.stat().st_size + 1)
    elif damage == "a pixel":
        images.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif damage == "swapped":
        images.write_bytes(whole[:128] + whole[128 + 4 * 192:128 + 8 * 192] + whole[128:128 + 4 * 192]
                           + whole[128 + 8 * 192:])
    elif damage == "garbage":
        images.write_bytes(bytes(images.stat().st_size))
    elif damage == "no rest":
        rest.unlink()
    else:
        rest.write_bytes(rest.read_bytes()[:100])
    one_line(lambda: load(pictures, tmp_path, 8), made, "damaged", "delete this folder")
    for file in made.iterdir():
        file.unlink()
    made.rmdir()
    assert torch.equal(load(pictures, tmp_path, 8).images, first)


def test_data_folder_that_cannot_be_written(tmp_path, pictures):
    (tmp_path / "file").write_text("in the way")
    one_line(lambda: load(pictures, tmp_path / "file", 8), "cannot be written", "--data-dir")


def test_failure_while_writing_leaves_nothing(tmp_path, pictures, monkeypatch):
    def full(*a):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.torch, "save", full)
    one_line(lambda: load(pictures, tmp_path, 8), "No space left on device", "--data-dir")
    assert cache_of(tmp_path) == []


SLOW = """
import sys, time
from common import data, prepare
decode = prepare.decode
def picture(*a, **k):
    sys.stdout.write("decoded\\n")  # print() of two threads may mix their lines
    sys.stdout.flush()
    time.sleep(float(sys.argv[3]))
    return decode(*a, **k)
prepare.decode, prepare.BLOCK = picture, 4
sys.stdin.readline()
print("sum", int(data.load(sys.argv[1], sys.argv[2], 8).images.sum()), flush=True)
"""


def test_killed_and_then_two_at_once(tmp_path, pictures, monkeypatch, request):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    doomed, peer = (
        subprocess.Popen(
            [sys.executable, "-c", SLOW, pictures, tmp_path, pause], cwd=REPO, text=True, **pipes
        )
        for pause in ("60", "0.1")
    )
    request.addfinalizer(lambda: (doomed.kill(), peer.kill()))
    doomed.stdin.write("go\n")
    doomed.stdin.flush()
    assert doomed.stdout.readline().startswith("decoded")
    doomed.kill()
    doomed.communicate()
    (half,) = cache_of(tmp_path)
    assert ".tmp" in half.name  # a set cut off never has the name of a whole one

    count, decode = [], prepare.decode
    monkeypatch.setattr(prepare, "BLOCK", 4)
    monkeypatch.setattr(prepare, "decode", lambda *a, **k: (count.append("decoded"), decode(*a, **k))[1])
    peer.stdin.write("go\n")
    peer.stdin.flush()
    mine = load(pictures, tmp_path, 8).images
    out, err = peer.communicate(timeout=60)
    assert peer.returncode == 0, err
    assert f"sum {int(mine.sum())}\n" in out
    for x, path in zip(mine, prepare.shuffled(sorted(pictures.iterdir()))):
        assert np.array_equal(x, np.asarray(Image.open(path)).transpose(2, 0, 1))
    (made,) = cache_of(tmp_path)  # nothing is left of what the killed one began
    assert made.name == half.name.split(".tmp")[0]
    if prepare.fcntl:
        assert len(count) + out.count("decoded") == 24  # one prepared, the other waited


@pytest.mark.parametrize("change, start", [
    ("nothing", 8), ("a pixel", 4), ("cut off", 4), ("more", 8), ("header", 8), ("rest", 8), ("torn mark", 4),
    ("wrong mark", 0), ("repeated marks", 8), ("no marks", 0), ("no images", 0), ("another list", 0),
    ("fewer", 0)])
def test_interrupted_preparation_goes_on(tmp_path, monkeypatch, change, start):
    """Whatever became of the part that is there: each block is kept that is as it was written."""
    monkeypatch.setattr(prepare, "BLOCK", 4)
    x, starts, files = noise(10, 3, 2, 2), [], ["a", "b"]

    def make(stop):
        def blocks(start):
            starts.append(start)
            for i in range(start, len(x), 4):
                if i == stop:
                    raise KeyboardInterrupt
                yield x[i:i + 4]
        return lambda: (x.shape, blocks, {"files": files})

    with pytest.raises(KeyboardInterrupt):
        prepare.cached(tmp_path / "set", make(8))
    (half,) = tmp_path.glob("set.tmp*")
    half = half.rename(tmp_path / "set.tmp0")  # of a process with another number
    images, marks = half / "images.npy", half / "checksums"
    a, m = images.read_bytes(), marks.read_bytes()
    assert len(a) == 128 + 8 * 12 and len(m) == 8
    if change == "a pixel":
        images.write_bytes(a[:-1] + bytes([a[-1] ^ 1]))
    elif change in ("cut off", "more"):
        images.write_bytes(a[:-1] if change == "cut off" else a + b"more")
    elif change == "header":
        images.write_bytes(b"?" + a[1:])
    elif change == "rest":
        (half / "rest.pt").write_bytes(b"?")
    elif change == "repeated marks":
        marks.write_bytes(m + m[-4:])
    elif change.endswith("mark"):
        marks.write_bytes(m[:-1] if change == "torn mark" else b"????" + m[4:])
    elif change.startswith("no "):
        (marks if change == "no marks" else images).unlink()
    elif change == "another list":
        files = ["a", "c"]
    elif change == "fewer":
        x = x[:9]
    found = prepare.cached(tmp_path / "set", make(None))
    assert starts == [0, start]
    assert np.array_equal(found["images"], x) and found["files"] == files
    assert {p.name for p in tmp_path.iterdir()} == {"set", "set.lock"}
    assert {p.name for p in (tmp_path / "set").iterdir()} == {"images.npy", "rest.pt", "checksums"}


def test_interrupted_folder_goes_on(tmp_path, pictures, monkeypatch, capsys):
    expected, decode = load(pictures, tmp_path / "reference", 8).images, prepare.decode
    count, seen = itertools.count(), []

    def picture(source, *a, **k):
        seen.append(Path(source).name)
        if next(count) == 10:
            raise KeyboardInterrupt
        return decode(source, *a, **k)

    monkeypatch.setattr(prepare, "BLOCK", 4)
    monkeypatch.setattr(prepare, "decode", picture)
    with pytest.raises(KeyboardInterrupt):
        load(pictures, tmp_path, 8)
    capsys.readouterr()
    seen.clear()
    assert torch.equal(load(pictures, tmp_path, 8).images, expected)
    assert sorted(seen) == sorted(f"{i:02}.png" for i in prepare.shuffled(range(24))[8:])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "preparing f: continuing at picture 9 of 24" and "24 of 24 pictures" in lines[-1]


def test_a_disk_too_small_is_told_at_once(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=4607))
    one_line(lambda: load(pictures, tmp_path, 8), "0.0 GB are needed", "--data-dir")
    assert cache_of(tmp_path) == []
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=4608))
    assert len(load(pictures, tmp_path, 8).images) == 24


def test_name_of_a_prepared_folder(tmp_path, pictures):
    """It must not change unless the pixels or their order do, so that what is prepared stays in use."""
    load(pictures, tmp_path, 8)
    files = sorted(pictures.iterdir())
    stats = [(f.name, [f.stat().st_size, f.stat().st_mtime_ns]) for f in files]
    text = "".join(map(json.dumps, [[2, str(pictures.resolve()), False], *stats]))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert [p.name for p in cache_of(tmp_path)] == [f"f-8xown-{digest}"]


def test_the_lock_of_windows(tmp_path, monkeypatch, capsys):
    """msvcrt's lock is one byte, and is refused while another process has it."""
    refusals = [PermissionError(13, "denied"), PermissionError(13, "denied"), None]

    def locking(number, mode, size):
        if error := refusals.pop(0):
            raise error

    monkeypatch.setattr(prepare, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    with prepare.locked(tmp_path / "set.lock"):
        assert not refusals and capsys.readouterr().err.count("waiting") == 1


def test_slower_of_two_without_locks(tmp_path, pictures, monkeypatch):
    """Where there are no file locks, a process that finds another's whole set at the end takes that."""
    decode, remove, rename, faster = prepare.decode, prepare.shutil.rmtree, Path.rename, []
    pid = os.getpid()

    def picture(*a, **k):
        if not faster:  # the other one starts and ends in the midst of this one
            faster.append(None)
            monkeypatch.setattr(prepare.os, "getpid", lambda: 1)
            faster[0] = load(pictures, tmp_path, 8).images
        return decode(*a, **k)

    def rmtree(path, **kw):  # as on Windows: nothing that is open goes away or gets another name
        if path.name.endswith(".tmp1"):
            remove(path, **kw)

    def renamed(path, to):
        if path.name.endswith(f".tmp{pid}") and ".tmp" in to.name:
            raise PermissionError
        return rename(path, to)

    windows = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *a: (_ for _ in ()).throw(OSError))
    monkeypatch.setitem(sys.modules, "msvcrt", windows)
    monkeypatch.setattr(prepare, "fcntl", None)
    monkeypatch.setattr(prepare, "decode", picture)
    monkeypatch.setattr(prepare.shutil, "rmtree", rmtree)
    monkeypatch.setattr(data.Path, "rename", renamed)
    assert torch.equal(load(pictures, tmp_path, 8).images, faster[0])


# ---- .npz ------------------------------------------------------------------------------------------------


def test_npz(tmp_path, monkeypatch):
    images, factors, order = noise(6, 3, 4, 4), RNG.normal(size=(6, 2)), prepare.shuffled(range(6))
    np.savez_compressed(
        tmp_path / "s.npz",
        images=images,
        labels=np.arange(5, -1, -1, dtype=np.uint8),
        test_images=images[:2],
        test_labels=np.array([1, 0], np.int32),
        classes=np.array(list("uvwxyz")),
        factors=factors,
        factor_names=np.array(["a", "b"]),
        age=np.arange(6, dtype=np.int16),
        old=np.arange(6) > 2,
    )
    read, kind = [], np.lib.npyio.NpzFile
    get = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda z, key: (read.append(key), get(z, key))[1])
    d = load(tmp_path / "s.npz", tmp_path)
    assert sorted(read) == sorted(set(read)) and len(read) == 9  # nothing is decompressed twice
    assert d.name == "s" and np.array_equal(d.images, images[order])
    assert np.array_equal(d.test_images, images[:2])
    assert d.labels.dtype == d.test_labels.dtype == torch.int64
    assert d.labels.tolist() == [5 - i for i in order]
    assert d.test_labels.tolist() == [1, 0] and d.classes == list("uvwxyz")
    assert set(d.extra) == {"factors", "factor_names", "age", "old"} and d.extra["factor_names"] == ["a", "b"]
    assert d.extra["factors"].dtype == torch.float32 and np.allclose(d.extra["factors"], factors[order])
    assert d.extra["age"].dtype == torch.int64 and d.extra["old"].dtype == torch.bool


@pytest.mark.parametrize("labels", [None, np.arange(12) // 4, np.array([2, 0, 1]).repeat(4),
                                    np.array([2, 1, 0]).repeat(4)])
def test_an_npz_is_shuffled_whatever_its_order(tmp_path, labels):
    i, more = np.arange(12, dtype=np.uint8), {} if labels is None else {"labels": labels}
    np.savez(tmp_path / "s.npz", images=np.tile(20 * i[:, None, None, None], (1, 1, 2, 2)), age=i,
             captions=i.astype(str), tag_names=i.astype(str), test_labels=i // 4,
             test_images=np.tile(20 * i[:, None, None, None], (1, 1, 2, 2)), **more)
    d = load(tmp_path / "s.npz", tmp_path)
    order = (d.images[:, 0, 0, 0] // 20).tolist()
    assert sorted(order) == i.tolist() != order and d.extra["age"].tolist() == order
    if labels is not None:
        assert d.labels.tolist() == labels[order].tolist() and set(d.labels[6:].tolist()) == {0, 1, 2}
    assert d.extra["captions"] == [str(k) for k in order]
    assert d.extra["tag_names"] == [str(k) for k in i]
    order = (d.test_images[:, 0, 0, 0] // 20).tolist()  # figures may take the first
    assert sorted(order) == i.tolist() != order
    if labels is not None:
        assert d.test_labels.tolist() == (i[order] // 4).tolist()
    assert torch.equal(load(tmp_path / "s.npz").images, d.images)


@pytest.mark.parametrize("labels, names, found, classes", [
    ([3, 1, 10, 3], None, [1, 0, 2, 1], ["1", "3", "10"]),
    ([0, 2, 1, 0], None, [0, 2, 1, 0], None),
    ([9000, 0, -1, 1000], None, [2, 0, -1, 1], ["0", "1000", "9000"]),
    ([3, 1, 3, 1], list("abcde"), [1, 0, 1, 0], ["b", "d"]),
    ([1, 2, 3, 3], list("xyz"), [0, 1, 2, 2], list("xyz")),
    ([-1, -1, -1, -1], None, None, None),
    ([True, False, True, True], ["no", "yes"], [1, 0, 1, 1], ["no", "yes"])])
def test_labels_that_occur_are_numbered_without_gaps(tmp_path, labels, names, found, classes):
    order, more = prepare.shuffled(range(4)), {} if names is None else {"classes": names}
    np.savez(tmp_path / "a.npz", images=noise(4, 1, 2, 2), labels=labels, **more)
    d = load(tmp_path / "a.npz")
    assert (d.labels if found is None else d.labels.tolist()) == (found and [found[i] for i in order])
    assert d.classes == classes


def test_a_label_of_the_test_part_alone(tmp_path, capsys):
    x = noise(3, 1, 2, 2)
    np.savez(tmp_path / "a.npz", images=x, labels=[5, 5, 9], test_images=x, test_labels=[9, 7, 5])
    assert load(tmp_path / "a.npz").test_labels is None  # no network could name a 7
    assert capsys.readouterr().err.count("test_labels are left out, as 1 of 3") == 1
    np.savez(tmp_path / "a.npz", images=x, labels=[5, 5, 9], test_images=x, test_labels=[9, 7, 5],
             captions=list("abc"))
    d = load(tmp_path / "a.npz")  # unless it learns from sentences
    assert sorted(d.labels.tolist()) == [0, 0, 1] and sorted(d.test_labels.tolist()) == [0, 1, 2]
    assert d.classes == ["5", "9", "7"]


def test_other_arrays_of_an_npz(tmp_path):
    x = noise(4, 1, 2, 2)
    np.savez(tmp_path / "a.npz", images=x, test_images=x, attributes=np.eye(4)[:, :2],
             factors=np.ones((4, 1)), captions=np.array([["à".encode(), b""]] * 4),
             test_from=np.arange(4))
    d = load(tmp_path / "a.npz")
    assert d.extra["attribute_names"] == ["attribute1", "attribute2"]
    assert d.extra["factor_names"] == ["factor1"] and d.extra["captions"] == [["à", ""]] * 4
    assert len(d.images) == len(d.test_images) == 4 and len(d.extra["test_from"]) == 4


OK = np.zeros((4, 3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"x": OK, "y": OK}, ["holds x, y", "expected an array images"]),
        ({"images": OK.astype(np.float32)},
         ["float32 (4, 3, 8, 8)", "expected uint8", '* 255).round().astype("uint8")']),
        ({"images": OK.astype(np.int64) + 300}, ["int64", "expected uint8", "0 to 255"]),
        (
            {"images": OK.transpose(0, 2, 3, 1)},
            ["(4, 8, 8, 3)", "images.transpose(0, 3,"],
        ),
        ({"images": OK[:, 0]}, ["(4, 8, 8)", "(N, C, H, W)"]),
        ({"images": OK[:, :2]}, ["(4, 2, 8, 8)", "C = 1 or 3"]),
        ({"images": OK[:0]}, ["(0, 3, 8, 8)", "N > 0"]),
        ({"images": OK, "labels": np.arange(3)}, ["labels has 3 rows for 4 pictures"]),
        ({"images": OK, "labels": np.arange(0)}, ["labels has 0 rows for 4 pictures"]),
        ({"images": OK, "labels": np.array([0, 1, -5, 1])}, ["a label -5", "-1 for no label"]),
        ({"images": OK, "labels": np.arange(4), "classes": ["a", "b"]}, ["2 classes for labels up to 3"]),
        ({"images": OK[:, :, :1, :1].repeat(300, 0), "labels": np.arange(1200)},
         ["1,200 different labels for 1,200 pictures", "classes"]),
        ({"images": OK, "labels": np.zeros(4)},
         ["labels is float64 (4,)", "integers (N,), one per picture"]),
        ({"images": OK, "captions": np.zeros((4, 0), str)}, ["captions is <U1 (4, 0)"]),
        ({"images": OK, "factors": np.zeros((4, 0))}, ["factors is float64 (4, 0)"]),
        ({"images": OK, "factors": np.full((4, 1), 1e300)}, ["none of them NaN or infinite"]),
        ({"images": OK, "factors": np.zeros((4, 2)), "factor_names": ["a", "a"]}, ["all different"]),
        ({"images": OK, "labels": np.eye(4, dtype=int)},
         ["labels is int64 (4, 4)", "integers (N,)"]),
        ({"images": OK, "labels": list("abca")},
         ["labels is <U1", "np.unique(labels, return_inverse=True)[1]"]),
        ({"images": OK, "captions": np.arange(4)}, ["captions is int64 (4,)", "strings (N,) or (N, k)"]),
        ({"images": OK, "captions": ["a"] * 3}, ["captions has 3 rows for 4 pictures"]),
        ({"images": OK, "captions": np.array([["a"], ["a", "b"]] * 2, object)}, ["captions", "padded with"]),
        ({"images": OK, "factors": np.zeros((3, 2))}, ["factors has 3 rows for 4 pictures"]),
        ({"images": OK, "factors": np.full((4, 2), np.nan)}, ["factors is float64 (4, 2)", "NaN"]),
        ({"images": OK, "factors": np.zeros((4, 2)), "factor_names": ["a"]},
         ["1 factor_names for 2 columns"]),
        ({"images": OK, "factors": np.zeros((4, 1)), "factor_names": np.array("a")}, ["factor_names", "()"]),
        ({"images": OK, "attributes": np.zeros(4)}, ["attributes is float64 (4,)", "numbers (N, A)"]),
        ({"images": OK, "attributes": ["a"] * 4}, ["attributes is <U1", "numbers (N, A)"]),
        ({"images": OK, "attributes": np.zeros((4, 1)), "attribute_names": [3]},
         ["names is int64", "strings"]),
        ({"images": OK, "tags": np.zeros((4, 2)), "words": [["a", "b"]]}, ["words is <U1 (1, 2)", "strings"]),
        ({"images": OK, "tags": np.zeros((4, 2)), "words": list("abc")}, ["3 words for 2 columns of tags"]),
        ({"images": OK, "test_images": OK, "factors": np.zeros((4, 2)), "test_factors": np.zeros((4, 3))},
         ["factors are (2,) and test_factors (3,)"]),
        ({"images": OK, "classes": [1, 2]}, ["classes is int64 (2,)", "strings"]),
        ({"images": OK, "scale": np.array(3.0)}, ["scale is float64 ()", "one row or more"]),
        ({"images": np.array(3)}, ["images is int64 ()", "one row or more"]),
        (
            {"images": OK, "test_images": OK[:2], "test_labels": np.arange(4)},
            ["test_labels has 4 rows for 2 pictures"],
        ),
        ({"images": OK, "test_labels": np.arange(4)}, ["test_labels has 4 rows for 0 pictures"]),
        ({"images": OK, "test_images": OK[..., :4]}, ["(3, 8, 8)", "(3, 8, 4)"]),
        (
            {"images": OK, "test_images": OK.transpose(0, 2, 3, 1)},
            ["test_images is", "test_images.transpose"],
        ),
        ({"images": OK, "words": np.array([{}], object)}, ["words", "object"]),
        (
            {"images": OK, "when": np.array(["2000-01-01"], "M8[D]")},
            ["when is datetime64", "numbers or strings"],
        ),
    ],
)
def test_bad_npz(tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    one_line(lambda: load(tmp_path / "bad.npz", tmp_path), tmp_path / "bad.npz", *words)


@pytest.mark.parametrize("key", ["images", "test_images"])
def test_values_of_0_and_1_in_bytes(tmp_path, key):
    np.savez(tmp_path / "a.npz", **({"images": noise(4, 1, 8, 8), "test_images": noise(4, 1, 8, 8)}
                                    | {key: noise(4, 1, 8, 8) // 128}))
    one_line(lambda: load(tmp_path / "a.npz", tmp_path), f"{key.replace('_', ' ')} with values from 0 to 1",
             "by 255")


def test_damaged_npz(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, images=noise(4, 3, 8, 8))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    one_line(lambda: load(path, tmp_path), path, "cut off")
    path.write_bytes(whole[:500] + bytes([whole[500] ^ 1]) + whole[501:])
    one_line(lambda: load(path, tmp_path), path, "images", "CRC")
    path.write_bytes(b"")
    one_line(lambda: load(path, tmp_path), path, "cut off")
    with zipfile.ZipFile(path, "w"):
        pass
    one_line(lambda: load(path, tmp_path), path, "holds nothing")


# ---- rendered and torchvision sets, in tiny --------------------------------------------------------------


def test_faces_are_rendered_once(tmp_path, monkeypatch):
    calls = []

    def faces(n=20000, size=64, channels=3, seed=0, plain=False):
        calls.append((size, channels, plain))
        return {
            "images": torch.from_numpy(noise(5, channels, size, size)),
            "factors": torch.zeros(5, 2),
            "factor_names": ["azimuth", "width"],
            "attributes": torch.ones(5, 1),
            "attribute_names": ["hat"],
        }

    (tmp_path / "render.py").write_text("1")
    render = types.SimpleNamespace(faces=faces, SHAPES=None, SCENES=None,
                                   __file__=str(tmp_path / "render.py"))
    monkeypatch.setitem(sys.modules, "common.render", render)
    monkeypatch.setattr(common, "render", render, raising=False)
    d, again, grey = load("faces", tmp_path), load("faces", tmp_path), load("faces", tmp_path, 16, 1)
    assert calls == [(64, 3, False), (16, 1, True)]
    assert d.images.shape == (5, 3, 64, 64) and torch.equal(d.images, again.images)
    assert grey.images.shape == (5, 1, 16, 16)
    assert d.extra["factor_names"] == ["azimuth", "width"] and d.extra["attributes"].shape == (5, 1)
    (tmp_path / "render.py").write_text("2")
    load("faces", tmp_path)
    assert len(calls) == 3  # a changed renderer draws anew


def test_shapes_are_rendered_once_with_their_test_part(tmp_path, monkeypatch):
    from common import render

    sizes, captioned = [], render.captioned
    monkeypatch.setattr(render, "SHAPES", replace(render.SHAPES, pictures=10))
    monkeypatch.setattr(render, "captioned", lambda *words: sizes.append(words[2]) or captioned(*words))
    d, grey = load("shapes", tmp_path, 16), load("shapes", tmp_path, 16, 1)
    assert sizes == [16] and d.images.shape == (10, 3, 16, 16) and d.test_images.shape == (2, 3, 16, 16)
    assert grey.images.shape == (10, 1, 16, 16) and d.labels is None
    few = render.shapes(10, 16)
    assert torch.equal(d.images, few["images"]) and torch.equal(d.test_images, few["test_images"])
    assert set(d.extra) == set(few) - {"images", "test_images"}
    assert d.extra["captions"] == few["captions"] and d.extra["test_captions"] == few["test_captions"]
    assert torch.equal(d.extra["attributes"], few["attributes"]) and d.extra["style"].dtype == torch.float32
    assert d.extra["attribute_values"] == few["attribute_values"]


# ---- birds and flowers: captions in text_c10 ---------------------------------------------------------------


@pytest.fixture
def birds(tmp_path):
    """Four classes of three pictures, the i-th of a class with i captions."""
    for c in ("001.Auk", "002.Bee", "003.Crow", "004.Duck"):
        for i in (1, 2, 3):
            picture = np.full((20, 30, 3), 60 * i, np.uint8)
            save(tmp_path / "birds" / "images" / c / f"{c[4:]}_{i}.jpg", picture)
            text = tmp_path / "birds" / "text_c10" / c / f"{c[4:]}_{i}.txt"
            text.parent.mkdir(parents=True, exist_ok=True)
            text.write_text("".join(f"{c[4:]} {i} said {k} \n\n" for k in range(i)))
    return tmp_path / "birds"


def test_birds_hold_out_the_last_quarter_of_classes(tmp_path, birds):
    d = load(birds, tmp_path, size=8)
    assert d.name == "birds" and d.classes == ["001.Auk", "002.Bee", "003.Crow", "004.Duck"]
    assert d.images.shape == (9, 3, 8, 8) and d.test_images.shape == (3, 3, 8, 8)
    assert sorted(d.labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2] and d.test_labels.tolist() == [3, 3, 3]
    numbers = torch.tensor([int(f[-5]) for f in d.extra["files"]])
    assert (d.images[:, 0, 0, 0].int() - 60 * numbers).abs().max() <= 2
    said = d.extra["captions"][d.extra["files"].index("001.Auk/Auk_2.jpg")]
    assert said == ["Auk 2 said 0", "Auk 2 said 1"]
    assert d.extra["test_captions"][d.extra["test_files"].index("004.Duck/Duck_1.jpg")] == ["Duck 1 said 0"]


@pytest.mark.parametrize("file, lines, held", [
    ("testclasses.txt", ["002.Bee", "099.Not_here"], [1]), ("testids.txt", ["1", "4"], [0, 3]),
    ("trainvalclasses.txt", ["001.Auk", "002.Bee", "003.Crow", "004.Duck"], []),
    ("trainvalids.txt", ["2", "3", "4"], [0])])
def test_lists_of_classes_decide_the_split(tmp_path, birds, file, lines, held):
    (birds / file).write_text("\n".join(lines) + "\n")
    d = load(birds, tmp_path, size=8)
    names = sorted(p.name for p in (birds / "text_c10").iterdir())
    assert {d.classes[k] for k in d.labels} == {names[i] for i in range(4) if i not in held}
    assert d.labels.max() == 3 - len(held)  # no number of a class that is held out is left between them
    if held:
        assert {d.classes[k] for k in d.test_labels} == {names[i] for i in held}
    else:
        assert d.test_images is None and "test_captions" not in d.extra


def test_flowers_layout(tmp_path):
    for i, c in ((1, "class_00002"), (2, "class_00001"), (3, "class_00002")):
        save(tmp_path / "flowers" / "jpg" / f"image_{i:05}.jpg", np.full((20, 30, 3), 60 * i, np.uint8))
        text = tmp_path / "flowers" / "text_c10" / c / f"image_{i:05}.txt"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(f"flower {i}\n")
    d = load(tmp_path / "flowers", tmp_path, size=8)
    assert dict(zip(d.extra["files"], d.labels.tolist())) == {
        "image_00001.jpg": 1, "image_00002.jpg": 0, "image_00003.jpg": 1}
    assert d.extra["captions"] == [[f"flower {f[10]}"] for f in d.extra["files"]]


def test_texts_are_read_as_utf_8(tmp_path, birds):
    """Whatever the system's encoding, with a byte order mark or without."""
    for text in (birds / "text_c10").glob("*/*.txt"):
        text.write_bytes("\ufeffein Vögelchen\r\n".encode())
    (birds / "testclasses.txt").write_bytes("\ufeff001.Auk\n".encode())
    code = ("import sys; from common import data; d = data.load(sys.argv[1], sys.argv[2], 8); "
            "print(ascii(d.extra['captions'][0]), len(d.extra['captions']), len(d.test_images))")
    r = subprocess.run([sys.executable, "-c", code, birds, tmp_path], cwd=REPO, text=True,
                       capture_output=True, check=False,
                       env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert r.stdout == r"['ein V\xf6gelchen'] 9 3" + "\n", r.stderr
    (birds / "testclasses.txt").write_bytes(b"\xff")
    one_line(lambda: load(birds, tmp_path, size=8), "testclasses.txt cannot be read", "UTF-8")


def test_bad_captions_are_named(tmp_path, birds):
    text = birds / "text_c10" / "002.Bee" / "Bee_2.txt"
    text.write_text("\n")
    one_line(lambda: load(birds, tmp_path, size=8), text, "empty")
    text.write_bytes(b"\xff\xfe")
    one_line(lambda: load(birds, tmp_path, size=8), text, "cannot be read")
    text.unlink()
    one_line(lambda: load(birds, tmp_path, size=8), "Bee_2.jpg", "no captions", "text_c10/CLASS/Bee_2.txt")
    text.write_text("a bee\n")
    (birds / "testids.txt").write_text("Horse\n")
    one_line(lambda: load(birds, tmp_path, size=8), "testids.txt names none of the 4 classes", "001.Auk or 1")
    (birds / "testids.txt").write_text("1 2 3 4")
    one_line(lambda: load(birds, tmp_path, size=8), "all of its 4 classes")
    (birds / "text_c10" / "001.Auk" / "Bee_2.txt").write_text("an auk\n")
    one_line(lambda: load(birds, tmp_path, size=8), "Bee_2.txt in two classes")
    (birds / "text_c10" / "001.Auk" / "Bee_2.txt").unlink()
    (birds / "images").rename(birds / "pictures")
    one_line(lambda: load(birds, tmp_path, size=8), "no images/ or jpg/")


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder, x = tmp_path / "cifar-10-batches-py", noise(6, 3, 32, 32)
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        (folder / name).write_bytes(pickle.dumps({"data": x[i].reshape(1, -1), "labels": [i]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    listed = [[name, md5(folder / name)] for name in names]
    monkeypatch.setattr(CIFAR10, "train_list", listed[:5])
    monkeypatch.setattr(CIFAR10, "test_list", listed[5:])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    d = load("cifar10", tmp_path, download=False)
    assert np.array_equal(d.images, x[:5]) and np.array_equal(d.test_images, x[5:])
    assert d.labels.tolist() == [0, 1, 2, 3, 4] and d.test_labels.tolist() == [5]
    assert d.classes == list("abcdefghij")
    assert load("cifar10", tmp_path, size=16, channels=1, download=False).images.shape == (5, 1, 16, 16)
    monkeypatch.setattr(CIFAR10, "tgz_md5", "of another archive")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as t:
        t.add(folder, folder.name)
        t.add(folder / "batches.meta", f"{folder.name}/../../escaped")
    folder.rename(tmp_path / "away")
    assert len(load("cifar10", tmp_path).images) == 5       # its files are checked, not the archive
    assert not (tmp_path.parent / "escaped").exists()
    (folder / "data_batch_3").write_bytes(b"other")
    one_line(lambda: load("cifar10", tmp_path, download=False), "corrupted", "cifar-10-python.tar.gz")


@pytest.mark.parametrize("kind", ["gz", "plain", "short", "header", "labels"])
def test_ubyte_files_are_checked_by_their_content(tmp_path, kind):
    """As a distribution packs them: other archives, the same contents."""
    raw = tmp_path / "KMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, n in (("train", 3), ("t10k", 2)):
        x = np.array([0x803, n, 28, 28], ">i4").tobytes() + noise(n, 28, 28).tobytes()
        y = np.array([0x801, n], ">i4").tobytes() + bytes(range(n))
        x, y = {"short": (x[:-1], y), "header": (b"<" + x[1:], y),
                "labels": (x, np.array([0x801, 1], ">i4").tobytes() + b"1")}.get(kind, (x, y))
        for file, b in (("images-idx3-ubyte", x), ("labels-idx1-ubyte", y)):
            if kind == "plain":
                (raw / f"{part}-{file}").write_bytes(b)
            else:
                (raw / f"{part}-{file}.gz").write_bytes(gzip.compress(b, 1))
    if kind in ("gz", "plain"):
        d = load("kmnist", tmp_path)
        assert d.images.shape == (3, 1, 28, 28) and d.test_labels.tolist() == [0, 1] and d.classes[0] == "o"
    else:
        one_line(lambda: load("kmnist", tmp_path), "kmnist is not there", "KMNIST/raw")


def test_mnist_unpacked(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in data.MNIST:
        (raw / file).write_bytes(gzip.decompress((REPO / "data/MNIST/raw" / f"{file}.gz").read_bytes()))
    assert load("mnist", tmp_path).labels[:3].tolist() == [5, 0, 4]


def test_fashion_mnist(tmp_path):
    raw, x = tmp_path / "FashionMNIST" / "raw", noise(5, 28, 28)
    raw.mkdir(parents=True)
    for part, a in (("train", x[:3]), ("t10k", x[3:])):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(
            np.array([0x803, len(a), 28, 28], ">i4").tobytes() + a.tobytes()
        )
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, len(a)], ">i4").tobytes() + bytes(range(len(a)))
        )
    d = load("fashion-mnist", tmp_path, download=False)
    assert np.array_equal(d.images[:, 0], x[:3]) and np.array_equal(d.test_images[:, 0], x[3:])
    assert d.labels.tolist() == [0, 1, 2] and d.labels.dtype == torch.int64 and d.classes[9] == "Ankle boot"


def test_svhn(tmp_path, monkeypatch):
    io = importlib.import_module("scipy.io")
    from torchvision.datasets import SVHN

    x = noise(3, 3, 32, 32)
    for part, a in (("train", x[:2]), ("test", x[2:])):
        file = tmp_path / f"{part}_32x32.mat"
        io.savemat(file, {"X": a.transpose(2, 3, 1, 0), "y": np.array([[10], [7]][: len(a)], np.uint8)})
        monkeypatch.setitem(SVHN.split_list, part, ["", file.name, md5(file)])
    d = load("svhn", tmp_path, download=False)
    assert np.array_equal(d.images, x[:2]) and np.array_equal(d.test_images, x[2:])
    assert d.labels.tolist() == [0, 7] and d.classes == list("0123456789")


def test_celeba(tmp_path, monkeypatch):
    from torchvision.datasets import CelebA

    folder = tmp_path / "celeba"
    names, face = [f"{i:06}.jpg" for i in range(1, 6)], np.zeros((218, 178, 3), np.uint8)
    face[40:188, 15:163] = 200
    for name in names:
        save(folder / "img_align_celeba" / name, face)
    rows = {
        "list_eval_partition.txt": "02102",
        "identity_CelebA.txt": "12345",
        "list_bbox_celeba.txt": "12345",
        "list_landmarks_align_celeba.txt": "12345",
        "list_attr_celeba.txt": ["-1  1", " 1 -1", "-1 -1", " 1  1", "-1 -1"],
    }
    for file, values in rows.items():
        top = {
            "list_attr_celeba.txt": "5\nBald Smiling \n",
            "list_bbox_celeba.txt": "5\nx\n",
            "list_landmarks_align_celeba.txt": "5\nx\n",
        }.get(file, "")
        (folder / file).write_text(top + "".join(f"{n} {v}\n" for n, v in zip(names, values)))
    monkeypatch.setattr(CelebA, "file_list", [("", None, file) for file in rows])
    d = load("celeba", tmp_path, size=64, download=False)
    assert d.images.shape == (2, 3, 64, 64) and d.test_images.shape == (2, 3, 64, 64) and d.labels is None
    assert (d.images.int() - 200).abs().max() <= 6  # the box that holds the face, nothing around it
    assert d.extra["attribute_names"] == ["Bald", "Smiling"]
    assert d.extra["attributes"].tolist() == [[0, 1], [1, 1]]
    assert d.extra["test_attributes"].tolist() == [[1, 0], [0, 0]]
    (folder / "list_attr_celeba.txt").unlink()
    load("celeba", tmp_path, size=64, download=False)  # once prepared, it needs its sources no more
    one_line(lambda: load("celeba", tmp_path, size=32, download=False), "not found", "img_align_celeba")


def test_stl10(tmp_path, monkeypatch):
    from torchvision.datasets import STL10

    folder, x = tmp_path / "stl10_binary", noise(7, 3, 96, 96)
    folder.mkdir()
    for part, a in (("train", x[:2]), ("unlabeled", x[2:5]), ("test", x[5:])):
        (folder / f"{part}_X.bin").write_bytes(a.swapaxes(2, 3).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes([3, 1]))
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    for name, files in (
        ("train_list", ("train_X.bin", "train_y.bin", "unlabeled_X.bin")),
        ("test_list", ("test_X.bin", "test_y.bin")),
    ):
        monkeypatch.setattr(STL10, name, [[f, md5(folder / f)] for f in files])
    d = load("stl10", tmp_path, 96, download=False)
    order = prepare.shuffled(range(5))                         # labelled and unlabelled ones mixed
    assert np.array_equal(d.images, x[order]) and np.array_equal(d.test_images, x[5:])
    assert d.labels.tolist() == [[2, 0, -1, -1, -1][i] for i in order] and d.test_labels.tolist() == [2, 0]
    assert d.classes == ["airplane", "bird", "car"]
    assert load("stl10", tmp_path, 48).images.shape == (5, 3, 48, 48)


def test_coco(tmp_path):
    for i in (7, 3):
        save(tmp_path / "coco" / "train2014" / f"{i}.jpg", np.full((30, 20, 3), 10 * i, np.uint8))
    (tmp_path / "coco" / "annotations").mkdir()
    said = [{"image_id": i, "caption": f"{word} {i} \n"} for word in ("a", "the") for i in (3, 7)]
    (tmp_path / "coco" / "annotations" / "captions_train2014.json").write_text(
        json.dumps({"images": [{"id": i, "file_name": f"{i}.jpg"} for i in (7, 3)], "annotations": said})
    )
    d = load("coco", tmp_path, size=8)
    assert d.images.shape == (2, 3, 8, 8) and d.images[:, 0, 0, 0].tolist() == [30, 70]
    assert d.extra["captions"] == [["a 3", "the 3"], ["a 7", "the 7"]]
    assert d.extra["files"] == ["3.jpg", "7.jpg"]


def test_flowers102(tmp_path, monkeypatch):
    io = importlib.import_module("scipy.io")
    from torchvision.datasets import Flowers102

    folder = tmp_path / "flowers-102"
    for i in (1, 2, 3):
        save(folder / "jpg" / f"image_{i:05}.jpg", np.full((20, 30, 3), 50 * i, np.uint8))
    io.savemat(folder / "imagelabels.mat", {"labels": np.array([[9, 1, 5]], np.uint8)})
    io.savemat(folder / "setid.mat", {"trnid": [[3, 3]], "valid": [[1, 1]], "tstid": [[2, 2]]})
    listed = {"label": "imagelabels.mat", "setid": "setid.mat"}
    monkeypatch.setattr(Flowers102, "_file_dict", {k: (f, md5(folder / f)) for k, f in listed.items()})
    d = load("flowers102", tmp_path, size=8, download=False)
    rows = sorted(zip(d.images[:, 0, 0, 0].tolist(), d.labels.tolist(), d.extra["files"]))
    assert rows[::2] == rows[1::2] == [(50, 8, "image_00001.jpg"), (100, 0, "image_00002.jpg"),
                                       (150, 4, "image_00003.jpg")]


def test_lfw(tmp_path):
    folder = tmp_path / "lfw-py"
    for i, person in enumerate(("Bo", "Al", "Al")):
        file = folder / "lfw_funneled" / person / f"{person}_{max(i, 1):04}.jpg"
        save(file, np.full((250, 250, 3), 60 * i, np.uint8))
    (folder / "lfw-names.txt").write_text("Al\t2\nBo\t1\n")
    (folder / "people.txt").write_text("2\n1\nBo\t1\n1\nAl\t2\n")
    d = load("lfw", tmp_path, 150)
    assert d.images.shape == (3, 3, 150, 150) and d.images[:, 0, 0, 0].tolist() == [120, 0, 60]
    assert d.labels.tolist() == [0, 1, 0] and d.classes == ["Al", "Bo"]


def test_imagenet(tmp_path):
    for i, wnid in enumerate(("n02", "n01")):
        save(tmp_path / "imagenet" / "train" / wnid / "x.JPEG", Image.new("RGB", (30, 20), (100 * i,) * 3))
    names = {"n01": ("tench", "Tinca tinca"), "n02": ("goldfish",)}
    torch.save((names, []), tmp_path / "imagenet" / "meta.bin")
    d = load("imagenet", tmp_path, size=8, channels=1)
    assert d.images[:, 0, 0, 0].tolist() == [100, 0] and d.labels.tolist() == [0, 1]
    assert d.classes == ["tench, Tinca tinca", "goldfish"]


def test_lsun(tmp_path):
    lmdb = importlib.import_module("lmdb")
    (tmp_path / "lsun").mkdir()
    with lmdb.open(str(tmp_path / "lsun" / "bedroom_train_lmdb")) as env, env.begin(write=True) as txn:
        for i in range(3):
            txn.put(b"%d" % i, save(tmp_path / "x.webp", np.full((20, 30, 3), 50 * i, np.uint8)).read_bytes())
    d = load("lsun", tmp_path, size=8)
    assert (d.images[:, 0, 4, 4] - torch.tensor([0, 50, 100])).abs().max() <= 3 and len(d.images) == 3
    sources, n, _ = data.listed("lsun", tmp_path, False)
    ((name, file),) = sources(2)
    assert n == 3 and name.endswith(": 2") and abs(np.asarray(Image.open(file)).mean() - 100) <= 3


@pytest.mark.parametrize("name", [name for name in data.PLACE if name != "lsun"])
def test_set_that_is_not_there(tmp_path, name):
    if name == "imagenet":
        importlib.import_module("scipy")  # without it the one line is about that
    one_line(lambda: load(name, tmp_path, size=8, download=False), f"{name} is", data.PLACE[name], tmp_path)
    assert cache_of(tmp_path) == []


def test_download_that_fails(tmp_path, monkeypatch):
    from urllib.error import URLError

    from torchvision.datasets import mnist

    def offline(*a, **k):
        raise URLError("Temporary failure\nin name resolution")

    monkeypatch.setattr(mnist, "download_and_extract_archive", offline)
    one_line(lambda: load("kmnist", tmp_path), "kmnist is not", "Temporary failure in name", "KMNIST/raw")


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    one_line(lambda: load("lsun", tmp_path, size=64), "lsun needs the package lmdb: pip install lmdb")


# ---- pictures turned, stretched and moved ------------------------------------------------------------------


def test_warp_moves_turns_and_leaves_a_share():
    torch.manual_seed(0)
    n, at = 4000, (torch.arange(57) - 28) / 28.5                    # centres of the pixels in [-1, 1]
    dot = torch.exp(-0.5 * (at[:, None] ** 2 + at ** 2) / 0.05 ** 2).expand(n, 1, 57, 57)
    y = data.warp(dot)[:, 0]
    place = torch.stack([(y * at).sum((1, 2)), (y * at[:, None]).sum((1, 2))], 1) / y.sum((1, 2))[:, None]
    still = (place.abs() < 1e-4).all(1)
    assert still.double().mean().item() == pytest.approx(0.2, abs=0.03)
    assert place.abs().amax(0).tolist() == pytest.approx([1 / 7 * 1.2, 1 / 7 * 1.2], abs=0.06)
    same = (data.warp(dot, share=0.5)[:, 0] - dot[:, 0]).abs().amax((1, 2)) < 1e-4
    assert same.double().mean().item() == pytest.approx(0.5, abs=0.03)
    bar = torch.zeros(n, 1, 57, 57)
    bar[:, :, 26:31, 8:49] = 1                                      # level: what slope it has is the turn's
    y = data.warp(bar)[:, 0]
    left, right = (part.sum((1, 2)) for part in (y[..., :28], y[..., 29:]))
    rise = (y[..., 29:] * at[:, None]).sum((1, 2)) / right - (y[..., :28] * at[:, None]).sum((1, 2)) / left
    assert 0.2 < rise.abs().max() < 0.45 and abs(rise.mean()) < 0.02    # .72 tan 20 degrees, stretched


def test_warp_of_nothing_and_of_edges_and_its_gradient():
    x = torch.rand(50, 2, 9, 9, requires_grad=True)
    assert data.warp(x, 0) is x
    torch.testing.assert_close(data.warp(torch.full((50, 1, 9, 9), 0.7)), torch.full((50, 1, 9, 9), 0.7))
    assert data.warp(x).shape == x.shape and data.warp(x).dtype == torch.float32
    assert (torch.autograd.grad(data.warp(x).sum(), x)[0] != 0).any()
    with torch.autocast("cpu", torch.bfloat16):             # what is left alone stays sharp
        torch.testing.assert_close(data.warp(x, share=0.0), x, atol=1e-4, rtol=0)


# ---- what is held out, and what tells classes apart -----------------------------------------------------


def test_cut():
    assert data.cut(600, 50, 6) == 550 and data.cut(60, 50, 6) == 50 and data.cut(5, 50, 6) == 3
    assert data.cut(10, 50, 5, least=4) == 6
    for n in (0, 1, 3):
        one_line(lambda n=n: data.cut(n, 50, 6), f"{n} picture", "expected 4 at least, as 2 are held out")


def test_tell():
    assert data.tell(torch.tensor([0, 1])) and data.tell(torch.tensor([3, -1, 5]))
    assert not any(map(data.tell, (None, torch.tensor([2, 2]), torch.tensor([1, -1]))))


# ---- minibatches -----------------------------------------------------------------------------------------

HOME = pytest.mark.parametrize("resident", [True, False])


def numbered(n):
    """n pictures, each of which spells its own number, and the numbers."""
    i = torch.arange(n)
    return torch.stack([i // 256, i % 256], 1).to(torch.uint8)[:, None, None], i


def spelled(x):
    """The numbers of a minibatch in [0, 1]."""
    hundreds, ones = (x * 255).round().long()[:, 0, 0].T
    return hundreds * 256 + ones


@HOME
def test_every_picture_once_an_epoch(resident):
    x, i = numbered(1003)
    b = Batches(x, i, batch_size=50, seed=3, resident=resident)
    assert b.per_epoch == 20
    epochs = []
    for _ in range(4):
        drawn = [next(b) for _ in range(20)]
        seen = torch.cat([j for _, j in drawn])
        assert torch.equal(torch.cat([spelled(x) for x, _ in drawn]), seen)  # both items come from one row
        assert len(seen.unique()) == 1000
        epochs.append(seen)
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(epochs, 2))
    assert len(torch.cat(epochs).unique()) == 1003  # what one epoch drops another one has


@HOME
def test_kinds_and_scale(resident):
    x = torch.arange(256, dtype=torch.uint8).view(16, 1, 4, 4)
    z, y, m = torch.randn(16, 3), torch.arange(16, dtype=torch.int32), torch.arange(16) % 2 == 0
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (-0.5, 2.0)):
        b = Batches(x, z, y, m, batch_size=16, scale=(low, high), resident=resident)
        u, v, w, k = next(b)
        assert (u.dtype, v.dtype, w.dtype, k.dtype) == (torch.float32, torch.float32, torch.int64, torch.bool)
        assert u.min() == low and u.max() == high and u.shape == (16, 1, 4, 4) and u.is_contiguous()
        assert torch.allclose(u, x[w].double().div(255).mul(high - low).add(low).float(), atol=1e-6)
        assert torch.equal(v, z[w]) and torch.equal(k, m[w]) and sorted(w.tolist()) == list(range(16))
    assert torch.is_tensor(next(Batches(x, batch_size=4, resident=resident)))
    assert iter(b) is b


@HOME
def test_resume_to_the_minibatch(resident):
    x, i = numbered(30)
    for handed_out in (0, 1, 3, 4, 9):  # 4: an epoch's end
        b = Batches(x, i, batch_size=7, resident=resident)
        for _ in range(handed_out):
            next(b)
        state = b.state_dict()
        assert (state["epoch"], state["position"]) == divmod(handed_out, 4)
        expected = [next(b)[1] for _ in range(10)]
        other = Batches(x, i, batch_size=7, resident=resident)
        next(other)  # has read ahead by now
        other.load_state_dict(pickle.loads(pickle.dumps(state)))
        assert all(torch.equal(next(other)[1], e) for e in expected)


@HOME
def test_ranks_together_see_the_batch_of_one(resident):
    x, i = numbered(101)
    one = Batches(x, i, batch_size=12, seed=5, resident=resident)
    ranks = [Batches(x, i, batch_size=4, seed=5, rank=r, world=3, resident=resident) for r in range(3)]
    assert ranks[0].per_epoch == one.per_epoch == 8
    for _ in range(20):
        (x1, i1), parts = next(one), [next(r) for r in ranks]
        assert torch.equal(i1, torch.cat([p[1] for p in parts]))
        assert torch.equal(x1, torch.cat([p[0] for p in parts]))
    ranks[1].load_state_dict(one.state_dict())  # so a run may go on with another number of ranks


def test_read_ahead_gives_the_same_bits(tmp_path, pictures):
    mapped = load(pictures, tmp_path, 8).images
    y = torch.randn(24, 2)
    here = Batches(mapped.clone(), y, batch_size=5, scale=(-1, 1))
    ahead = Batches(mapped, y, batch_size=5, scale=(-1, 1), resident=False)
    kept = []
    for _ in range(15):
        (a, b), (c, d) = next(here), next(ahead)
        assert torch.equal(a, c) and torch.equal(b, d)
        kept.append((a, c, b, d))
    assert all(torch.equal(a, c) and torch.equal(b, d) for a, c, b, d in kept)  # no buffer was used again


def test_read_ahead_in_another_thread(monkeypatch):
    seen, submit = [], data.ThreadPoolExecutor.submit

    def noted(pool, gather):
        def work():
            seen.append(threading.get_ident())
            return gather()
        return submit(pool, work)

    monkeypatch.setattr(data.ThreadPoolExecutor, "submit", noted)
    b = Batches(numbered(40)[0], batch_size=10, resident=False)
    next(b)
    for _ in range(500):  # the second minibatch is gathered though nobody asked for it
        if len(seen) == 2:
            break
        time.sleep(0.01)
    assert len(seen) == 2 and threading.get_ident() not in seen
    assert b.state_dict()["position"] == 1


def test_what_is_large_is_not_resident(monkeypatch):
    x, _ = numbered(100)
    assert Batches(x, batch_size=10).resident
    monkeypatch.setattr(data, "HOST_RESIDENT", 199)
    assert not Batches(x, batch_size=10).resident


def test_order_depends_on_seed_alone():
    x, i = numbered(64)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b, c = (next(Batches(x, i, batch_size=64, seed=s))[1] for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_bad_minibatches():
    x, i = numbered(20)
    one_line(lambda: Batches(x, batch_size=21), "batch of 21", "20 pictures", "--batch-size")
    one_line(lambda: Batches(x, batch_size=11, world=2), "11", "2 ranks", "10 at most")
    one_line(lambda: Batches(x[:1], batch_size=2), "from 1 pictures: expected more pictures, 2 at least")
    one_line(lambda: Batches(x[:1].expand(20, -1, -1, -1), batch_size=2), "all 20 pictures are the same")
    one_line(lambda: Batches(x, batch_size=0), "batch of 0")
    one_line(lambda: Batches(x, i[:19], batch_size=2), "item 1 has 19 rows for 20")
    one_line(lambda: Batches(x, None, batch_size=2), "item 1 is None")
    one_line(lambda: Batches(x.float(), batch_size=2), "torch.float32", "expected torch.uint8")
    one_line(lambda: Batches(x, batch_size=2, rank=2, world=2), "rank is 2")
    state = Batches(x, batch_size=2).state_dict()
    one_line(lambda: Batches(x[:19], batch_size=2).load_state_dict(state), "number of pictures is 20", "19")
    one_line(lambda: Batches(x, batch_size=3).load_state_dict(state), "batch of all ranks is 2", "3")
    one_line(lambda: Batches(x, batch_size=2, seed=1).load_state_dict(state), "seed is 0", "1")


@cuda
@HOME
def test_gpu_without_waiting(resident):
    x, i = numbered(1000)
    expected = Batches(x, i, batch_size=100)
    b = Batches(x, i, batch_size=100, device="cuda", resident=resident)
    next(expected), next(b)  # allocators are warm from here on
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = [next(b) for _ in range(25)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for u, j in drawn:
        v, k = next(expected)
        assert u.is_cuda and torch.equal(j.cpu(), k) and torch.allclose(u.cpu(), v, atol=1e-6)


@cuda
def test_gpu_capture_while_reading_ahead():
    b = Batches(*numbered(100000), batch_size=10000, device="cuda", resident=False)
    x, _ = next(b)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = x * 2
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, x * 2)
