"""Data sets as uint8 tensors, in memory or memory-mapped, and endless minibatches drawn from them.

    faces = load("path/to/folder", size=64)           # or a name: load("mnist"); or load("path/to/file.npz")
    batches = Batches(faces.images, faces.labels, batch_size=128, device="cuda", scale=(-1, 1))
    x, y = next(batches)                              # x (128, 3, 64, 64) in [-1, 1], y (128,), on the device
"""

import gzip
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from common import UserError, intact

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MNIST = {  # file -> published md5 of its decompressed bytes
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}
SMALL = {"fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100",
         "svhn": "SVHN"}
PLACE = {  # torchvision set -> what to place in the data folder where it cannot be downloaded
    "fashion-mnist": "the four *-ubyte.gz in FashionMNIST/raw/",
    "kmnist": "the four *-ubyte.gz in KMNIST/raw/",
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "stl10": "stl10_binary.tar.gz",
    "celeba": "celeba/img_align_celeba/*.jpg and the five lists celeba/*.txt",
    "flowers102": "flowers-102/jpg/*.jpg, flowers-102/imagelabels.mat and flowers-102/setid.mat",
    "lfw": "lfw-py/ with lfw-funneled.tgz, lfw_funneled/ unpacked from it, people.txt and lfw-names.txt",
    "imagenet": "imagenet/ILSVRC2012_devkit_t12.tar.gz and imagenet/ILSVRC2012_img_train.tar",
    "lsun": "lsun/bedroom_train_lmdb/",
    "coco": "coco/annotations/captions_train2014.json and coco/train2014/*.jpg"}
BUILT_IN = ("mnist", "faces", "shapes")
BOX = {"celeba": (15, 40, 163, 188), "lfw": (50, 50, 200, 200)}  # left, top, right, bottom, as VAE/GAN's code
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B")     # Pillow's modes without colour
ARRAYS = ("images", "labels", "test_images", "test_labels")
NAMES = ("names", "values", "words", "classes")     # arrays with these endings have no row for each image
BLOCK = 1024           # images decoded and written at a time: bounds the memory that preprocessing takes
GPU_SHARE = 0.5        # fraction of the free GPU memory that a data set may fill
HOST_RESIDENT = 2**30  # bytes; on a CPU a larger set is probably memory-mapped, so read it ahead in a thread


@dataclass
class Data:
    """A data set.  `images` may be a read-only memory map: index it, never change it in place."""
    name: str
    images: Tensor                      # uint8 (N, C, H, W), C = 1 or 3
    labels: Tensor | None = None        # int64 (N,); -1 = unlabelled (stl10)
    test_images: Tensor | None = None
    test_labels: Tensor | None = None
    classes: list[str] | None = None    # the name of each label
    extra: dict = field(default_factory=dict)  # factors, attributes, captions, files, ... of some sets


def load(name, data_dir="data", size=None, channels=None, download=True):
    """Load a data set: a built-in or torchvision name, a folder of pictures, or an .npz file.

    `size`: crop the centre square and resize it to size x size (bilinear, antialiased).  `channels`: 1 (grey,
    ITU-R 601) or 3 (RGB).  None keeps those of the set, but sets made of picture files need a size.  Large
    sets and folders are prepared once in data_dir/cache and memory-mapped.
    load("mnist"): images (60000, 1, 28, 28), test_images (10000, 1, 28, 28).
    Raises UserError if the name, a file or an argument is wrong.
    """
    root, path, name = Path(data_dir).expanduser(), Path(name).expanduser(), str(name)
    if channels not in (None, 1, 3):
        raise UserError(f"channels is {channels}: expected 1 (grey) or 3 (RGB)")
    if size is not None and size < 1:
        raise UserError(f"size is {size}: expected a number of pixels")
    if size is None and name not in (*BUILT_IN, *SMALL) and (name in PLACE or path.is_dir()):
        raise UserError(f"{name} holds picture files, which may differ in size: give load() a size, 64 say")
    if name == "mnist":
        arrays = mnist(root)
    elif name in BUILT_IN:
        arrays = rendered(name, root, size or 64, channels or 3)
    elif name in SMALL:
        arrays = small(name, root, download)
    elif name in PLACE:
        arrays = large(name, root, size, channels or 3, download)
    elif (path / "text_c10").is_dir():
        arrays, name = captioned(path, root, size, channels), path.resolve().name
    elif path.is_dir():
        arrays, name = folder(path, root, size, channels), path.resolve().name
    elif path.suffix == ".npz" and path.is_file():
        arrays, name = npz(path), path.stem
    else:
        found = "is a file, but no .npz" if path.is_file() else "is neither known nor a path that exists"
        raise UserError(f"data set {name!r} {found}: expected one of {', '.join((*BUILT_IN, *PLACE))}, "
                        "a folder of pictures, or an .npz file")
    if "test_from" in arrays:  # a cache keeps both parts in one file
        images, split = arrays["images"], arrays.pop("test_from")
        arrays |= {"images": images[:split], "test_images": images[split:]}
    if name not in (*BUILT_IN, *PLACE):
        renumber(arrays, path)
    for key in {"images", "test_images"} & set(arrays):
        arrays[key] = resize(arrays[key], size, channels)
    return Data(name, **{key: arrays.pop(key, None) for key in (*ARRAYS, "classes")}, extra=arrays)


