"""Picture files: find them in folders, decode them in threads, cache them as a memory-mapped uint8 array."""

import hashlib
import itertools
import json
import math
import os
import re
import shutil
import stat
import sys
import time
import unicodedata
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO

import numpy as np
import torch
from PIL import Image

from common import UserError, intact
from common.log import say

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "PPM")   # only these: an EPS file would run a program
GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B")     # Pillow's modes without colour
SPLIT = re.compile(r"(train|test|val)(ing|id|idation)?([ _-]?(set|images|data|pictures|[0-9]+))*",
                   re.IGNORECASE)          # parts of a set: train, Test, val2017, training_set
LITTER = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information")   # made by operating systems
TURNS = dict(enumerate(map(Image.Transpose, (0, 3, 1, 5, 4, 6, 2)), 2))  # EXIF orientation -> upright
BLOCK = 1024           # images per block; changing it invalidates caches


# ---- folders

def folder(path, root, size, channels, skip_bad=False):
    """Load a folder of pictures, shuffled; sub-folders, if any, are classes, or train/ and test/."""
    files, left_out = walk(path)
    parts = layout(sorted(files), path)
    left_out["pictures beside the two parts"] = len(files) - sum(map(len, parts.values()))
    if left_out := ", ".join(f"{n:,} {what}" for what, n in sorted(left_out.items()) if n):
        say(f"left out of {path}: {left_out}", sys.stderr)
    if not files:
        raise UserError(f"{path} holds no pictures: expected {' '.join(SUFFIXES)} in it, or in a sub-folder "
                        "for each class")
    digest = hashlib.sha256(json.dumps([1 + len(parts), str(path.resolve()), skip_bad]).encode())
    for f, about in sorted(files.items()):
        digest.update(json.dumps((f, about)).encode())

    def make():
        grey, scales = scan([os.path.join(path, f) for f in files], path)
        c = channels or (1 if grey else 3)

        def work(file):
            return decode(os.path.join(path, file), size, c, scales=scales)

        if skip_bad:
            found = zip(files, in_threads(work, files))
            bad = {f: str(error) for f, error in found if isinstance(error, UserError)}
            if bad:
                say(f"left out, as they cannot be read: {listing(list(bad.values()))}", sys.stderr)
            for prefix, part in parts.items():
                parts[prefix] = {f: c for f, c in part.items() if f not in bad}
                if not parts[prefix]:
                    raise UserError(f"none of the {len(part):,} {'test ' * bool(prefix)}pictures in {path} "
                                    "can be read")
        for prefix, part in parts.items():
            parts[prefix] = dict(shuffled(list(part.items())))
        names = [f for part in parts.values() for f in part]
        rest = {"test_from": len(parts[""])} if len(parts) > 1 else {}
        classes = sorted({c for part in parts.values() for c in part.values()} - {None})
        for prefix, part in parts.items():
            rest[f"{prefix}files"] = list(part)
            if None not in part.values():
                index = {c: i for i, c in enumerate(classes)}
                rest[f"{prefix}labels"] = torch.tensor([index[c] for c in part.values()])
                rest["classes"] = list(map(printable, classes))
        cure = "replace or remove them, or leave them out by --skip-bad"
        return (len(names), c, size, size), lambda start: decode_blocks(
            path.resolve().name, names, start, work, cure=cure), rest

    label = re.sub(r"[^\w.-]", "_", path.resolve().name)
    return cached(root / "cache" / f"{label}-{size}x{channels or 'own'}-{digest.hexdigest()[:16]}", make)


def walk(path):
    """-> {picture's path relative to `path`: [size, mtime]}, and a Counter of what was skipped and why.

    Links to folders are followed last, and no folder is read twice.  Ignores LITTER and hidden files and
    folders.
    """
    found, left_out, seen, folders, links = {}, Counter(), set(), [str(path)], []
    root = os.path.realpath(path)
    while folders or links:
        at = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(at)
        if real in seen or root.startswith(os.path.join(real, "")):
            left_out["links to what is read already"] += 1
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(at), key=lambda e: e.name)
        except OSError:
            left_out["folders that cannot be read"] += 1
            continue
        for e in entries:
            if e.name.startswith(".") or e.name in LITTER:
                continue
            try:
                s, ending = os.stat(e), os.path.splitext(e.name)[1].lower()
            except OSError:
                left_out["dangling links"] += 1
                continue
            if stat.S_ISDIR(s.st_mode):
                (links if e.is_symlink() else folders).append(e.path)
            elif not stat.S_ISREG(s.st_mode):
                left_out["pipes, sockets or devices"] += 1
            elif ending not in SUFFIXES:
                left_out[ending or "files without an ending"] += 1
            else:
                found[os.path.relpath(e, path).replace(os.sep, "/")] = [s.st_size, s.st_mtime_ns]
    return found, left_out


