"""Data sets as uint8 tensors, in memory or memory-mapped, and endless minibatches drawn from them.

    faces = load("path/to/folder", size=64)           # or a name: load("mnist"); or load("path/to/file.npz")
    batches = Batches(faces.images, faces.labels, batch_size=128, device="cuda", scale=(-1, 1))
    x, y = next(batches)                              # x (128, 3, 64, 64) in [-1, 1], y (128,), on the device
"""

import errno
import functools
import gzip
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shutil
import struct
import sys
import time
import tokenize
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

MNIST = {  # file -> md5 of its decompressed bytes, as published
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}
SMALL = {"fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100",
         "svhn": "SVHN"}
PLACE = {  # name -> what to place in the data folder where it cannot be downloaded
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
RENDERED = ("faces", "shapes")
BUILT_IN = ("mnist", *RENDERED)
BOX = {"celeba": (15, 40, 163, 188), "lfw": (50, 50, 200, 200)}  # left, top, right, bottom, as VAE/GAN's code
OWN_SIZE = {"celeba": 148, "lfw": 150, "stl10": 96}
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
GREY = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B")
NAMES = ("names", "values", "words", "classes")     # ends of arrays that are about no picture of their own
BLOCK = 1024           # pictures decoded, resized and written at a time: what preparing a set holds in memory
GPU_SHARE = 0.5        # of a GPU's free memory that a data set may take
DAMAGED = (OSError, EOFError, LookupError, MemoryError, RuntimeError, SyntaxError, TypeError, ValueError,
           pickle.UnpicklingError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error)
HOST_RESIDENT = 2**30  # bytes; on a CPU a larger set is likely a mapped file, whose reads are worth hiding


@dataclass
class Data:
    """A data set.  `images` may be memory-mapped, so read-only: index it, never change it in place."""
    name: str
    images: Tensor                      # uint8 (N, C, H, W), C = 1 or 3
    labels: Tensor | None = None        # int64 (N,); -1 = unlabelled (stl10)
    test_images: Tensor | None = None
    test_labels: Tensor | None = None
    classes: list[str] | None = None    # the name of each label
    extra: dict = field(default_factory=dict)  # factors, attributes, captions, files, ... as the set has them


def load(name, data_dir="data", size=None, channels=None, download=True):
    """The data set `name`: mnist, faces or shapes (rendered), a torchvision one, a folder or an .npz file.

    `size`: pictures come out centre-cropped to a square and resized to size x size (bilinear, antialiased);
    `channels`: 1 (ITU-R 601 grey) or 3 (RGB).  None keeps the set's own.  Large sets and folders are prepared
    once, in data_dir/cache, and memory-mapped.  Raises UserError for what is wrong with name, files or size.
    load("mnist"): images (60000, 1, 28, 28), test_images (10000, 1, 28, 28).
    """
    root, path, name = Path(data_dir).expanduser(), Path(name).expanduser(), str(name)
    if channels not in (None, 1, 3):
        raise UserError(f"channels is {channels}: expected 1 (grey) or 3 (RGB)")
    if size is not None and size < 1:
        raise UserError(f"size is {size}: expected a number of pixels")
    if name == "mnist":
        arrays = mnist(root)
    elif name in RENDERED:
        arrays = rendered(name, root, size or 64, channels or 3)
    elif name in SMALL:
        arrays = small(name, root, download)
    elif name in PLACE:
        arrays = large(name, root, size, channels, download)
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
    for key in {"images", "test_images"} & set(arrays):
        arrays[key] = fit(arrays[key], size, channels)
    keys = ("images", "labels", "test_images", "test_labels", "classes")
    return Data(name, **{key: arrays.pop(key, None) for key in keys}, extra=arrays)


# ---- pictures in memory

def mnist(root):
    """MNIST (LeCun and Cortes) from root/MNIST/raw/*.gz, each file checked against the published md5."""
    arrays = {"classes": list("0123456789")}
    for key, (file, md5) in zip(("images", "labels", "test_images", "test_labels"), MNIST.items()):
        path = root / "MNIST" / "raw" / f"{file}.gz"
        try:
            raw = gzip.decompress(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path} is missing: expected the file that comes with the repository; copy it "
                            "there, or point --data-dir at the repository's data/") from None
        except (OSError, EOFError, zlib.error) as e:
            raise UserError(f"{path} is damaged ({brief(e)}): restore it from the repository") from e
        found = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if found != md5:
            raise UserError(f"{path} is damaged (md5 of its content {found}, expected {md5}): "
                            "restore it from the repository")
        if "images" in key:
            a = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28).copy()
        else:
            a = np.frombuffer(raw, np.uint8, offset=8).astype(np.int64)
        arrays[key] = torch.from_numpy(a)
    return arrays