# ---- sets that fit in memory

def mnist(root):
    """MNIST (LeCun and Cortes) from root/MNIST/raw/*.gz, checked against the published md5 sums."""
    arrays = {"classes": list("0123456789")}
    for key, (file, md5) in zip(ARRAYS, MNIST.items()):
        path = root / "MNIST" / "raw" / f"{file}.gz"
        try:
            raw = gzip.decompress(path.read_bytes())
            if (found := hashlib.md5(raw, usedforsecurity=False).hexdigest()) != md5:
                raise ValueError(f"md5 of its content {found}, expected {md5}")
        except FileNotFoundError:
            raise UserError(f"{path} is missing: expected the file that comes with the repository; copy it "
                            "there, or point --data-dir at the repository's data/") from None
        except (OSError, EOFError, ValueError, zlib.error) as e:
            raise UserError(f"{path} is damaged ({brief(e)}): restore it from the repository") from e
        a = np.frombuffer(raw, np.uint8, offset=16 if "images" in key else 8)
        arrays[key] = torch.tensor(a).view(-1, 1, 28, 28) if "images" in key else torch.tensor(a).long()
    return arrays


def small(name, root, download):
    """A torchvision set that fits in memory, with its test part."""
    arrays = {}
    for prefix, part in (("", "train"), ("test_", "test")):
        with say_what_to_place(name, root):
            import torchvision  # not at the top: it takes seconds, and most runs need none of it
            kw = {"split": part} if name == "svhn" else {"train": part == "train"}
            d = getattr(torchvision.datasets, SMALL[name])(root, download=download, **kw)
        x = torch.as_tensor(d.data)
        if x.ndim == 3:
            x = x[:, None]
        elif name != "svhn":
            x = x.permute(0, 3, 1, 2)  # CIFAR is (N, H, W, C)
        arrays[f"{prefix}images"] = x.contiguous()
        arrays[f"{prefix}labels"] = torch.as_tensor(d.labels if name == "svhn" else d.targets)
    return arrays | {"classes": list(getattr(d, "classes", "0123456789"))}