def layout(files, path):
    """-> {"": {file: class}}, and with folders train/ and test/ also "test_".  Class None: no sub-folders.

    A single folder that contains everything, or all of a part, is a wrapper, not a class.  val/ is the test
    part if there is no test/.  Files beside train/ and test/ belong to neither part.  UserError: parts
    without train/, or pictures beside classes.
    """
    def top(f, depth):
        return unicodedata.normalize("NFC", f.split("/", depth + 1)[depth]) if f.count("/") > depth else None

    depth, parts = 0, {"": files}
    while len(tops := {top(f, depth) for f in files}) == 1 and None not in tops:
        depth += 1
    kinds = {t: found[1].lower() for t in tops if t and (found := SPLIT.fullmatch(t))}
    if "train" in kinds.values() and len(set(kinds.values())) > 1:
        test = "test" if "test" in kinds.values() else "val"
        parts = {part: [f for f in files if kinds.get(top(f, depth)) == kind]
                 for part, kind in (("", "train"), ("test_", test))}
        depth += 1
    elif tops and tops == {t for t, kind in kinds.items() if kind != "train"}:
        raise UserError(f"{path} holds {' and '.join(sorted(tops))}, but no train: "
                        "expected train and test, or a sub-folder for each class")
    depths, classes = dict.fromkeys(parts, depth), {}
    while True:
        classes = {part: {top(f, depths[part]) for f in some} for part, some in parts.items()}
        wrapped = [part for part, found in classes.items() if len(found) == 1 and None not in found
                   and not any(found < other for other in classes.values())]
        if not wrapped:
            break
        depths.update({part: depths[part] + 1 for part in wrapped})
    for part, some in parts.items():
        parts[part] = {f: top(f, depths[part]) for f in some}
        flat = sum(c is None for c in parts[part].values())
        if 0 < flat < len(some):
            raise UserError(f"{path} holds {flat} pictures beside {len(some) - flat} in sub-folders: "
                            "expected pictures alone, or a sub-folder for each class")
    return parts


def shuffled(rows):
    """The rows as a list, shuffled in an order that depends only on their number."""
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()]


# ---- decoding

@contextmanager
def opened(source):
    """Open the picture at a path or in a (name, file) pair; an error in the block becomes a UserError."""
    name, file = source if isinstance(source, tuple) else (source, source)
    try:
        with Image.open(file, formats=FORMATS) as im:
            yield im
    except Exception as e:  # Pillow raises a dozen kinds for damaged files
        raise UserError(f"{printable(name)} ({brief(e)})") from e


def scan(sources, name):
    """-> whether all pictures are grey, and one scaling for all pictures with more than 8 bits.

    {"I" or "F": (low, factor, half)}: uint8 = (value - low) factor + half.  Raises UserError if the range of
    the values is ambiguous.
    """
    def mode(source):
        with opened(source) as im:
            return im.mode

    def limits(source):
        with opened(source) as im:
            a = np.asarray(im)
            return a.min(), a.max()

    modes = [m if isinstance(m, str) else "" for m in in_threads(mode, sources)]   # decode() reports errors
    scales = {}
    for kind in "IF":
        deep = in_threads(limits, [s for s, m in zip(sources, modes) if m.startswith(kind)])
        if known := [pair for pair in deep if isinstance(pair, tuple)]:
            low, high = float(np.min(known)), float(np.max(known))
            if kind == "I" and 0 <= low <= high < 2**16:
                bits = next(b for b in (8, 10, 12, 14, 16) if high < 2**b)
                scales[kind] = 0, 2.0 ** (8 - bits), 0
            elif kind == "F" and (0 <= low <= high <= 1 or -1 <= low <= -0.5 and high <= 1):
                scales[kind] = (0, 255, 0.5) if low >= 0 else (-1, 127.5, 0.5)
            elif kind == "F" and low >= 0 and 128 <= high <= 255:
                scales[kind] = 0, 1, 0.5
            else:
                raise UserError(f"{name} has pictures with values from {low:g} to {high:g}: expected "
                                "integers 0 to 65535, or floats 0 to 1, -1 to 1 or 0 to 255")
    return set(modes) <= {"", *GREY_MODES}, scales