def small(name, root, download):
    """The torchvision sets that fit in memory, with their test parts."""
    arrays = {}
    for prefix, part in (("", "train"), ("test_", "test")):
        with placed(name, root):
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
    """The arrays of an .npz file: images uint8 (N, C, H, W), optional labels and test parts, further ones."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut off or not an .npz archive: write it anew with numpy.savez")
    arrays = {}
    try:
        z = np.load(path, allow_pickle=False)
    except DAMAGED as e:
        raise UserError(f"{path} is damaged ({brief(e)}): write it anew with numpy.savez") from e
    with z:
        if "images" not in z.files:
            raise UserError(f"{path} holds {', '.join(z.files) or 'nothing'}: expected an array images")
        for key in z.files:
            try:
                a = np.asarray(z[key])  # once: each access reads and decompresses it anew
            except DAMAGED as e:
                raise UserError(f"{path}: array {key} cannot be read ({brief(e)}): write the file anew with "
                                "numpy.savez, without object arrays") from e
            what = f"{path}: {key} is {a.dtype} {a.shape}"
            if key in ("images", "test_images"):
                if a.dtype != np.uint8 or a.ndim != 4 or a.shape[1] not in (1, 3) or 0 in a.shape:
                    hint = "values 0..255, N > 0, C = 1 or 3"
                    if a.dtype == np.uint8 and a.ndim == 3:
                        hint = f"add the channel: {key}[:, None]"
                    elif a.dtype == np.uint8 and a.ndim == 4 and a.shape[3] in (1, 3):
                        hint = f"this looks like (N, H, W, C), so store {key}.transpose(0, 3, 1, 2)"
                    raise UserError(f"{what}: expected uint8 (N, C, H, W); {hint}")
            elif key in ("labels", "test_labels") and (a.ndim != 1 or a.dtype.kind not in "iu"):
                raise UserError(f"{what}: expected integers (N,), one a picture")
            arrays[key] = np.ascontiguousarray(a) if key.endswith("images") else plain(a, what)
    for part in ("", "test_"):
        n, m = (len(arrays[k]) if k in arrays else None for k in (f"{part}images", f"{part}labels"))
        if m is not None and m != n:
            raise UserError(f"{path}: {m} {part}labels for {n or 'no'} {part}images: expected as many")
        if n and arrays[f"{part}images"].shape[1:] != arrays["images"].shape[1:]:
            raise UserError(f"{path}: images are {arrays['images'].shape[1:]} and test_images "
                            f"{arrays['test_images'].shape[1:]}: expected one (C, H, W)")
    arrays |= {key: arrays[key].long() if "labels" in key else torch.from_numpy(arrays[key])
               for key in ("images", "labels", "test_images", "test_labels") if key in arrays}
    labels = arrays.get("labels", torch.zeros(0))
    if len(labels.unique()) > 1 and (labels.diff() >= 0).all():         # class after class
        for key, a in arrays.items():
            if len(a) == len(labels) and not key.startswith("test_") and not key.endswith(NAMES):
                arrays[key] = a[mixed(range(len(a)))] if torch.is_tensor(a) else mixed(a)
    return arrays


def mixed(rows):
    """The rows as a list in an order at random, always the same: a part held out has all classes."""
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]


def plain(a, what):
    """Strings as a list, floats as a float32 tensor, integers as int64, uint8 and bool as they are."""
    a = np.asarray(a)
    if a.dtype.kind in "US":
        return a.astype(str).tolist()
    if a.dtype.kind not in "fiub":
        raise UserError(f"{what}: expected numbers or strings")
    keep = a.dtype in (np.uint8, np.bool_)
    kind = a.dtype if keep else np.float32 if a.dtype.kind == "f" else np.int64
    return torch.from_numpy(a.astype(kind, copy=False))


def fit(images, size, channels):
    """uint8 (N, C, H, W) cropped and resized to (size, size), to grey or RGB; None keeps."""
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
        out[i:i + BLOCK] = x  # grey spreads over the three channels
    return out


# ---- pictures in files, decoded and resized once into a memory-mapped array

def folder(path, root, size, channels):
    """A folder of pictures; the sub-folders that hold some, at any depth, are the classes, sorted by name.

    Pictures come by name, those of classes mixed.
    """
    files = []
    for at, below, names in os.walk(path, followlinks=True):
        below[:] = [d for d in below if not d.startswith(".")]
        files += [os.path.relpath(os.path.join(at, f), path) for f in names
                  if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
    files.sort()
    if not files:
        raise UserError(f"{path} holds no pictures: expected {' '.join(SUFFIXES)} in it, or in a sub-folder "
                        "for each class")
    flat = sum(os.sep not in f for f in files)
    if 0 < flat < len(files):
        raise UserError(f"{path} holds {flat} pictures beside {len(files) - flat} in sub-folders: "
                        "expected pictures alone, or a sub-folder for each class")
    rest = {}
    if not flat:
        files = mixed(files)
        tops = [f.split(os.sep, 1)[0] for f in files]
        rest["classes"] = sorted(set(tops))
        index = {c: i for i, c in enumerate(rest["classes"])}
        rest["labels"] = torch.tensor([index[top] for top in tops])
    rest["files"] = [f.replace(os.sep, "/") for f in files]
    digest, comma = hashlib.sha256(f"[{json.dumps(str(path.resolve()))}, [".encode()), ""
    for f in files:  # one at a time: a stat_result takes 690 bytes
        s = os.stat(path / f)
        digest.update(f"{comma}{json.dumps((f, s.st_size, s.st_mtime_ns))}".encode())
        comma = ", "
    digest.update(b"]]")

    def make():
        sources = [os.path.join(path, f) for f in files]  # a Path takes several times the memory
        c, h, w = own_shape(sources, size, channels)
        blocks = functools.partial(decoded, path.name, sources, len(files), size, c, None)
        return (len(files), c, h, w), blocks, rest

    label = re.sub(r"[^\w.-]", "_", path.resolve().name)
    return cached(root / "cache" / f"{label}-{size or 'own'}x{channels or 'own'}-{digest.hexdigest()[:16]}",
                  make)


def captioned(path, root, size, channels):
    """Pictures in images/ or jpg/, captions in text_c10/CLASS/NAME.txt, one a line: birds and flowers.

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
    arrays = folder(path / within, root, size, channels)
    stems, images = [Path(f).stem for f in arrays["files"]], arrays["images"]
    bare = next((f for f, stem in zip(arrays["files"], stems) if stem not in texts), None)
    if bare:
        raise UserError(f"{path / within / bare} has no captions: expected a file "
                        f"text_c10/CLASS/{Path(bare).stem}.txt")
    classes = sorted({t.parent.name for t in texts.values()})
    said = {}
    for stem in stems:
        try:
            said[stem] = [line.strip() for line in texts[stem].read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{texts[stem]} cannot be read ({brief(e)})") from e
        if not said[stem]:
            raise UserError(f"{texts[stem]} is empty: expected a caption a line")
    test = set(classes[-(len(classes) // 4):]) if len(classes) > 3 else set()
    for file, is_test in (("trainvalids.txt", False), ("trainvalclasses.txt", False), ("testids.txt", True),
                          ("testclasses.txt", True)):
        if (path / file).is_file():
            listed = set((path / file).read_text().split())
            if listed.isdisjoint(classes) and listed.isdisjoint(map(str, range(1, len(classes) + 1))):
                raise UserError(f"{path / file} names none of the {len(classes)} classes: expected some, as "
                                f"{classes[0]} or 1, one a line")
            test = {c for i, c in enumerate(classes, 1) if bool({c, str(i)} & listed) == is_test}
    y = torch.tensor([classes.index(texts[stem].parent.name) for stem in stems])
    held = torch.tensor([classes[i] in test for i in y.tolist()])
    if held.all():
        raise UserError(f"{path} holds out all of its {len(classes)} classes: expected some to train on")
    out = {"classes": classes}
    for part, rows in (("", ~held), ("test_", held)):
        if rows.any():
            which = rows.nonzero()[:, 0]
            out |= {f"{part}images": images[which], f"{part}labels": y[which],
                    f"{part}captions": [said[stems[i]] for i in which.tolist()],
                    f"{part}files": [arrays["files"][i] for i in which.tolist()]}
    return out


def large(name, root, size, channels, download):
    """The torchvision sets that are many files or much data; celeba and lfw are cut to the face."""
    size, channels = size or OWN_SIZE.get(name), channels or 3
    if size is None:
        raise UserError(f"{name} has pictures of many sizes: give the one to bring them to, --size 64 say")

    def make():
        with placed(name, root):
            if name == "stl10":
                blocks, n, rest = stl10(root, size, channels, download)
            else:
                sources, n, rest = listed(name, root, download)
                blocks = functools.partial(decoded, name, sources, n, size, channels, BOX.get(name))
        return (n, channels, size, size), blocks, rest

    return cached(root / "cache" / f"{name}-{size}x{channels}", make)


def listed(name, root, download):
    """(sources, how many, further arrays) of a set whose pictures are files, or entries of a data base.

    sources: a list, or a function of the number of the first one wanted.
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
        files = [root / "coco" / "train2014" / names[i] for i in sorted(names)]
        return files, len(files), {"captions": [captions[i] for i in sorted(names)],
                                   "files": [f.name for f in files]}
    from torchvision import datasets
    if name == "celeba":
        train, test = (datasets.CelebA(root, split=s, download=download) for s in ("train", "test"))
        files = [root / "celeba" / "img_align_celeba" / f for f in (*train.filename, *test.filename)]
        names = [a for a in train.attr_names if a]  # the header ends in a blank
        return files, len(files), {"attributes": train.attr.float(), "test_attributes": test.attr.float(),
                                   "attribute_names": names, "test_from": len(train)}
    if name == "flowers102":  # all three parts: who needs a split makes it by class
        parts = [datasets.Flowers102(root, split=s, download=download) for s in ("train", "val", "test")]
        pairs = sorted((f, y) for d in parts for f, y in zip(d._image_files, d._labels))
        classes = getattr(datasets.Flowers102, "classes", None)
    elif name == "lfw":  # never download=True: torchvision refuses it
        d = datasets.LFWPeople(root, split="10fold", image_set="funneled")
        pairs, classes = list(zip(d.data, d.targets)), list(d.class_to_idx)
    else:
        d = datasets.ImageNet(root / "imagenet", split="train")
        pairs, classes = d.samples, [", ".join(c) for c in d.classes]
    files, labels = zip(*mixed(pairs))
    return files, len(files), {"labels": torch.tensor(labels), "classes": classes,
                               "files": [Path(f).name for f in files]}


def stl10(root, size, channels, download):
    """Blocks of the labelled, the unlabelled (label -1) and the test pictures; 2.7 GB are mapped."""
    from torchvision.datasets import STL10
    train, test = (STL10(root, split=s, download=download) for s in ("train", "test"))
    more = np.memmap(root / "stl10_binary" / "unlabeled_X.bin", np.uint8, "r").reshape(-1, 3, 96, 96)
    more = more.swapaxes(2, 3)  # pictures are stored column by column
    labels = torch.cat([torch.as_tensor(train.labels).long(), torch.full((len(more),), -1)])
    blocks = (fit(torch.from_numpy(np.array(x[i:i + BLOCK])), size, channels).numpy()
              for x in (train.data, more, test.data) for i in range(0, len(x), BLOCK))
    rest = {"labels": labels, "test_labels": torch.as_tensor(test.labels).long(), "classes": train.classes}
    return blocks, len(labels) + len(test), rest | {"test_from": len(labels)}


def rendered(name, root, size, channels):
    """Pictures that render.py draws, with all that they were drawn from; shapes always in colour."""
    from common import render
    channels = 3 if name == "shapes" else channels

    def make():
        print(f"rendering {name} {size}x{size}, once", file=sys.stderr, flush=True)
        drawn = render.shapes(size=size) if name == "shapes" else \
            render.faces(size=size, channels=channels, plain=channels == 1)
        rest = {key: v if isinstance(v, (str, list)) else plain(v, key) for key, v in drawn.items()}
        parts = [rest.pop(key).numpy() for key in ("images", "test_images") if key in rest]
        if len(parts) > 1:
            rest["test_from"] = len(parts[0])
        return (sum(map(len, parts)), *parts[0].shape[1:]), parts, rest

    code = hashlib.sha256(Path(render.__file__).read_bytes()).hexdigest()[:16]  # a changed one draws anew
    return cached(root / "cache" / f"{name}-{size}x{channels}-{code}", make)


@contextmanager
def opened(source):
    """The picture of a path or a (name, file) pair; what goes wrong in the block names it, in one line."""
    name, file = source if isinstance(source, tuple) else (source, source)
    try:
        with Image.open(file) as im:
            yield im
    except Exception as e:  # Pillow raises a dozen kinds for damaged files
        raise UserError(f"{name} cannot be read as a picture ({brief(e)}): replace or remove it") from e


def picture(source, size, channels, box=None):
    """One picture, uint8 (C, H, W): upright, on white if transparent, its `box` or centre, resized."""
    with opened(source) as im:
        if size and box is None:
            im.draft("L" if channels == 1 else "RGB", (2 * size, 2 * size))  # a JPEG no larger than needed
        ImageOps.exif_transpose(im, in_place=True)
        if im.mode.startswith("I"):  # 16 bits: convert() would clip all above 255 to white
            im = Image.fromarray((np.asarray(im) >> 8).astype(np.uint8))
        if im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info:
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        im = im.convert("L" if channels == 1 else "RGB")
        if size:
            s = min(im.size)
            left, top = (im.width - s) // 2, (im.height - s) // 2
            im = im.crop(box or (left, top, left + s, top + s))  # resize(box=) would look beyond the edge
            im = im.resize((size, size), Image.Resampling.BILINEAR)
        a = np.asarray(im)
    return a[None] if channels == 1 else a.transpose(2, 0, 1)


def own_shape(sources, size, channels):
    """(C, H, W) to decode to; what is not given comes from the pictures' headers: RGB if any has colour."""
    if size and channels:
        return channels, size, size

    def header(source):
        with opened(source) as im:
            turned = im.getexif().get(0x0112, 1) >= 5  # orientation: 5 to 8 lie on their side
            return im.size if turned else im.size[::-1], im.mode in GREY

    with ThreadPoolExecutor(threads()) as pool:  # in blocks, since map() makes an object a picture at once
        blocks = (pool.map(header, sources[i:i + BLOCK]) for i in range(0, len(sources), BLOCK))
        headers = itertools.chain.from_iterable(blocks)
        first, all_grey = next(headers)
        for source, (shape, grey) in zip(sources[1:], headers):
            all_grey &= grey
            if size is None and shape != first:
                found = "{1}x{0} {2} and {4}x{3} {5}".format(*first, sources[0], *shape, source)
                raise UserError(f"pictures of several sizes, {found}: give the one to bring them to, "
                                "--size 64 say")
    return (channels or (1 if all_grey else 3), *((size, size) if size else first))


def decoded(name, sources, n, size, channels, box, start):
    """Blocks uint8 (BLOCK or fewer, C, H, W) of pictures start to n, decoded in threads (without the GIL)."""
    began, done, live = time.monotonic(), start, sys.stderr.isatty()
    sources = sources(start) if callable(sources) else iter(sources[start:])
    if start:
        print(f"preparing {name}: going on at picture {start + 1:,} of {n:,}", file=sys.stderr, flush=True)
    with ThreadPoolExecutor(threads()) as pool:
        while part := list(itertools.islice(sources, BLOCK)):
            yield np.stack(list(pool.map(lambda s: picture(s, size, channels, box), part)))
            done += len(part)
            rate = (done - start) / (time.monotonic() - began)
            if live or done == n or done % (32 * BLOCK) == 0:
                print("\r" * live + f"preparing {name}: {done:,} of {n:,} pictures, {rate:,.0f}/s, "
                      f"{(n - done) / rate:.0f} s left  ", end="" if live and done < n else "\n",
                      file=sys.stderr, flush=True)


def threads():
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextmanager
def locked(path):
    """One process at a time; a killed one's lock goes with it.  Windows: none, but open files stay."""
    with open(path, "w") as f:
        if fcntl:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for the process that prepares {path.stem}", file=sys.stderr, flush=True)
                fcntl.flock(f, fcntl.LOCK_EX)
        yield


def cached(where, make):
    """images, memory-mapped, and further arrays from the folder `where`; made first if it is not there.

    make() -> (shape, blocks of images, further arrays), written in a temporary folder beside `where` that is
    renamed at the end.  blocks(i), starting from picture i, goes on where an interrupted process ended; plain
    blocks start over.
    """
    try:
        if not where.exists():
            where.parent.mkdir(parents=True, exist_ok=True)
            with locked(where.with_name(f"{where.name}.lock")):
                mine = where.with_name(f"{where.name}.tmp{os.getpid()}")
                for left in sorted(where.parent.glob(f"{where.name}.tmp*")):
                    try:  # the lock is ours, so its maker is gone; if not, Windows refuses, as files are open
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
        whole = (where / "images.npy").stat().st_size == images.offset + images.nbytes
        whole = whole and images.dtype == np.uint8
        intact(where / "rest.pt")
        arrays = torch.load(where / "rest.pt", weights_only=True)
    except DAMAGED:
        whole = False
    if not whole:
        raise UserError(f"{where} is damaged: delete this folder and run again, it is then prepared anew")
    with warnings.catch_warnings():
        # Mode "r", though torch warns of it: a private writable mapping larger than the memory is refused.
        warnings.filterwarnings("ignore", message=".*not writable")
        return {"images": torch.from_numpy(images)} | arrays


def write(where, temporary, shape, blocks, rest):
    """images.npy and rest.pt in the folder `where`, by way of `temporary`, where another may have begun.

    Its file done has 4 bytes a block: the checksum of shape, rest and all pictures so far.  What agrees is
    kept, so that neither a kill nor a changed list nor a damaged file leaves a wrong picture.
    """
    n, each, done, head, packed = shape[0], math.prod(shape[1:]), 0, BytesIO(), BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    torch.save(rest, packed)
    head, packed = head.getvalue(), packed.getvalue()
    crc = zlib.crc32(packed, zlib.crc32(head))
    files = temporary / "images.npy", temporary / "done"
    held = files[0].stat().st_size if files[0].exists() else 0
    if shutil.disk_usage(where.parent).free < n * each - held:
        raise OSError(errno.ENOSPC, f"{n * each / 1e9:.1f} GB are needed")
    try:
        temporary.mkdir(exist_ok=True)
        (temporary / "rest.pt").write_bytes(packed)
        for file in files:
            file.touch()
        with open(files[0], "r+b") as images, open(files[1], "r+b") as marks:
            images.seek(len(head))
            while callable(blocks) and done < n:
                after = zlib.crc32(images.read(min(BLOCK, n - done) * each), crc)
                if marks.read(4) != struct.pack("<I", after):
                    break
                done, crc = min(done + BLOCK, n), after
            images.seek(0)
            images.write(head)
            images.truncate(images.seek(len(head) + done * each))
            marks.truncate(marks.seek(-(-done // BLOCK) * 4))
            for block in blocks(done) if callable(blocks) else blocks:
                block = np.ascontiguousarray(block).data
                images.write(block)
                images.flush()
                crc = zlib.crc32(block, crc)
                marks.write(struct.pack("<I", crc))
                marks.flush()  # after the pictures
            os.fsync(images.fileno())
        temporary.rename(where)
        (where / "done").unlink()
    except Exception:  # an interrupt is none
        shutil.rmtree(temporary, ignore_errors=True)
        if not where.exists():  # else another process was faster: its copy is as good
            raise


@contextmanager
def placed(name, root):
    """Whatever goes wrong with the files of set `name` becomes one line that says what to place where."""
    try:
        yield
    except ImportError as e:
        raise UserError(f"{name} needs the package {e.name}: pip install {e.name}") from e
    except Exception as e:  # URLError, RuntimeError, ValueError, gdown's own and others
        raise UserError(f"{name} is not there: {brief(e)}; place {PLACE[name]} in {root}/, "
                        "or give the path of a folder of pictures") from e


def brief(e):
    return " ".join(str(e).split())[:160] or type(e).__name__


# ---- minibatches

def warp(x, amount=1.0, share=0.8):
    """Some pictures of x (n, C, H, W) turned, stretched, sheared and moved at random, its edges continued.

    `amount` 1: turned by up to 20 degrees, sides stretched by up to 28 %, sheared by up to a fifth, moved by
    up to a fourteenth (2 of 28 pixels); 0: x itself.  `share`: of the pictures; the others stay as they
    are, so that one who learns to draw what looks like data when both are warped draws data, not warped data:
    the better the fewer are warped.  Differentiable.
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
        return F.grid_sample(x.float(), grid, padding_mode="border", align_corners=False)


class Batches:
    """Endless minibatches of `images` uint8 (N, ...) and `others` (N, ...), without replacement in an epoch.

    next() -> x, or (x, *others) with others.  x float32 (batch_size, ...) on `device`, 0..255 mapped to
    scale[0]..scale[1]; of the others integers come as int64, floats, uint8 and bool as they are.
    Epoch e visits the order randperm(N) seeded with (seed, e), B = batch_size * world pictures at a time, of
    which `rank` takes its slice, so that all ranks together see the batch of one process.  The N mod B left
    over are dropped in that epoch; the next one leaves out others.  `per_epoch`: minibatches in an epoch.
    `resident`: whether the data live on the device (None: if they fit); if not, one thread gathers the next
    minibatch on the host while this one is in use.  The device is never waited for.
    Raises UserError for lengths, types or sizes that do not agree.
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
        self.resident = resident
        if resident:
            self.tensors = [t.to(self.device) for t in self.tensors]
        else:
            self.thread, self.ahead = ThreadPoolExecutor(1), None
        self.epoch, self.position, self.order = 0, 0, (None, None)

    def __iter__(self):
        return self

    def __next__(self):
        if self.resident:
            index = self._index(self.epoch, self.position)
            items = [t.index_select(0, index) for t in self.tensors]
            self._advance()
        else:
            items = (self.ahead or self._fetch()).result()
            self._advance()
            self.ahead = self._fetch()
            items = [t.to(self.device, non_blocking=True) for t in items]
        low, high = self.scale
        x = items[0].float().div_(255)
        x = x if (low, high) == (0, 1) else x.mul_(high - low).add_(low)
        return (x, *items[1:]) if len(items) > 1 else x

    def _advance(self):
        self.position += 1
        if self.position == self.per_epoch:
            self.epoch, self.position = self.epoch + 1, 0

    def _index(self, epoch, position):
        """This rank's rows of minibatch `position` in `epoch`."""
        if self.order[0] != epoch:
            seed = int(np.random.SeedSequence([self.seed % 2**64, epoch]).generate_state(1)[0])
            order = torch.randperm(self.n, generator=torch.Generator().manual_seed(seed))
            if self.resident and self.cuda:  # pinned: a copy from ordinary memory waits for the device
                order = order.pin_memory().to(self.device, non_blocking=True)
            self.order = epoch, order
        start = position * self.batch + self.rank * self.b
        return self.order[1][start:start + self.b]

    def _fetch(self):
        """Start to gather the minibatch at hand in the thread.

        The thread makes no CUDA call, which could spoil the capture of a CUDA graph in this one.  So pinned
        memory is taken here; its allocator gives a buffer out again only when the copy from it is done.
        """
        into = [torch.empty(self.b, *t.shape[1:], dtype=t.dtype, pin_memory=self.cuda) for t in self.tensors]
        return self.thread.submit(self._gather, into, self.epoch, self.position)

    def _gather(self, into, epoch, position):
        index, place = self._index(epoch, position).sort()  # a mapped file is read in its own order
        place = place.argsort()  # and then put back; index_select, as index_copy_ takes thirty times as long
        rows = [t.index_select(0, index) for t in self.tensors]
        return [torch.index_select(r, 0, place, out=out) for r, out in zip(rows, into)]

    def state_dict(self):
        """The next minibatch, counted in what was handed out, and what it depends on."""
        return {key: getattr(self, key) for key in ("epoch", "position", "n", "batch", "seed")}

    def load_state_dict(self, state):
        """Go on from `state`.  Raises UserError if it is of other data, batch size (all ranks) or seed."""
        for key, what in (("n", "number of pictures"), ("batch", "batch of all ranks"), ("seed", "seed")):
            if state[key] != getattr(self, key):
                raise UserError(f"the checkpoint's {what} is {state[key]}, that of this run "
                                f"{getattr(self, key)}: expected the same"
                                + ", see --batch-size, of each rank" * (key == "batch"))
        if not self.resident and self.ahead:
            self.ahead.result()  # read ahead for nothing: let it end before its place changes
            self.ahead = None
        self.epoch, self.position = state["epoch"], state["position"]