def npz(path):
    """The arrays of an .npz file: images uint8 (N, C, H, W), optional labels, test parts and others."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut off or not an .npz archive: write it anew with numpy.savez")
    arrays, key = {}, None
    try:
        with np.load(path, allow_pickle=False) as z:
            for key in z.files:
                arrays[key] = np.asarray(z[key])
    except Exception as e:  # NumPy and zipfile raise a dozen kinds for damaged files
        raise UserError(f"{path}: {f'array {key}' if key else 'it'} cannot be read ({brief(e)}): write the "
                        "file anew with numpy.savez, without object arrays") from e
    if "images" not in arrays:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}: expected an array images")
    for key, a in arrays.items():
        what = f"{path}: {key} is {a.dtype} {a.shape}"
        if key in ("images", "test_images"):
            if a.dtype != np.uint8 or a.ndim != 4 or a.shape[1] not in (1, 3) or 0 in a.shape:
                hint = "values 0..255, N > 0, C = 1 or 3"
                if a.dtype == np.uint8 and a.ndim == 3:
                    hint = f"add the channel: {key}[:, None]"
                elif a.dtype == np.uint8 and a.ndim == 4 and a.shape[3] in (1, 3):
                    hint = f"this looks like (N, H, W, C), so store {key}.transpose(0, 3, 1, 2)"
                raise UserError(f"{what}: expected uint8 (N, C, H, W); {hint}")
        elif key in ("labels", "test_labels"):
            if a.ndim != 1 or a.dtype.kind not in "iub":
                raise UserError(f"{what}: expected integers (N,), one a picture")
            a = a.astype(np.int64)
        arrays[key] = to_torch(np.ascontiguousarray(a), what)
    for part in ("", "test_"):
        x, y = (arrays.get(f"{part}{key}", ()) for key in ("images", "labels"))
        if f"{part}labels" in arrays and len(x) != len(y):
            raise UserError(f"{path}: {len(y)} {part}labels for {len(x) or 'no'} {part}images: expected as "
                            "many")
        if len(x) and x.shape[1:] != arrays["images"].shape[1:]:
            raise UserError(f"{path}: images are {tuple(arrays['images'].shape[1:])} and test_images "
                            f"{tuple(x.shape[1:])}: expected one (C, H, W)")
    for key, a in arrays.items():  # shuffled, so that a part held out from the end has all classes
        if len(a) == len(arrays["images"]) and not key.startswith("test_") and not key.endswith(NAMES):
            arrays[key] = a[shuffled(range(len(a)))] if torch.is_tensor(a) else shuffled(a)
    return arrays


def renumber(arrays, path):
    """Number the labels that occur from 0, without gaps, and name them in `classes`.  -1: no label."""
    parts = {key: arrays[key] for key in ("labels", "test_labels") if arrays.get(key) is not None}
    values = torch.cat([torch.zeros(0).long(), *parts.values()]).unique()
    if (values < -1).any():
        raise UserError(f"{path} has a label {values[0]}: expected 0, 1, ... for classes, -1 for no label")
    values, names = values[values >= 0], arrays.get("classes")
    if len(values) > max(100, len(arrays["images"]) // 2):
        raise UserError(f"{path} has {len(values):,} different labels for {len(arrays['images']):,} pictures: "
                        "expected classes of several pictures each")
    if names is not None and len(values) and (values[-1] < len(names) or len(names) == len(values)):
        arrays["classes"] = [names[v] for v in values] if values[-1] < len(names) else names
    elif names is not None and parts:
        raise UserError(f"{path} has {len(names)} classes for labels up to {max(values, default=-1)}: "
                        "expected a name for each")
    elif len(values) and values[-1] >= len(values):
        arrays["classes"] = [str(v) for v in values.tolist()]
    for key, y in parts.items():
        arrays[key] = torch.where(y < 0, y, torch.searchsorted(values, y)) if len(values) else None


def shuffled(rows):
    """The rows as a list in a random order that depends on their number alone."""
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]


def to_torch(a, what):
    """Strings become a list, floats a float32 tensor, integers int64; uint8 and bool keep their type."""
    a = np.asarray(a)
    if a.dtype.kind in "US":
        return a.astype(str).tolist()
    if a.dtype.kind not in "fiub":
        raise UserError(f"{what}: expected numbers or strings")
    keep = a.dtype in (np.uint8, np.bool_)
    kind = a.dtype if keep else np.float32 if a.dtype.kind == "f" else np.int64
    return torch.from_numpy(a.astype(kind, copy=False))


def resize(images, size, channels):
    """Crop uint8 (N, C, H, W) to the centre square, resize it to (size, size), make it grey or RGB."""
    n, c, h, w = images.shape
    if size in (None, h) and size in (None, w) and channels in (None, c):
        return images
    s, out = min(h, w), torch.empty(n, channels or c, size or h, size or w, dtype=torch.uint8)
    for i in range(0, n, BLOCK):
        x = images[i:i + BLOCK]
        if c == 3 and channels == 1:  # Pillow's integers for ITU-R 601, so that a file and an array agree
            r, g, b = x.int().unbind(1)
            x = ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16)[:, None]
        if size:
            x = x[..., (h - s) // 2:(h - s) // 2 + s, (w - s) // 2:(w - s) // 2 + s].float()
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True).round().clamp(0, 255)
        out[i:i + BLOCK] = x  # grey is copied to three channels
    return out


# ---- sets of files, decoded and resized once into a memory-mapped array

def folder(path, root, size, channels):
    """A folder of pictures, shuffled; its sub-folders, if any, are the classes."""
    files = []
    for at, below, names in os.walk(path, followlinks=True):
        below[:] = [d for d in below if not d.startswith(".")]
        files += [os.path.relpath(os.path.join(at, f), path) for f in names
                  if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
    files.sort()
    if not files:
        raise UserError(f"{path} holds no pictures: expected {' '.join(SUFFIXES)} in it, or in a sub-folder "
                        "for each class")
    flat, rest = sum(os.sep not in f for f in files), {}
    if 0 < flat < len(files):
        raise UserError(f"{path} holds {flat} pictures beside {len(files) - flat} in sub-folders: "
                        "expected pictures alone, or a sub-folder for each class")
    files = shuffled(files)
    if not flat:
        tops = [f.split(os.sep, 1)[0] for f in files]
        rest["classes"] = sorted(set(tops))
        index = {c: i for i, c in enumerate(rest["classes"])}
        rest["labels"] = torch.tensor([index[top] for top in tops])
    rest["files"] = [f.replace(os.sep, "/") for f in files]
    digest = hashlib.sha256(f"[{json.dumps(str(path.resolve()))}, [".encode())
    for i, f in enumerate(files):  # one at a time: a stat_result takes 690 bytes
        s = os.stat(path / f)
        digest.update(f"{', ' * (i > 0)}{json.dumps((f, s.st_size, s.st_mtime_ns))}".encode())
    digest.update(b"]]")

    def make():
        sources = [os.path.join(path, f) for f in files]  # a Path takes several times the memory
        c = channels or (1 if all(decode_all(sources, is_grey)) else 3)
        n = len(sources)
        return (n, c, size, size), lambda start: decode_blocks(path.name, sources, n, size, c, start), rest

    label = re.sub(r"[^\w.-]", "_", path.resolve().name)
    return cached(root / "cache" / f"{label}-{size}x{channels or 'own'}-{digest.hexdigest()[:16]}", make)


def captioned(path, root, size, channels):
    """Birds and flowers: pictures in images/ or jpg/, captions in text_c10/CLASS/NAME.txt, one a line.

    Whole classes are the test part: those of testclasses.txt or testids.txt, those not in trainvalclasses.txt
    or trainvalids.txt (a class's name, or its number from 1, a line), or else the last quarter.
    """
    found = sorted((path / "text_c10").glob("*/*.txt"))
    texts = {t.stem: t for t in found}
    if len(texts) < len(found):
        twice = next(t.name for t in found if texts[t.stem] != t)
        raise UserError(f"{path}/text_c10 has {twice} in two classes: expected each name once")
    within = "jpg" if (path / "jpg").is_dir() else "images"
    if not (path / within).is_dir():
        raise UserError(f"{path} has text_c10/, but no images/ or jpg/: expected the pictures there")
    arrays, captions = folder(path / within, root, size, channels), []
    for f in arrays["files"]:
        text = texts.get(Path(f).stem)
        if text is None:
            raise UserError(f"{path / within / f} has no captions: expected a file "
                            f"text_c10/CLASS/{Path(f).stem}.txt")
        try:
            captions.append([line.strip() for line in text.read_text().splitlines() if line.strip()])
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{text} cannot be read ({brief(e)})") from e
        if not captions[-1]:
            raise UserError(f"{text} is empty: expected a caption a line")
    classes = sorted({t.parent.name for t in found})
    test = set(classes[-(len(classes) // 4):]) if len(classes) > 3 else set()
    for file, is_test in (("trainvalids.txt", False), ("trainvalclasses.txt", False), ("testids.txt", True),
                          ("testclasses.txt", True)):
        if (path / file).is_file():
            listed = set((path / file).read_text().split())
            if listed.isdisjoint(classes) and listed.isdisjoint(map(str, range(1, len(classes) + 1))):
                raise UserError(f"{path / file} names none of the {len(classes)} classes: expected some, as "
                                f"{classes[0]} or 1, one a line")
            test = {c for i, c in enumerate(classes, 1) if bool({c, str(i)} & listed) == is_test}
    y = torch.tensor([classes.index(texts[Path(f).stem].parent.name) for f in arrays["files"]])
    held = torch.tensor([classes[i] in test for i in y.tolist()])
    if held.all():
        raise UserError(f"{path} holds out all of its {len(classes)} classes: expected some to train on")
    out = {"classes": classes}
    for part, rows in (("", ~held), ("test_", held)):
        if rows.any():
            which = rows.nonzero()[:, 0].tolist()
            out |= {f"{part}images": arrays["images"][which], f"{part}labels": y[which],
                    f"{part}captions": [captions[i] for i in which],
                    f"{part}files": [arrays["files"][i] for i in which]}
    return out


def large(name, root, size, channels, download):
    """A torchvision set of many files or much data; celeba and lfw are cropped to the face."""
    def make():
        with say_what_to_place(name, root):
            if name == "stl10":
                blocks, n, rest = stl10(root, size, channels, download)
            else:
                sources, n, rest = listed(name, root, download)

                def blocks(start):
                    return decode_blocks(name, sources, n, size, channels, start, BOX.get(name))
        return (n, channels, size, size), blocks, rest

    return cached(root / "cache" / f"{name}-{size}x{channels}", make)


def listed(name, root, download):
    """(sources, how many, further arrays) of a set whose pictures are files, or entries of a data base.

    sources: a list, or a function that yields them from a given number on.
    """
    if name == "lsun":
        import lmdb
        path = root / "lsun" / "bedroom_train_lmdb"
        env = lmdb.open(str(path), create=False, readonly=True, lock=False)

        def values(start):  # in the order of the file: random keys would seek
            with env.begin() as txn:
                cursor = txn.cursor()
                for key in itertools.islice(cursor.iternext(values=False), start, None):
                    yield f"{path}: {key.decode(errors='replace')}", BytesIO(cursor.value())
        return values, env.stat()["entries"], {}
    if name == "coco":
        lists = json.loads((root / "coco" / "annotations" / "captions_train2014.json").read_text())
        captions = {}
        for a in lists["annotations"]:
            captions.setdefault(a["image_id"], []).append(a["caption"].strip())
        names = {i["id"]: i["file_name"] for i in lists["images"] if i["id"] in captions}
        ids = shuffled(sorted(names))
        files = [root / "coco" / "train2014" / names[i] for i in ids]
        return files, len(files), {"captions": [captions[i] for i in ids],
                                   "files": [f.name for f in files]}
    from torchvision import datasets
    if name == "celeba":
        train, test = (datasets.CelebA(root, split=s, download=download) for s in ("train", "test"))
        files = [root / "celeba" / "img_align_celeba" / f for f in (*train.filename, *test.filename)]
        names = [a for a in train.attr_names if a]  # the header ends in a blank
        return files, len(files), {"attributes": train.attr.float(), "test_attributes": test.attr.float(),
                                   "attribute_names": names, "test_from": len(train)}
    if name == "flowers102":  # all three parts: a script that needs a split makes it by class
        parts = [datasets.Flowers102(root, split=s, download=download) for s in ("train", "val", "test")]
        pairs = sorted((f, y) for d in parts for f, y in zip(d._image_files, d._labels))
        classes = getattr(datasets.Flowers102, "classes", None)
    elif name == "lfw":  # never download=True: torchvision refuses it
        d = datasets.LFWPeople(root, split="10fold", image_set="funneled")
        pairs, classes = list(zip(d.data, d.targets)), list(d.class_to_idx)
    else:
        d = datasets.ImageNet(root / "imagenet", split="train")
        pairs, classes = d.samples, [", ".join(c) for c in d.classes]
    files, labels = zip(*shuffled(pairs))
    return files, len(files), {"labels": torch.tensor(labels), "classes": classes,
                               "files": [Path(f).name for f in files]}


def stl10(root, size, channels, download):
    """(blocks, how many, further arrays): labelled, unlabelled (label -1) and test pictures of STL-10."""
    from torchvision.datasets import STL10
    train, test = (STL10(root, split=s, download=download) for s in ("train", "test"))
    more = np.memmap(root / "stl10_binary" / "unlabeled_X.bin", np.uint8, "r").reshape(-1, 3, 96, 96)
    more = more.swapaxes(2, 3)  # the file stores pictures column by column
    labels = torch.cat([torch.as_tensor(train.labels).long(), torch.full((len(more),), -1)])
    order = shuffled(range(len(labels)))  # unlabelled pictures everywhere, not at the end alone
    rows = [*order, *range(len(labels), len(labels) + len(test))]

    def blocks(start):
        for i in range(start, len(rows), BLOCK):
            x = np.stack([train.data[j] if j < len(train) else more[j - len(train)] if j < len(labels) else
                          test.data[j - len(labels)] for j in rows[i:i + BLOCK]])
            yield resize(torch.from_numpy(x), size, channels).numpy()

    return blocks, len(rows), {
        "labels": labels[order], "test_labels": torch.as_tensor(test.labels).long(), "classes": train.classes,
        "test_from": len(labels)}


def rendered(name, root, size, channels):
    """Images that render.py draws, with their ground truth; shapes are always in colour."""
    from common import render
    channels = 3 if name == "shapes" else channels

    def make():
        print(f"rendering {name} {size}x{size}, once", file=sys.stderr, flush=True)
        drawn = render.shapes(size=size) if name == "shapes" else \
            render.faces(size=size, channels=channels, plain=channels == 1)
        rest = {key: v if isinstance(v, (str, list)) else to_torch(v, key) for key, v in drawn.items()}
        parts = [rest.pop(key).numpy() for key in ("images", "test_images") if key in rest]
        if len(parts) > 1:
            rest["test_from"] = len(parts[0])
        return (sum(map(len, parts)), *parts[0].shape[1:]), lambda start: in_blocks(parts, start), rest

    code = hashlib.sha256(Path(render.__file__).read_bytes()).hexdigest()[:16]  # new code renders anew
    return cached(root / "cache" / f"{name}-{size}x{channels}-{code}", make)


def in_blocks(parts, start):
    """Yield arrays of BLOCK rows, the last one shorter, of `parts` end to end, beginning at row `start`."""
    ends = list(itertools.accumulate(map(len, parts)))
    for i in range(start, ends[-1], BLOCK):
        yield np.concatenate([x[max(0, i - end + len(x)):max(0, i + BLOCK - end + len(x))]
                              for x, end in zip(parts, ends)])


@contextmanager
def opened(source):
    """Open the picture of a path or of a (name, file) pair; an error in the block becomes one line."""
    name, file = source if isinstance(source, tuple) else (source, source)
    try:
        with Image.open(file) as im:
            yield im
    except Exception as e:  # Pillow raises a dozen kinds for damaged files
        raise UserError(f"{name} cannot be read as a picture ({brief(e)}): replace or remove it") from e


def is_grey(source):
    """Whether the picture's header says that it has no colour."""
    with opened(source) as im:
        return im.mode in GREY_MODES


def decode(source, size, channels, box=None):
    """One picture as uint8 (channels, size, size): upright, on white, cropped to `box` or its centre."""
    with opened(source) as im:
        if box is None:
            im.draft("L" if channels == 1 else "RGB", (2 * size, 2 * size))  # a JPEG no larger than needed
        ImageOps.exif_transpose(im, in_place=True)
        if im.mode.startswith("I"):  # 16 bits: convert() would clip all above 255 to white
            im = Image.fromarray((np.asarray(im) >> 8).astype(np.uint8))
        if im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info:
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        im = im.convert("L" if channels == 1 else "RGB")
        s = min(im.size)
        left, top = (im.width - s) // 2, (im.height - s) // 2
        im = im.crop(box or (left, top, left + s, top + s))  # resize(box=) would look beyond the edge
        a = np.asarray(im.resize((size, size), Image.Resampling.BILINEAR))
    return a[None] if channels == 1 else a.transpose(2, 0, 1)


def decode_all(sources, work):
    """Yield work(source) of each source, from threads, since Pillow decodes without the GIL."""
    sources = iter(sources)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(16, cpus)) as pool:
        while part := list(itertools.islice(sources, BLOCK)):  # map() takes memory for each source at once
            yield from pool.map(work, part)