def decode(source, size, channels, box=None, scales=None):
    """One picture as uint8 (channels, size, size): upright, on white, cropped to `box` or its centre."""
    with opened(source) as im:
        if box is None:
            im.draft("L" if channels == 1 else "RGB", (2 * size, 2 * size))  # no larger a JPEG than needed
        turn = None
        with suppress(Exception):  # a broken EXIF tag
            turn = TURNS.get(im.getexif().get(0x0112))
        if im.mode[0] in "IF":  # convert() would clip values above 255 to white
            low, factor, half = scales[im.mode[0]]
            im = Image.fromarray(((np.asarray(im) - float(low)) * factor + half).astype(np.uint8))
        if im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info:
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        im = im.convert("L" if channels == 1 else "RGB")
        im, s = im if turn is None else im.transpose(turn), min(im.size)
        if s == 1 < size:
            raise ValueError(f"{im.width}x{im.height} pixels would become one flat colour")
        left, top = (im.width - s) // 2, (im.height - s) // 2
        im = im.crop(box or (left, top, left + s, top + s))  # resize(box=) would read beyond it
        a = np.asarray(im.resize((size, size), Image.Resampling.BILINEAR))
    return a[None] if channels == 1 else a.transpose(2, 0, 1)


def in_threads(work, sources):
    """Yield work(source), or the UserError that it raised, for each source in order.

    Threads suffice: Pillow and zlib release the GIL.
    """
    def attempt(source):
        try:
            return work(source)
        except UserError as e:
            return e

    sources = iter(sources)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(16, cpus)) as pool:
        while part := list(itertools.islice(sources, BLOCK)):  # map() would submit all sources at once
            yield from pool.map(attempt, part)


def decode_blocks(name, sources, start, work, n=None, cure="replace them"):
    """Yield work(source) for the sources from `start` to n, stacked in blocks of BLOCK; report progress.

    Raises UserError with a list of all pictures that cannot be read.
    """
    n, began, live, bad = n or len(sources), time.perf_counter(), sys.stderr.isatty(), []
    if start:
        say(f"preparing {name}: continuing at picture {start + 1:,} of {n:,}", sys.stderr)
    sources = sources(start) if callable(sources) else itertools.islice(sources, start, None)
    pictures = in_threads(work, sources)
    for done in itertools.chain(range(start + BLOCK, n, BLOCK), [n]):
        block = list(itertools.islice(pictures, BLOCK))
        bad += [str(x) for x in block if isinstance(x, UserError)]
        if not bad:
            yield np.stack(block)
        rate = (done - start) / (time.perf_counter() - began)
        if live or done == n or done % (32 * BLOCK) == 0:
            say("\r" * live + f"preparing {name}: {done:,} of {n:,} pictures, {rate:,.0f}/s, "
                f"{(n - done) / rate:.0f} s left  ", sys.stderr, "" if live and done < n else "\n")
    if bad:
        raise UserError(f"{len(bad)} of {n:,} pictures cannot be read, {cure}: {listing(bad)}")


def listing(bad):
    """A list of unreadable pictures for a message: at most 50 by name."""
    return "; ".join(bad[:50]) + f"; and {len(bad) - 50:,} more" * (len(bad) > 50)


def printable(name):
    """A file name with line breaks and bytes that are not UTF-8 escaped."""
    return str(name).encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


def brief(e):
    """The message of an exception in one short line."""
    return " ".join(str(e).split())[:160] or type(e).__name__


# ---- the cache

@contextmanager
def locked(path):
    """Hold an exclusive lock, which the system releases if the process is killed.  Where the file system has
    no locks, there is none."""
    with open(path, "a+b") as f:
        if not lock(f):
            say(f"waiting for the process that prepares {path.stem}", sys.stderr)
            while not lock(f):
                time.sleep(0.2)
        yield


