"""Use a trained generator: --sample, --grid, --real, --set, --export.  Only --real needs the data set.

Each script describes its generator in one function, drawer(args, saved) -> Drawer.  `saved` maps names to
the parts of the checkpoint; saved["about"] is what the script passed to Run.keep() about its data.
"""

import contextlib
import csv
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import UserError, data, log
from common.fuse import sampling
from common.log import say


@dataclass
class Knob:
    """One input of a generator that a user can set: a label, a code, an attribute, a sentence.

    It sets one column of an input (n, ...), or the whole input if `whole`.  names: its categories; if empty,
    the knob is a number and `low` to `high` is its useful range, as a user types it.  read: typed text ->
    value in the input, ValueError if invalid.  tell: a row's value -> text for labels.csv.
    """

    name: str
    low: float = 0.0
    high: float = 1.0
    names: tuple = ()
    read: callable = None
    tell: callable = None
    whole: bool = False
    start: object = None        # initial value in --explore, as a user types it; None: see control()

    def value(self, text):
        """Parse `text`.  UserError: not a value of this knob."""
        try:
            if self.read:
                return self.read(text)
            if self.names:
                numbers = range(len(self.names))
                return self.names.index(text) if text in self.names else numbers.index(int(text))
            number = float(text)
            if not math.isfinite(number):
                raise ValueError
            return number
        except (ValueError, OverflowError) as e:
            known = [*map(str, self.names[:20]), *["..."] * (len(self.names) > 20)]
            expected = f"one of {', '.join(known)}" if known else "a number"
            expected = str(e) if self.read else expected
            raise UserError(f"{self.name} {text!r} found: expected {expected}") from None

    def shown(self, value):
        """Format a value as text."""
        if self.tell:
            return self.tell(value)
        return str(self.names[int(value)]) if self.names else f"{float(value):.4g}"


class Drawer(nn.Module):
    """A trained generator: forward(*inputs) -> pictures (n, C, H, W) in [0, 1].

    function: input tensors (n, ...) -> pictures with values in `scale`.  draw(n): n random rows of each
    input.  nets: name in the checkpoint -> module.  inputs: name -> knobs, in the order of function's
    arguments.  within: a context manager that puts `nets` in sampling mode.  size: rows per batch.
    """

    def __init__(self, function, draw, nets, inputs, scale=(0.0, 1.0), within=None, size=500):
        super().__init__()
        self.nets, self.function, self.draw = nn.ModuleDict(nets), function, draw
        self.inputs, self.scale, self.size = inputs, scale, size
        self.within = within or (lambda: sampling(*self.nets.values()))
        # Knob name -> (index of its input, its column, the knob).
        self.knobs = {knob.name: (i, j, knob) for i, knobs in enumerate(inputs.values())
                      for j, knob in enumerate(knobs)}

    def forward(self, *inputs):
        low, high = self.scale
        return (self.function(*inputs).float() - low) / (high - low)

    def ask(self, inputs, wishes):
        """Set knobs in all rows, in place.  wishes: name -> text.  UserError: unknown knob or value."""
        for name, text in wishes.items():
            if name not in self.knobs:
                takes = ", ".join(self.knobs) or "nothing but noise"
                raise UserError(f"{name}={text} found: this generator takes {takes}")
            i, j, knob = self.knobs[name]
            column = inputs[i] if knob.whole else inputs[i][:, j]
            column[:] = torch.as_tensor(knob.value(text)).to(column)
            if not column.isfinite().all():
                raise UserError(f"{name}={text[:40]} found: too large for float32")
        return inputs

    def asked(self, inputs):
        """The knob settings of each row: a list of dicts, knob name -> text."""
        columns = {name: (inputs[i] if knob.whole else inputs[i][:, j]).cpu() for name, (i, j, knob)
                   in self.knobs.items()}
        return [{name: self.knobs[name][2].shown(column[row]) for name, column in columns.items()}
                for row in range(len(inputs[0]))]

    def pictures(self, inputs):
        """Generate pictures (n, C, H, W) in [0, 1], `size` rows at a time."""
        with self.within(), torch.no_grad():
            return torch.cat([self(*rows) for rows in zip(*(t.split(self.size) for t in inputs))])