def decode_blocks(name, sources, n, size, channels, start, box=None):
    """Yield uint8 (BLOCK, C, H, W) of pictures `start` to n, the last one shorter, and report progress."""
    began, live = time.monotonic(), sys.stderr.isatty()
    if start:
        print(f"preparing {name}: going on at picture {start + 1:,} of {n:,}", file=sys.stderr, flush=True)
    pictures = decode_all(sources(start) if callable(sources) else itertools.islice(sources, start, None),
                          lambda source: decode(source, size, channels, box))
    for done in itertools.chain(range(start + BLOCK, n, BLOCK), [n]):
        yield np.stack(list(itertools.islice(pictures, BLOCK)))
        rate = (done - start) / (time.monotonic() - began)
        if live or done == n or done % (32 * BLOCK) == 0:
            print("\r" * live + f"preparing {name}: {done:,} of {n:,} pictures, {rate:,.0f}/s, "
                  f"{(n - done) / rate:.0f} s left  ", end="" if live and done < n else "\n",
                  file=sys.stderr, flush=True)


# ---- the cache

@contextmanager
def locked(path):
    """Let in one process at a time; a killed process releases its lock.  No lock on Windows."""
    with open(path, "w") as f:
        if fcntl:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for the process that prepares {path.stem}", file=sys.stderr, flush=True)
                fcntl.flock(f, fcntl.LOCK_EX)
        yield