def lock(f):
    """Lock the open file `f` until it is closed; False if another process holds the lock."""
    try:
        if fcntl:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:  # Windows
            import msvcrt
            f.seek(0)
            msvcrt.locking(f.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        pass
    return True


def cached(where, make):
    """Memory-map the images in the folder `where` and check them; preprocess them first if necessary.

    make() -> shape of the images, blocks, dict of further arrays.  blocks(i) yields uint8 arrays of BLOCK
    images from index i on, so that interrupted preprocessing can resume.
    -> {"images": Tensor, **further arrays}.  If these include "test_from", "test_images" begin at that index.
    All bytes are checked each time, at about 1.4 GB/s per core: 9 s / cores for a million 3x64x64 images.
    Raises UserError if the folder cannot be written or is damaged.
    """
    try:
        if not where.exists():
            where.parent.mkdir(parents=True, exist_ok=True)
            with locked(where.with_name(f"{where.name}.lock")):
                mine = where.with_name(f"{where.name}.tmp{os.getpid()}")
                for left in sorted(where.parent.glob(f"{where.name}.tmp*")):
                    try:  # we hold the lock, so its owner is dead; else Windows refuses: files are open
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
        seed, each = seed_of(images.shape, (where / "rest.pt").read_bytes()), images[:1].nbytes

        def check(i):
            size = len(images[i:i + BLOCK]) * each
            return checksum(where / "images.npy", images.offset + i * each, size, seed + i)

        found = b"".join(in_threads(check, range(0, len(images), BLOCK)))
        if (where / "checksums").read_bytes() != found:
            raise ValueError
    except Exception as e:
        raise UserError(f"{where} is damaged: delete this folder; the next run creates it again") from e
    with warnings.catch_warnings():
        # Keep mode "r" despite the warning: writable private mappings larger than memory are refused.
        warnings.filterwarnings("ignore", message=".*not writable")
        images, split = torch.from_numpy(images), arrays.pop("test_from", None)
    return arrays | ({"images": images} if split is None else
                     {"images": images[:split], "test_images": images[split:]})


def seed_of(shape, rest):
    """The seed of all blocks' checksums, from the shape of the images and the bytes of rest.pt."""
    return zlib.crc32(rest, zlib.crc32(repr(tuple(shape)).encode()))


def checksum(path, start, size, seed):
    """CRC-32 (4 bytes) of `size` bytes of a file from `start` on, by read(): the pages of a memory map would
    stay in memory."""
    crc = seed % 2**32
    with open(path, "rb") as f:
        f.seek(start)
        while part := f.read(min(size, 2**20)):
            crc, size = zlib.crc32(part, crc), size - len(part)
    return (crc if size == 0 else ~crc % 2**32).to_bytes(4, "little")


def write(where, temporary, shape, blocks, rest):
    """Write images.npy, rest.pt and checksums to `temporary`, which may be partly done; rename it to `where`.

    Each block has a checksum of shape, rest, position and pixels.  Only blocks whose checksum matches are
    kept, so neither a kill nor a changed list nor a damaged file leaves a wrong picture.  Uses write() and no
    memory map, where a full disk would be a bus error.
    """
    n, each, done, head, packed = shape[0], math.prod(shape[1:]), 0, BytesIO(), BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
    torch.save(rest, packed)
    head, seed = head.getvalue(), seed_of(shape, packed.getvalue())
    path, marks = temporary / "images.npy", temporary / "checksums"

    def mark(done):
        return checksum(path, len(head) + done * each, min(BLOCK, n - done) * each, seed + done)

    try:
        temporary.mkdir(exist_ok=True)
        path.touch(), marks.touch()
        if shutil.disk_usage(temporary).free + path.stat().st_size < n * each:
            raise UserError(f"{n * each / 1e9:.1f} GB are needed for {where}: free some space, or give "
                            "another --data-dir")
        (temporary / "rest.pt").write_bytes(packed.getvalue())
        with open(path, "r+b") as images, open(marks, "r+b") as marks:
            images.write(head)
            images.flush()
            while done < n and marks.read(4) == mark(done):
                done = min(done + BLOCK, n)
            images.truncate(images.seek(len(head) + done * each))
            marks.truncate(marks.seek(-(-done // BLOCK) * 4))
            for block in blocks(done) if done < n else ():
                images.write(np.ascontiguousarray(block).data)
                images.flush()
                marks.write(mark(done))
                marks.flush()  # after the pixels
                done += len(block)
            os.fsync(images.fileno())
        temporary.rename(where)
    except Exception:  # not KeyboardInterrupt, after which preprocessing resumes
        shutil.rmtree(temporary, ignore_errors=True)
        if not where.exists():  # otherwise use the copy that another process finished first
            raise