def main(r, drawer):
    """Run --sample, --export or --explore on the run or file given by --resume."""
    args = r.args
    if args.export:
        args.device = "cpu"
    draws, saved = load(r, drawer)
    wishes = wishes_of(args)
    with r.aside():
        draws.ask(draws.draw(1), wishes)                                # refuse before anything is written
    with r.aside():
        if args.sample:
            sample(r, draws, wishes)
        if args.export:
            export(Path(args.export), draws, saved, r)
        if args.explore:
            from common import explore  # no other run needs a server
            explore.serve(draws, f"{args.script}.py: {args.resume}", wishes)


def load(r, drawer):
    """The (Drawer, checkpoint parts) of the run or file given by --resume."""
    args = r.args
    saved = read(args.resume) if Path(args.resume).is_file() else r.parts_saved()
    try:
        draws = drawer(args, saved)
        for name, net in draws.nets.items():
            net.load_state_dict({k: saved[name][k] for k in net.state_dict()})
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as e:
        raise UserError(f"{args.resume} lacks parts of the generator: another version of the script wrote "
                        "it.  Train it for a few more --steps with --resume") from e
    return draws.to(args.device), saved


def wishes_of(args):
    """Parse --set NAME=VALUE and --label VALUE into name -> text.  UserError: no equals sign."""
    wishes = {} if args.label is None else {"label": args.label}
    for text in args.set or ():
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text} found, NAME=VALUE expected")
        wishes[name] = value
    return wishes


def sample(r, draws, wishes):
    """--sample N: write N pictures, samples/00000.png and so on, and the knobs of each in samples/labels.csv;
    with --grid one picture, grid.png, instead; with --real also N real pictures, in real/."""
    args, n = r.args, r.args.sample
    inputs = draws.ask(draws.draw(n), wishes)
    r.folder.mkdir(parents=True, exist_ok=True)
    if args.grid:
        x, path = draws.pictures(inputs), r.folder / "grid.png"
        log.save_png(path, log.grid(x, columns_of(draws, n)))
    else:
        path = emptied(r.folder / "samples")
        for start in range(0, n, draws.size):
            x = draws.pictures(tuple(t[start:start + draws.size] for t in inputs))
            write_pngs(path, log.to_uint8(x), start)
        if draws.knobs:
            write_labels(path, draws, inputs)
    say(f"{n} pictures in {path}")
    if args.real:
        real(r, x.shape)


def write_labels(folder, draws, inputs):
    """The knobs of each picture as labels.csv."""
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as f:
        table = csv.writer(f)
        table.writerow(["file", *draws.knobs])
        for i, asked in enumerate(draws.asked(inputs)):
            table.writerow([f"{i:05d}.png", *asked.values()])


def real(r, shape):
    """--real: write as many training pictures as samples, resized to the network's size, to real/."""
    args = r.args
    images = data.load(args.dataset, args.data_dir, shape[2], shape[1], skip_bad=args.skip_bad).images
    chosen = torch.randperm(len(images))[:args.sample].sort().values
    folder = emptied(r.folder / "real")
    for start in range(0, len(chosen), 500):
        write_pngs(folder, images[chosen[start:start + 500]].cpu(), start)
    say(f"{len(chosen)} real pictures in {folder}")


def columns_of(draws, n):
    """Columns of --grid: one per category if there is a single list of at most 20; else nearly a square."""
    names = [len(knob.names) for _, _, knob in draws.knobs.values() if knob.names]
    return names[0] if len(names) == 1 and names[0] <= min(20, n) else math.ceil(math.sqrt(n))


def emptied(folder):
    """Delete the folder if it exists and create it again."""
    if folder.is_dir():
        shutil.rmtree(folder)
    folder.mkdir()
    return folder