def cached(where, make):
    """Memory-map the images in the folder `where`; prepare them first if it does not exist.

    make() -> shape of the images, blocks, dict of further arrays.  blocks(i) yields uint8 arrays of BLOCK
    images from number i on; preprocessing that was interrupted resumes there.
    -> {"images": Tensor, **further arrays}.  Raises UserError if it cannot be written or is damaged.
    """
    try:
        if not where.exists():
            where.parent.mkdir(parents=True, exist_ok=True)
            with locked(where.with_name(f"{where.name}.lock")):
                mine = where.with_name(f"{where.name}.tmp{os.getpid()}")
                for left in sorted(where.parent.glob(f"{where.name}.tmp*")):
                    try:  # we hold the lock, so its process is dead; if not, Windows refuses: files are open
                        left.rename(mine)
                    except OSError:
                        shutil.rmtree(left, ignore_errors=True)
                if not where.exists():
                    write(where, mine, *make())
    except OSError as e:
        raise UserError(f"{where} cannot be written ({e.strerror or e}): free some space, "
                        "or give another --data-dir") from e
    try:
        images = np.load(where / "images.npy", mmap_mode="r")
        if images.dtype != np.uint8 or images.offset + images.nbytes != (where / "images.npy").stat().st_size:
            raise ValueError
        intact(where / "rest.pt")
        arrays = torch.load(where / "rest.pt", weights_only=True)
    except Exception as e:
        raise UserError(f"{where} is damaged: delete this folder and run again, it is then prepared "
                        "anew") from e
    with warnings.catch_warnings():
        # Mode "r", though torch warns of it: a private writable mapping larger than the memory is refused.
        warnings.filterwarnings("ignore", message=".*not writable")
        return {"images": torch.from_numpy(images)} | arrays


