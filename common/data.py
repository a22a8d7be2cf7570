"""Data sets as uint8 tensors, in memory or memory-mapped, and an endless stream of minibatches.

    faces = load("path/to/folder", size=64)           # or load("mnist"), or load("path/to/file.npz")
    batches = Batches(faces.images, faces.labels, batch_size=128, device="cuda", scale=(-1, 1))
    x, y = next(batches)                              # x (128, 3, 64, 64) in [-1, 1], y (128,), on the device
"""

import gzip
import hashlib
import itertools
import json
import math
import os
import sys
import tarfile
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
from torch import Tensor

from common import UserError, prepare
from common.log import say
from common.prepare import brief, cached, decode_blocks, folder, printable, shuffled

MNIST = {  # file -> published md5 of its decompressed bytes
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637"}
SMALL = {"fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100",
         "svhn": "SVHN"}
PLACE = {  # torchvision set -> files to place in the data folder if it cannot be downloaded
    "fashion-mnist": "the four *-ubyte or *-ubyte.gz in FashionMNIST/raw/",
    "kmnist": "the four *-ubyte or *-ubyte.gz in KMNIST/raw/",
    "cifar10": "cifar-10-python.tar.gz",
    "cifar100": "cifar-100-python.tar.gz",
    "svhn": "train_32x32.mat and test_32x32.mat",
    "stl10": "stl10_binary.tar.gz",
    "celeba": "celeba/img_align_celeba/*.jpg and the five lists celeba/*.txt",
    "flowers102": "flowers-102/jpg/*.jpg, flowers-102/imagelabels.mat and flowers-102/setid.mat",
    "lfw": "lfw-py/ with lfw_funneled/, people.txt and lfw-names.txt",
    "imagenet": "imagenet/ILSVRC2012_devkit_t12.tar.gz and imagenet/ILSVRC2012_img_train.tar",
    "lsun": "lsun/bedroom_train_lmdb/",
    "coco": "coco/annotations/captions_train2014.json and coco/train2014/*.jpg"}
BUILT_IN = ("mnist", "faces", "shapes", "scenes")
BOX = {"celeba": (15, 40, 163, 188), "lfw": (50, 50, 200, 200)}  # left, top, right, bottom; VAE/GAN's code
ARRAYS = ("images", "labels", "test_images", "test_labels")
COLUMNS = {"attributes": "attribute_names", "factors": "factor_names", "style": "style_names",
           "tags": "words"}                         # arrays (N, A) of an .npz -> names of their columns
NAMES = ("names", "values", "words", "classes")     # arrays with these endings have no row per image
GPU_SHARE = 0.5        # fraction of the free GPU memory that a data set may fill
HOST_RESIDENT = 2**30  # bytes; on a CPU a larger set is probably memory-mapped, so prefetch it in a thread


def cut(n, most, share, least=2):
    """How many of n pictures remain for training: the last n / share, from `least` to `most`, are held out.

    Sets that come with their classes mixed keep their order; load() shuffles all others in an order that
    depends only on their size, so that the held-out part has all classes and a resumed run finds the same
    split.  cut(600, 50, 6): 550.  UserError: fewer than two remain.
    """
    stay = n - max(least, min(most, n // share))
    if stay < 2:
        raise UserError(f"{n} picture{'s' * (n != 1)} to train on found: expected {least + 2} at least, as "
                        f"{least} are held out to measure with")
    return stay


def tell(labels):
    """Whether labels (N,) or None have two or more classes.  With only one, any accuracy would be perfect."""
    return labels is not None and len(labels[labels >= 0].unique()) > 1


@dataclass
class Data:
    """A data set.  `images` may be a read-only memory map: index it, never change it in place."""
    name: str
    images: Tensor                      # uint8 (N, C, H, W), C = 1 or 3
    labels: Tensor | None = None        # int64 (N,); -1 = unlabelled (stl10)
    test_images: Tensor | None = None
    test_labels: Tensor | None = None
    classes: list[str] | None = None    # the name of each label
    extra: dict = field(default_factory=dict)  # of some sets: factors, attributes, captions, files, ...


def load(name, data_dir="data", size=None, channels=None, download=True, skip_bad=False):
    """Load a data set: a built-in or torchvision name, a folder of pictures, or an .npz file.

    `size`: crop the centre square and resize it to size x size (bilinear, antialiased).  `channels`: 1 (grey,
    ITU-R 601) or 3 (RGB).  None keeps the set's own, but sets of picture files need a size.  Large sets and
    folders are preprocessed once into data_dir/cache and memory-mapped.  `skip_bad`: skip unreadable files of
    a folder and list them.
    load("mnist"): images (60000, 1, 28, 28), test_images (10000, 1, 28, 28).
    Raises UserError if the name, a file or an argument is wrong.
    """
    root, path, name = *(Path(os.path.expanduser(p)) for p in (data_dir, name)), str(name)
    known = name in BUILT_IN or name in PLACE
    if size is None and name not in (*BUILT_IN, *SMALL) and (known or os.path.isdir(path)):
        raise UserError(f"{name} holds picture files, which may differ in size: give load() a size, 64 say")
    if name == "mnist":
        arrays = mnist(root)
    elif name in BUILT_IN:
        arrays = rendered(name, root, size or 64, channels or 3)
    elif name in SMALL:
        arrays = small(name, root, download)
    elif name in PLACE:
        arrays = large(name, root, size, channels or 3, download)
    elif os.path.isdir(path / "text_c10"):  # unlike Path.is_dir(), it never raises
        arrays, name = captioned(path, root, size, channels, skip_bad), path.resolve().name
    elif os.path.isdir(path):
        arrays, name = folder(path, root, size, channels, skip_bad), path.resolve().name
    elif path.suffix.lower() == ".npz" and os.path.isfile(path):
        arrays, name = npz(path), path.stem
    else:
        found = "is neither known nor a path that exists"
        found = "is a file, but no .npz" if os.path.isfile(path) else found
        raise UserError(f"data set {name!r} {found}: expected one of {', '.join((*BUILT_IN, *PLACE))}, "
                        "a folder of pictures, or an .npz file")
    if not known:
        renumber(arrays, path)
    for key in [key for key in ARRAYS[::2] if key in arrays]:
        x, what = arrays[key], f"{name} has {key.replace('_', ' ')}"
        if x[:prepare.BLOCK].max() < 16 and 0 < (high := x.max().item()) < 16:
            raise UserError(f"{what} with values from 0 to {high}, almost black: expected 0 to 255; "
                            f"multiply them by {255 // high} first")
        arrays[key] = resize(x, size, channels)
    return Data(printable(name), **{key: arrays.pop(key, None) for key in (*ARRAYS, "classes")}, extra=arrays)


# ---- sets that fit in memory

def ubyte(folder, check=None):
    """Images and labels of MNIST and its relatives from the four *-ubyte files in `folder`, plain or gzipped.

    check(file name, its bytes) is called for each file.  Raises what check() raises, OSError, EOFError,
    zlib.error or ValueError.
    """
    arrays = {}
    for key, file in zip(ARRAYS, MNIST):
        packed = folder / f"{file}.gz"
        plain = not packed.is_file() and (folder / file).is_file()
        raw = (folder / file).read_bytes() if plain else gzip.decompress(packed.read_bytes())
        if check:
            check(file, raw)
        shape = np.frombuffer(raw[4:4 + 4 * raw[3]] if len(raw) > 3 else b"", ">i4").tolist()
        start = 4 + 4 * len(shape)
        if raw[:3] != b"\0\0\x08" or len(shape) not in (1, 3) or len(raw) != start + math.prod(shape):
            raise ValueError(f"{file} has {len(raw)} bytes and the shape {shape} in its header")
        a = torch.tensor(np.frombuffer(raw, np.uint8, offset=start)).view(shape)
        arrays[key] = a[:, None] if a.ndim == 3 else a.long()
    if [len(arrays[key]) for key in ARRAYS[::2]] != [len(arrays[key]) for key in ARRAYS[1::2]]:
        raise ValueError(f"images and labels in {folder} differ in number")
    return arrays


def mnist(root):
    """MNIST (LeCun and Cortes) from root/MNIST/raw, checked against the published md5 sums."""
    def check(file, raw):
        if (found := hashlib.md5(raw, usedforsecurity=False).hexdigest()) != MNIST[file]:
            raise ValueError(f"md5 of {file} {found}, expected {MNIST[file]}")

    raw = root / "MNIST" / "raw"
    try:
        return ubyte(raw, check) | {"classes": list("0123456789")}
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{e.filename} is missing: expected the file that comes with the repository; copy it "
                        "there, or point --data-dir at the repository's data/") from None
    except (OSError, EOFError, ValueError, zlib.error) as e:
        raise UserError(f"{raw} is damaged ({brief(e)}): restore it from the repository") from e


def small(name, root, download):
    """A torchvision set that fits in memory, with its test part."""
    with say_what_to_place(name, root):
        import torchvision  # not at the top: it takes seconds to import, and most runs do not need it
        kind, arrays = getattr(torchvision.datasets, SMALL[name]), {}
        if name.endswith("mnist"):
            raw = root / SMALL[name] / "raw"
            if download and not all(any(raw.glob(f"{file}*")) for file in MNIST):
                kind(root, download=True)
            return ubyte(raw) | {"classes": list(kind.classes)}
        if name != "svhn":
            unpack(root / kind.filename, kind.base_folder)
        for prefix, part in (("", "train"), ("test_", "test")):
            kw = {"split": part} if name == "svhn" else {"train": part == "train"}
            d = kind(root, download=download, **kw)
            x = torch.as_tensor(d.data)
            arrays[f"{prefix}images"] = x if name == "svhn" else x.permute(0, 3, 1, 2).contiguous()
            arrays[f"{prefix}labels"] = torch.as_tensor(d.labels if name == "svhn" else d.targets)
    return arrays | {"classes": list(getattr(d, "classes", "0123456789"))}


def unpack(archive, folder):
    """Unpack `folder` from `archive`.  torchvision accepts only its own archive but checks the files."""
    if archive.is_file() and not (archive.parent / folder).exists():
        with tarfile.open(archive) as t:
            t.extraction_filter = getattr(tarfile, "data_filter", None)  # missing before Python 3.10.12
            t.extractall(archive.parent, [m for m in t if m.isfile() and Path(m.name).parent == Path(folder)])


def npz(path):
    """Read, check and shuffle the arrays of an .npz file: images uint8 (N, C, H, W); all others are optional.

    labels (N,); classes (K,); attributes, factors, style, tags (N, A) with attribute_names, factor_names,
    style_names, words (A,); captions (N,) or (N, k); a test_ version of each array with N rows; any others.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is cut off or not an .npz archive: write it anew with numpy.savez")
    arrays, key = {}, None
    try:
        with np.load(path, allow_pickle=False) as z:
            for key in z.files:
                arrays[key] = np.asarray(z[key])
    except Exception as e:  # NumPy and zipfile raise a dozen kinds for damaged files
        raise UserError(f"{path}: {f'array {key}' if key else 'it'} cannot be read ({brief(e)}): write the "
                        "file anew with numpy.savez, without object arrays; lists of several lengths as "
                        "strings (N, k), padded with ''") from e
    if "images" not in arrays:
        raise UserError(f"{path} holds {', '.join(arrays) or 'nothing'}: expected an array images")
    for key, a in arrays.items():
        if expected := misfit(key, a):
            raise UserError(f"{path}: {key} is {a.dtype} {a.shape}: expected {expected}")
    rows = {part: len(arrays.get(f"{part}images", ())) for part in ("", "test_")}
    for key, a in arrays.items():
        part, kind = ("test_", key[5:]) if key.startswith("test_") else ("", key)
        if kind in ("labels", "captions", *COLUMNS) and len(a) != rows[part]:
            raise UserError(f"{path}: {key} has {len(a)} rows for {rows[part]} pictures: expected one row "
                            "per picture")
        if kind in ("images", *COLUMNS) and kind in arrays and a.shape[1:] != arrays[kind].shape[1:]:
            raise UserError(f"{path}: {kind} are {arrays[kind].shape[1:]} and {key} {a.shape[1:]}: expected "
                            "rows of one shape")
        names = arrays.get(COLUMNS.get(kind))
        if names is not None and len(names) != a.shape[1]:
            raise UserError(f"{path} has {len(names)} {COLUMNS[kind]} for {a.shape[1]} columns of {key}: "
                            "expected the same number")
    arrays = {key: to_torch(a) for key, a in arrays.items()}
    for kind in ("attributes", "factors"):
        if kind in arrays:
            names = [f"{kind[:-1]}{i + 1}" for i in range(arrays[kind].shape[1])]
            arrays.setdefault(COLUMNS[kind], names)
    for key, a in arrays.items():  # shuffle, so that both the first and the last rows have all classes
        part = "test_" if key.startswith("test_") else ""
        if len(a) == rows[part] and not key.endswith(NAMES):
            arrays[key] = a[shuffled(range(len(a)))] if torch.is_tensor(a) else shuffled(a)
    return arrays


def misfit(key, a):
    """What was expected of the array `a` called `key` in an .npz file; None if valid."""
    numbers, text, kind = a.dtype.kind in "fiub", a.dtype.kind in "US", key.removeprefix("test_")
    if a.ndim == 0 or not (numbers or text):
        return "numbers or strings, one row or more"
    if kind == "images" and (a.dtype != np.uint8 or a.ndim != 4 or a.shape[1] not in (1, 3) or 0 in a.shape):
        return ("uint8 (N, C, H, W), 0 to 255, N > 0, C = 1 or 3; from floats (N, H, W, C) in [0, 1]: "
                f'({key}.transpose(0, 3, 1, 2) * 255).round().astype("uint8")')
    if kind == "labels" and (a.ndim != 1 or a.dtype.kind not in "iub"):
        return f"integers (N,), one per picture; from others: np.unique({key}, return_inverse=True)[1]"
    if kind == "captions" and (not text or a.ndim > 2 or 0 in a.shape):
        return "strings (N,) or (N, k), one or k sentences per picture"
    if kind in COLUMNS and (not numbers or a.ndim != 2 or 0 in a.shape or not (np.abs(a) < 1e30).all()):
        return "numbers (N, A), none of them NaN or infinite"
    if kind in (*COLUMNS.values(), "classes") and (not text or a.ndim != 1 or len(set(a.tolist())) < len(a)):
        return "strings (A,), one for each name, all different"
    return None


def renumber(arrays, path):
    """Renumber the labels from 0 without gaps and name them in `classes`.  -1 stays "no label".

    With captions, classes that occur only among test pictures are numbered last.  Without captions no
    network could learn these classes, so test_labels are dropped.
    """
    parts = {key: arrays[key].long() for key in ("labels", "test_labels") if arrays.get(key) is not None}
    values = torch.cat([torch.zeros(0).long(), *parts.values()]).unique()
    if (values < -1).any():
        raise UserError(f"{path} has a label {values[0]}: expected 0, 1, ... for classes, -1 for no label")
    seen = parts.get("labels", values[:0]).unique()
    seen, others = seen[seen >= 0], values[(values >= 0) & ~torch.isin(values, seen)]
    unknown = ~torch.isin(parts.get("test_labels", values[:0]), seen)
    if unknown.any() and "captions" not in arrays:
        say(f"{path}: test_labels are left out, as {int(unknown.sum()):,} of {len(unknown):,} test pictures "
            "have no label, or one that no training picture has", sys.stderr)
        arrays["test_labels"], others = None, others[:0]
        del parts["test_labels"]
    values, names, high = torch.cat([seen, others]), arrays.get("classes"), max([-1, *seen, *others])
    if len(values) > max(100, len(arrays["images"]) // 2):
        raise UserError(f"{path} has {len(values):,} different labels for {len(arrays['images']):,} "
                        "pictures: expected classes of several pictures each")
    if names is not None and len(values) and (high < len(names) or len(names) == len(values)):
        arrays["classes"] = [names[v] for v in values] if high < len(names) else \
            [names[i] for i in values.argsort().argsort()]
    elif names is not None and parts:
        raise UserError(f"{path} has {len(names)} classes for labels up to {high}: expected a name for each")
    elif len(values) and (high >= len(values) or len(others)):
        arrays["classes"] = [str(v) for v in values.tolist()]
    ordered, which = values.sort()
    for key, y in parts.items():
        new = which[torch.searchsorted(ordered, y).clamp_(max=len(values) - 1)] if len(values) else y
        arrays[key] = torch.where(y < 0, y, new) if (y >= 0).any() else None


def to_torch(a):
    """Convert strings to a list, floats to float32, integers to int64; uint8 and bool keep their type."""
    a = np.asarray(a)
    if a.dtype.kind in "US":
        return (np.char.decode(a, "utf-8", "replace") if a.dtype.kind == "S" else a).tolist()
    keep = a.dtype in (np.uint8, np.bool_)
    kind = a.dtype if keep else np.float32 if a.dtype.kind == "f" else np.int64
    return torch.from_numpy(np.ascontiguousarray(a).astype(kind, copy=False))


def resize(images, size, channels):
    """Crop uint8 (N, C, H, W) to the centre square, resize to (size, size) and convert to grey or RGB."""
    n, c, h, w = images.shape
    if size in (None, h) and size in (None, w) and channels in (None, c):
        return images
    if min(h, w) == 1 < (size or 1):
        raise UserError(f"pictures of {w}x{h} pixels would become one flat colour: expected larger ones")
    s, out = min(h, w), torch.empty(n, channels or c, size or h, size or w, dtype=torch.uint8)
    for i in range(0, n, prepare.BLOCK):
        x = images[i:i + prepare.BLOCK]
        if c == 3 and channels == 1:  # Pillow's integers for ITU-R 601, so that files and arrays agree
            r, g, b = x.int().unbind(1)
            x = ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16)[:, None]
        if size:
            x = x[..., (h - s) // 2:(h - s) // 2 + s, (w - s) // 2:(w - s) // 2 + s].float()
            x = F.interpolate(x, (size, size), mode="bilinear", antialias=True).round().clamp(0, 255)
        out[i:i + prepare.BLOCK] = x  # grey is copied to three channels
    return out


# ---- sets of picture files, decoded and resized once into a memory-mapped array

def captioned(path, root, size, channels, skip_bad=False):
    """Birds and flowers: pictures in images/ or jpg/, captions in text_c10/CLASS/NAME.txt, one per line.

    The test part consists of whole classes: those in testclasses.txt or testids.txt, else those not in
    trainvalclasses.txt or trainvalids.txt (one class name, or number from 1, per line), else the last
    quarter.
    """
    found = sorted((path / "text_c10").glob("*/*.txt"))
    texts = {t.stem: t for t in found}
    if len(texts) < len(found):
        twice = next(t.name for t in found if texts[t.stem] != t)
        raise UserError(f"{path}/text_c10 has {twice} in two classes: expected each name once")
    within = "jpg" if (path / "jpg").is_dir() else "images"
    if not (path / within).is_dir():
        raise UserError(f"{path} has text_c10/, but no images/ or jpg/: expected the pictures there")
    arrays, captions = folder(path / within, root, size, channels, skip_bad), []
    files, images = arrays["files"], arrays["images"]
    if "test_files" in arrays:
        files, images = files + arrays["test_files"], torch.cat([images, arrays["test_images"]])
    for f in files:
        text = texts.get(Path(f).stem)
        if text is None:
            raise UserError(f"{path / within / f} has no captions: expected a file "
                            f"text_c10/CLASS/{Path(f).stem}.txt")
        captions.append([line.strip() for line in read_text(text).splitlines() if line.strip()])
        if not captions[-1]:
            raise UserError(f"{text} is empty: expected one caption per line")
    classes = sorted({t.parent.name for t in found})
    test = set(classes[-(len(classes) // 4):]) if len(classes) > 3 else set()
    for file, is_test in (("trainvalids.txt", False), ("trainvalclasses.txt", False), ("testids.txt", True),
                          ("testclasses.txt", True)):
        if (path / file).is_file():
            listed = set(read_text(path / file).split())
            if listed.isdisjoint(classes) and listed.isdisjoint(map(str, range(1, len(classes) + 1))):
                raise UserError(f"{path / file} names none of the {len(classes)} classes: expected some, as "
                                f"{classes[0]} or 1, one per line")
            test = {c for i, c in enumerate(classes, 1) if bool({c, str(i)} & listed) == is_test}
    y = torch.tensor([classes.index(texts[Path(f).stem].parent.name) for f in files])
    held = torch.tensor([classes[i] in test for i in y.tolist()])
    if held.all():
        raise UserError(f"{path} holds out all of its {len(classes)} classes: expected some to train on")
    out = {"classes": classes}
    for part, rows in (("", ~held), ("test_", held)):
        if rows.any():
            which = rows.nonzero()[:, 0].tolist()
            out |= {f"{part}images": images[which], f"{part}labels": y[which],
                    f"{part}captions": [captions[i] for i in which],
                    f"{part}files": [files[i] for i in which]}
    return out


def large(name, root, size, channels, download):
    """A torchvision set of many files or much data; celeba and lfw are cropped to the face."""
    def make():
        with say_what_to_place(name, root):
            if name == "stl10":
                blocks, n, rest = stl10(root, size, channels, download)
            else:
                sources, n, rest = listed(name, root, download)

                def work(source):
                    return prepare.decode(source, size, channels, BOX.get(name))

                def blocks(start):
                    return decode_blocks(name, sources, start, work, n)
        return (n, channels, size, size), blocks, rest

    return cached(root / "cache" / f"{name}-{size}x{channels}", make)


def listed(name, root, download):
    """(sources, their number, further arrays) of a set whose pictures are files or database entries.

    sources: a list, or a function that yields them from a given index on.
    """
    if name == "lsun":
        import lmdb
        path = root / "lsun" / "bedroom_train_lmdb"
        env = lmdb.open(str(path), create=False, readonly=True, lock=False)

        def values(start):  # in file order: random keys would seek
            with env.begin() as txn:
                cursor = txn.cursor()
                for key in itertools.islice(cursor.iternext(values=False), start, None):
                    yield f"{path}: {key.decode(errors='replace')}", BytesIO(cursor.value())
        return values, env.stat()["entries"], {}
    if name == "coco":
        lists = json.loads(read_text(root / "coco" / "annotations" / "captions_train2014.json"))
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
    if name == "flowers102":  # all three parts; scripts split by class
        parts = [datasets.Flowers102(root, split=s, download=download) for s in ("train", "val", "test")]
        pairs = sorted((f, y) for d in parts for f, y in zip(d._image_files, d._labels))
        classes = getattr(datasets.Flowers102, "classes", None)
    elif name == "lfw":  # never download=True: torchvision refuses it
        class People(datasets.LFWPeople):
            def _check_integrity(self):
                return True  # it would check the archive, which is not read

        d = People(root, split="10fold", image_set="funneled")
        pairs, classes = list(zip(d.data, d.targets)), list(d.class_to_idx)
    else:
        d = datasets.ImageNet(root / "imagenet", split="train")
        pairs, classes = d.samples, [", ".join(c) for c in d.classes]
    files, labels = zip(*shuffled(pairs))
    return files, len(files), {"labels": torch.tensor(labels), "classes": classes,
                               "files": [Path(f).name for f in files]}


def stl10(root, size, channels, download):
    """(blocks, their number, further arrays): STL-10's labelled, unlabelled (label -1) and test pictures."""
    from torchvision.datasets import STL10
    unpack(root / STL10.filename, STL10.base_folder)
    train, test = (STL10(root, split=s, download=download) for s in ("train", "test"))
    more = np.memmap(root / "stl10_binary" / "unlabeled_X.bin", np.uint8, "r").reshape(-1, 3, 96, 96)
    more = more.swapaxes(2, 3)  # the file stores pictures column by column
    labels = torch.cat([torch.as_tensor(train.labels).long(), torch.full((len(more),), -1)])
    order = shuffled(range(len(labels)))  # spread the unlabelled pictures
    rows = [*order, *range(len(labels), len(labels) + len(test))]

    def blocks(start):
        for i in range(start, len(rows), prepare.BLOCK):
            x = np.stack([train.data[j] if j < len(train) else more[j - len(train)] if j < len(labels) else
                          test.data[j - len(labels)] for j in rows[i:i + prepare.BLOCK]])
            yield resize(torch.from_numpy(x), size, channels).numpy()

    return blocks, len(rows), {
        "labels": labels[order], "test_labels": torch.as_tensor(test.labels).long(), "classes": train.classes,
        "test_from": len(labels)}


def rendered(name, root, size, channels):
    """Images rendered by render.py, with their ground truth; shapes and scenes are always in colour."""
    from common import render
    words = {"shapes": render.SHAPES, "scenes": render.SCENES}.get(name)
    channels = 3 if words else channels

    def make():
        say(f"rendering {name} {size}x{size}, once", sys.stderr)
        if words:  # block by block
            rest = render.captioned(words, words.pictures, size)
            what = [torch.cat([rest[key], rest[f"test_{key}"]]) for key in ("attributes", "style")]
            n, rest["test_from"] = len(what[0]), len(rest["style"])
        else:
            rest = render.faces(size=size, channels=channels, plain=channels == 1)
            images = rest.pop("images")
            n = len(images)

        def blocks(start):
            for i in range(start, n, prepare.BLOCK):
                rows, done = slice(i, i + prepare.BLOCK), min(n, i + prepare.BLOCK)
                yield (render.paint(*(t[rows] for t in what), size, words) if words else images[rows]).numpy()
                live = sys.stderr.isatty()
                if live or done == n or done % (32 * prepare.BLOCK) == 0:
                    say("\r" * live + f"rendering {name}: {done:,} of {n:,}  ", sys.stderr,
                        "" if live and done < n else "\n")

        return (n, channels, size, size), blocks, rest

    code = hashlib.sha256(Path(render.__file__).read_bytes()).hexdigest()[:16]  # changed code renders again
    return cached(root / "cache" / f"{name}-{size}x{channels}-{code}", make)


@contextmanager
def say_what_to_place(name, root):
    """Turn any error with the files of set `name` into one line that says which files to place where."""
    try:
        yield
    except ImportError as e:
        raise UserError(f"{name} needs the package {e.name}: pip install {e.name}") from e
    except Exception as e:  # URLError, RuntimeError, ValueError, gdown's own and others
        raise UserError(f"{name} is not there: {brief(e)}; place {PLACE[name]} in {root}/, "
                        "or give the path of a folder of pictures") from e


def read_text(path):
    """Read a UTF-8 file, with or without a byte order mark, whatever the system's encoding."""
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read ({brief(e)}): expected text in UTF-8") from e


# ---- minibatches

def warp(x, amount=1.0, share=0.8):
    """Randomly rotate, stretch, shear and shift a share of the images x (n, C, S, S), repeating their edges.

    `amount` 1: rotate by up to 20 degrees, stretch each side by up to 28 %, shear by up to a fifth, shift by
    up to a fourteenth of the side (2 of 28 pixels); 0: x itself.  `share`: fraction of the batch to warp.  A
    small share keeps G from learning to draw warped images.  Differentiable; float32 out.
    """
    if not amount:
        return x
    size = amount * (torch.rand(len(x), 1, device=x.device) < share)
    drawn = (size * (2 * torch.rand(len(x), 6, device=x.device) - 1)).unbind(1)
    bounds = 0.35, 0.2, 0.25, 0.25, 1 / 7, 1 / 7            # not a tensor: a captured step cannot copy one
    turn, shear, wide, high, right, down = (bound * part for bound, part in zip(bounds, drawn))
    maps = torch.stack([wide.exp() * turn.cos(), shear - high.exp() * turn.sin(), right,
                        wide.exp() * turn.sin(), high.exp() * turn.cos(), down], 1).unflatten(1, (2, 3))
    with torch.autocast(x.device.type, enabled=False):      # a bfloat16 grid would blur even unwarped images
        grid = F.affine_grid(maps, x.shape, align_corners=False)
        # Clamp to the centres of the outermost pixels: padding_mode="border", which Apple's GPUs lack.
        edge = 1 - 1 / x.shape[3]
        return F.grid_sample(x.float(), grid.clamp(-edge, edge), align_corners=False)


class Batches:
    """Endless minibatches of `images` uint8 (N, ...) and `others` (N, ...), without replacement in an epoch.

    next() -> x, or (x, *others) if there are any.  x is float32 (batch_size, ...) on `device`, with 0..255
    mapped to scale[0]..scale[1].  Integer others become int64; floats, uint8 and bool keep their type.
    Epoch e visits randperm(N), seeded with (seed, e), in batches of batch_size * world images.  Each rank
    takes its slice, so all ranks together see the batch of a single process.  Each epoch drops the remainder,
    which differs between epochs.  `per_epoch`: minibatches per epoch.
    `resident`: keep the data on the device (None: if it fits).  If False, a thread gathers the next minibatch
    on the host while the current one is in use.  Nothing waits for the device.
    Raises UserError if lengths, types or sizes do not match.
    """

    def __init__(self, images, *others, batch_size, device="cpu", seed=0, scale=(0., 1.), rank=0, world=1,
                 resident=None):
        for i, t in enumerate((images, *others)):
            if t is None:
                raise UserError(f"item {i} is None: this data set has no labels or attributes, which are "
                                "needed here")
            if len(t) != len(images):
                raise UserError(f"item {i} has {len(t)} rows for {len(images)} pictures: expected the same "
                                "number")
        if images.dtype != torch.uint8:
            raise UserError(f"pictures are {images.dtype}: expected torch.uint8")
        if not 0 <= rank < world:
            raise UserError(f"rank is {rank}: expected 0 to {world - 1}")
        self.n, self.b, self.batch = len(images), batch_size, batch_size * world
        self.rank, self.seed, self.scale, self.device = rank, seed, scale, torch.device(device)
        if not 0 < self.batch <= self.n:
            expected = f"{self.n // world} at most, see --batch-size" if self.n // world > 1 else \
                f"more pictures, {2 * world} at least"
            raise UserError(f"a batch of {batch_size} on each of {world} ranks from {self.n} pictures: "
                            f"expected {expected}")
        if self.n > 1 and all((x == images[:1]).all() for x in images.split(prepare.BLOCK)):
            raise UserError(f"all {self.n} pictures are the same: expected different ones")
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
            if self.resident:  # pinned, as a copy from pageable memory would wait for the device
                order = (order.pin_memory() if self.cuda else order).to(self.device, non_blocking=self.cuda)
            self.order = self.epoch, order
        start = self.position * self.batch + self.rank * self.b
        return self.order[1][start:start + self.b]

    def _gather(self):
        """Start gathering the next minibatch in the thread -> a Future of the tensors.

        The thread makes no CUDA calls, which could break a CUDA graph capture in the main thread.  Therefore
        pinned memory is allocated here; its allocator reuses a buffer only after the copy from it is done.
        """
        into = [torch.empty(self.b, *t.shape[1:], dtype=t.dtype, pin_memory=self.cuda) for t in self.tensors]
        index, place = self._index().sort()  # read a memory map in file order,
        place = place.argsort()  # then restore the batch order; index_copy_ would take 30 times as long

        def gather():
            rows = [t.index_select(0, index) for t in self.tensors]
            return [torch.index_select(r, 0, place, out=out) for r, out in zip(rows, into)]

        return self.thread.submit(gather)

    def state_dict(self):
        """The position of the next minibatch, and everything that its content depends on."""
        return {key: getattr(self, key) for key in ("epoch", "position", "n", "batch", "seed")}

    def load_state_dict(self, state):
        """Resume from `state`.  UserError: another number of pictures, total batch size or seed."""
        for key, what in (("n", "number of pictures"), ("batch", "batch of all ranks"), ("seed", "seed")):
            if state[key] != getattr(self, key):
                raise UserError(f"the checkpoint's {what} is {state[key]}, that of this run "
                                f"{getattr(self, key)}: expected the same"
                                + ", see --batch-size, of each rank" * (key == "batch"))
        self.ahead = None  # drop the prefetched minibatch
        self.epoch, self.position = state["epoch"], state["position"]