def write_pngs(folder, images, start):
    for i, x in enumerate(images, start):
        log.save_png(folder / f"{i:05d}.png", x)


# ---- Exported files ---------------------------------------------------------------------------------------

def export(path, draws, saved, r):
    """--export FILE.pt2 writes a torch.export program with a dynamic batch size, which needs only PyTorch;
    --export FILE.npz writes bfloat16 weights and all settings, for --resume FILE and --explore FILE."""
    if path.suffix not in (".pt2", ".npz"):
        raise UserError(f"--export {path} found: a name that ends in .pt2 (a program for PyTorch) or .npz "
                        "(weights for this repository) expected")
    try:
        with log.whole(path) as f:
            if path.suffix == ".npz":
                write(f, draws, saved, r)
            else:                               # given a path, torch would insist on the suffix .pt2
                torch.export.save(traced(draws), f, extra_files={"inputs.json": json.dumps(signature(draws))})
    except OSError as e:
        raise UserError(f"cannot write {path} ({e.strerror})") from None
    says = ", ".join(f"{name} {tuple(t.shape[1:])}" for name, t in zip(draws.inputs, draws.draw(1)))
    say(f"{path} ({path.stat().st_size / 1e6:.1f} MB) draws from {says}")


def traced(draws):
    """Trace the Drawer with torch.export, for any number of rows from one."""
    rows = torch.export.Dim("n", min=1, max=2**20)
    example = draws.draw(3)
    with draws.within(), torch.no_grad():
        return torch.export.export(draws, example, strict=False,
                                   dynamic_shapes={"inputs": tuple({0: rows} for _ in example)})


def signature(draws):
    """A description of the program's inputs for its users: a list with type, shape and columns of each."""
    def column(knob):
        limits = {"names": knob.names} if knob.names else {"low": knob.low, "high": knob.high}
        return {"name": knob.name} | limits

    return [{"name": name, "dtype": str(t.dtype).removeprefix("torch."), "shape": ["n", *t.shape[1:]],
             "columns": [column(k) for k in knobs if not k.whole]}
            for (name, knobs), t in zip(draws.inputs.items(), draws.draw(1))]


def write(file, draws, saved, r):
    """Write the generator's arrays (bfloat16 stored as int16), the run's settings and saved["about"]."""
    about, arrays = {}, {}
    for key, value in saved["about"].items():
        if torch.is_tensor(value):
            arrays[f"about/{key}"] = value
        else:
            about[key] = value
    for name, net in draws.nets.items():
        arrays |= {f"{name}/{key}": t for key, t in net.state_dict().items()}
    floating = [k for k, t in arrays.items() if t.is_floating_point()]
    half = {k: (t.to(torch.bfloat16).view(torch.int16) if k in floating else t).numpy()
            for k, t in arrays.items()}
    np.savez_compressed(file, settings=json.dumps(r.shipped()), about=json.dumps(about),
                        bfloat16=json.dumps(floating), **half)


def settings_in(path):
    """The settings, as in args.json, of the run from which FILE.npz was exported."""
    with opened(path) as arrays:
        return json.loads(str(arrays["settings"]))


def read(path):
    """The parts in FILE.npz, laid out as in a checkpoint: name -> state dict, and "about"."""
    with opened(path) as arrays:
        floating = set(json.loads(str(arrays["bfloat16"])))
        saved = {"about": json.loads(str(arrays["about"]))}
        for key in arrays.files:
            part, _, name = key.partition("/")
            if name:
                t = torch.from_numpy(arrays[key])
                saved.setdefault(part, {})[name] = t.view(torch.bfloat16).float() if key in floating else t
        return saved


@contextlib.contextmanager
def opened(path):
    """np.load without pickles.  UserError: not a file written by --export."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except Exception as e:  # NumPy, zipfile and zlib raise a dozen kinds for damaged files
        raise UserError(f"{path} is damaged or not a file of --export FILE.npz ({data.brief(e)})") from e