def write(where, temporary, shape, blocks, rest):
    """Write images.npy and rest.pt to `temporary`, which may be half done, and rename it to `where`.

    The file done has a checksum (4 bytes) for each block, of shape, rest, position and pixels.  Blocks that
    agree are kept, so neither a kill nor a changed list nor a damaged file leaves a wrong picture.  No memory
    map is written to, since a full disk would then be a bus error.
    """
    n, each, done, head, packed = shape[0], math.prod(shape[1:]), 0, BytesIO(), BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    torch.save(rest, packed)
    head, packed = head.getvalue(), packed.getvalue()
    seed, images, marks = zlib.crc32(packed, zlib.crc32(head)), temporary / "images.npy", temporary / "done"

    def mark(block):
        return zlib.crc32(block, (seed + done) % 2**32).to_bytes(4, "little")

    try:
        temporary.mkdir(exist_ok=True)
        images.touch(), marks.touch()
        free = shutil.disk_usage(temporary).free + images.stat().st_size
        if free < n * each:
            raise UserError(f"{n * each / 1e9:.1f} GB are needed for {where}: free some space, or give "
                            "another --data-dir")
        (temporary / "rest.pt").write_bytes(packed)
        with open(images, "r+b") as images, open(marks, "r+b") as marks:
            images.write(head)
            while done < n and marks.read(4) == mark(images.read(min(BLOCK, n - done) * each)):
                done = min(done + BLOCK, n)
            images.truncate(images.seek(len(head) + done * each))
            marks.truncate(marks.seek(-(-done // BLOCK) * 4))
            for block in blocks(done) if done < n else ():
                block = np.ascontiguousarray(block).data
                images.write(block)
                images.flush()
                marks.write(mark(block))
                marks.flush()  # after the pixels
                done += len(block)
            os.fsync(images.fileno())
        temporary.rename(where)
        (where / "done").unlink()
    except Exception:  # not KeyboardInterrupt, after which preprocessing resumes
        shutil.rmtree(temporary, ignore_errors=True)
        if not where.exists():  # else another process was faster: its copy is as good
            raise


@contextmanager
def say_what_to_place(name, root):
    """Turn whatever goes wrong with the files of set `name` into one line: what to place where."""
    try:
        yield
    except ImportError as e:
        raise UserError(f"{name} needs the package {e.name}: pip install {e.name}") from e
    except Exception as e:  # URLError, RuntimeError, ValueError, gdown's own and others
        raise UserError(f"{name} is not there: {brief(e)}; place {PLACE[name]} in {root}/, "
                        "or give the path of a folder of pictures") from e


def brief(e):
    """The message of an exception in one short line."""
    return " ".join(str(e).split())[:160] or type(e).__name__


# ---- minibatches

def warp(x, amount=1.0, share=0.8):
    """Rotate, stretch, shear and shift a share of the images x (n, C, S, S) at random, repeating their edges.

    `amount` 1: rotate by up to 20 degrees, stretch each side by up to 28 %, shear by up to a fifth, shift by
    up to a fourteenth of the side (2 of 28 pixels); 0: x itself.  `share`: fraction of the batch to warp.  A
    small share keeps G from learning to draw warped images.  Differentiable; float32 out.
    """
    if not amount:
        return x
    size = amount * (torch.rand(len(x), 1, device=x.device) < share)
    drawn = (size * (2 * torch.rand(len(x), 6, device=x.device) - 1)).unbind(1)
    bounds = 0.35, 0.2, 0.25, 0.25, 1 / 7, 1 / 7            # no tensor: a captured step may not copy one
    turn, shear, wide, high, right, down = (bound * part for bound, part in zip(bounds, drawn))
    maps = torch.stack([wide.exp() * turn.cos(), shear - high.exp() * turn.sin(), right,
                        wide.exp() * turn.sin(), high.exp() * turn.cos(), down], 1).unflatten(1, (2, 3))
    with torch.autocast(x.device.type, enabled=False):      # a bfloat16 grid blurs those left as they are too
        grid = F.affine_grid(maps, x.shape, align_corners=False)
        # For padding_mode="border", which Apple's GPUs lack: stop at the centres of the outermost pixels.
        edge = 1 - 1 / x.shape[3]
        return F.grid_sample(x.float(), grid.clamp(-edge, edge), align_corners=False)


class Batches:
    """Endless minibatches of `images` uint8 (N, ...) and `others` (N, ...), without replacement in an epoch.

    next() -> x, or (x, *others) if there are any.  x is float32 (batch_size, ...) on `device`, with 0..255
    mapped to scale[0]..scale[1].  Integer others come as int64; floats, uint8 and bool keep their type.
    Epoch e visits randperm(N) seeded with (seed, e), batch_size * world images at a time, of which `rank`
    takes its slice: all ranks together see the batch of one process.  An epoch drops the remainder, the next
    one drops other images.  `per_epoch`: minibatches in an epoch.
    `resident`: keep the data on the device (None: if they fit).  If not, a thread gathers the next minibatch
    on the host while this one is in use.  Nothing waits for the device.
    Raises UserError if lengths, types or sizes do not agree.
    """

    def __init__(self, images, *others, batch_size, device="cpu", seed=0, scale=(0., 1.), rank=0, world=1,
                 resident=None):
        for i, t in enumerate((images, *others)):
            if t is None:
                raise UserError(f"item {i} is None: this data set lacks the labels, or what else was asked")
            if len(t) != len(images):
                raise UserError(f"item {i} has {len(t)} rows for {len(images)} pictures: expected as many")
        if images.dtype != torch.uint8:
            raise UserError(f"pictures are {images.dtype}: expected torch.uint8")
        if not 0 <= rank < world:
            raise UserError(f"rank is {rank}: expected 0 to {world - 1}")
        self.n, self.b, self.batch = len(images), batch_size, batch_size * world
        self.rank, self.seed, self.scale, self.device = rank, seed, scale, torch.device(device)
        if not 0 < self.batch <= self.n:
            raise UserError(f"a batch of {batch_size} on each of {world} ranks from {self.n} pictures: "
                            f"expected 1 to {self.n // world}, see --batch-size")
        self.per_epoch, self.cuda = self.n // self.batch, self.device.type == "cuda"
        self.tensors = [t if t.dtype in (torch.uint8, torch.bool) or t.is_floating_point() else t.long()
                        for t in (images, *others)]
        if resident is None:
            room = GPU_SHARE * torch.cuda.mem_get_info(self.device)[0] if self.cuda else HOST_RESIDENT
            resident = sum(t.nbytes for t in self.tensors if t.device.type == "cpu") <= room
        self.resident, self.thread, self.ahead = resident, ThreadPoolExecutor(1), None
        if resident:
            self.tensors = [t.to(self.device) for t in self.tensors]
        self.epoch, self.position, self.order = 0, 0, (None, None)

    def __iter__(self):
        return self

    def __next__(self):
        if self.resident:
            index = self._index()
            items = [t.index_select(0, index) for t in self.tensors]
            self._advance()
        else:
            items = (self.ahead or self._gather()).result()
            self._advance()
            self.ahead = self._gather()
            items = [t.to(self.device, non_blocking=self.cuda) for t in items]
        low, high = self.scale
        x = items[0].float().div_(255)
        x = x if (low, high) == (0, 1) else x.mul_(high - low).add_(low)
        return (x, *items[1:]) if len(items) > 1 else x

    def _advance(self):
        self.position += 1
        if self.position == self.per_epoch:
            self.epoch, self.position = self.epoch + 1, 0

    def _index(self):
        """Indices of this rank's images in the next minibatch."""
        if self.order[0] != self.epoch:
            seed = int(np.random.SeedSequence([self.seed % 2**64, self.epoch]).generate_state(1)[0])
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed))
            if self.resident:  # pinned: a copy from pageable memory waits for the device
                order = (order.pin_memory() if self.cuda else order).to(self.device, non_blocking=self.cuda)
            self.order = self.epoch, order
        start = self.position * self.batch + self.rank * self.b
        return self.order[1][start:start + self.b]

    def _gather(self):
        """Gather the next minibatch in the thread -> a Future of the tensors.

        The thread makes no CUDA call, which could break a CUDA graph capture in the main thread.  So pinned
        memory is allocated here; its allocator reuses a buffer only after the copy from it is done.
        """
        into = [torch.empty(self.b, *t.shape[1:], dtype=t.dtype, pin_memory=self.cuda) for t in self.tensors]
        index, place = self._index().sort()  # read a memory map in the order of its file,
        place = place.argsort()  # then restore the order; index_copy_ would take 30 times as long

        def gather():
            rows = [t.index_select(0, index) for t in self.tensors]
            return [torch.index_select(r, 0, place, out=out) for r, out in zip(rows, into)]

        return self.thread.submit(gather)

    def state_dict(self):
        """The position of the next minibatch to hand out, and what it depends on."""
        return {key: getattr(self, key) for key in ("epoch", "position", "n", "batch", "seed")}

    def load_state_dict(self, state):
        """Resume from `state`.  Raises UserError if its data, batch size (of all ranks) or seed differ."""
        for key, what in (("n", "number of pictures"), ("batch", "batch of all ranks"), ("seed", "seed")):
            if state[key] != getattr(self, key):
                raise UserError(f"the checkpoint's {what} is {state[key]}, that of this run "
                                f"{getattr(self, key)}: expected the same"
                                + ", see --batch-size, of each rank" * (key == "batch"))
        self.ahead = None  # what was read ahead, if anything, is dropped
        self.epoch, self.position = state["epoch"], state["position"]
