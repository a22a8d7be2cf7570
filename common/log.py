"""A run's output: TensorBoard events, metrics.jsonl, progress lines, and figures as PNG files."""

import contextlib
import errno
import json
import math
import os
import sys
import textwrap
import time

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

from common import UserError


def say(text, file=None, end="\n"):
    """Print `text` to `file` (None: sys.stdout).  A closed console or a limited encoding never ends a run."""
    file = file or sys.stdout
    try:
        try:
            print(text, file=file, end=end, flush=True)
        except UnicodeEncodeError:
            text = text.encode(file.encoding, "backslashreplace").decode(file.encoding)
            print(text, file=file, end=end, flush=True)
    except (OSError, ValueError) as e:  # ValueError: the file is closed
        if isinstance(e, OSError) and e.errno in (errno.EPIPE, errno.EIO):
            # The reader is gone.  Discard the buffer, which would fail again when Python exits.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), file.fileno())


@contextlib.contextmanager
def whole(path):
    """Open a file that replaces `path` when the block ends.  If the block fails, the old one survives."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # no other process or file uses it
    try:
        with partial.open("wb") as f:
            yield f
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file completely or not at all."""
    with whole(path) as f:
        f.write(text.encode())


class Logger:
    """Sums scalars on their devices and reads them once per interval, so that the loop never waits.

    folder None: a rank that does not log.  step: the step of a resumed run; later log lines are dropped.
    group: prefix of the scalars in TensorBoard, the script's name.  hint: advice for a long run.
    """

    def __init__(self, folder, steps, images_per_step, step=0, group="run", hint=""):
        self.steps, self.images_per_step, self.folder = steps, images_per_step, folder
        self.sums, self.counts, self.last = {}, {}, step
        self.start = self.since = self.shown = self.looked = time.perf_counter()
        self.rate, self.line, self.group, self.hint, self.told = 0.0, "", group, hint, False
        self.tty = bool(sys.stderr) and sys.stderr.isatty()
        if folder is None:
            return
        self.path = folder / "metrics.jsonl"
        kept = [line for line in history(folder) if line["step"] <= step] if step else []
        self.before = kept[-1]["seconds"] if kept else 0.0  # seconds before this process
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.board = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def add(self, scalars):
        """Add one step's scalars (numbers, or 0-dim tensors on any device) to the interval's sums."""
        groups = {}  # by device and type, since torch adds and stacks only tensors that share both
        for name, v in scalars.items():
            v = v.detach().float() if isinstance(v, torch.Tensor) else torch.tensor(v, dtype=torch.float64)
            groups.setdefault((v.device, v.dtype), {})[name] = v
            self.counts[name] = self.counts.get(name, 0) + 1
        for kind, values in groups.items():
            sums = self.sums.setdefault(kind, {})
            sums.update({name: torch.zeros_like(v) for name, v in values.items() if name not in sums})
            torch._foreach_add_([sums[name] for name in values], list(values.values()))

    def means(self):
        """The means of the interval so far, as a dict of floats.  Waits once per device."""
        totals = dict.fromkeys(self.counts, 0.0)
        for sums in self.sums.values():
            for name, total in zip(sums, torch.stack(list(sums.values())).tolist()):
                totals[name] += total
        return {name: total / self.counts[name] for name, total in totals.items()}

    def write(self, step):
        """Write the interval's means, start a new interval, and return them."""
        means, now = self.means(), time.perf_counter()
        self.rate = (step - self.last) * self.images_per_step / (now - self.since)
        self.sums, self.counts, self.last, self.since = {}, {}, step, now
        if self.folder:
            seconds = round(self.before + now - self.start, 3)
            line = {"step": step, "seconds": seconds, "images/s": round(self.rate, 1), **means}
            with self.path.open("a") as f:
                f.write(json.dumps(line) + "\n")
            for name, value in means.items():
                group = "gan" if name.startswith("GAN ") else self.group
                self.board.add_scalar(f"{group}/{name.removeprefix('GAN ')}", value, step)
            self.board.add_scalar("speed/images_s", self.rate, step)
            self.line = _short(means)
            if not self.tty:
                say(self.status(step))
        return means

    def status(self, step):
        rate = self.rate or self._rate(step)
        left = (self.steps - step) * self.images_per_step / rate if rate else math.nan
        eta = "--:--" if math.isnan(left) else f"{int(left) // 60}:{int(left) % 60:02d}"
        percent = 100 * step / self.steps
        return f"step {step}/{self.steps} {percent:3.0f}%  {rate:.0f} images/s  ETA {eta}  {self.line}"

    def _rate(self, step):
        """Images per second since the interval began, without its first step, which may compile."""
        if step == self.last + 1:
            self.second = time.perf_counter()
        passed = time.perf_counter() - getattr(self, "second", math.inf)
        return (step - self.last - 1) * self.images_per_step / passed if passed > 0 else 0.0

    def progress(self, step):
        """Update a terminal's live line, at most twice a second; after 5 seconds estimate the run time."""
        now, rate = time.perf_counter(), self._rate(step) if not self.rate else self.rate
        if not self.folder:
            return
        if not self.told and now - self.start > 5 and rate:
            self.told, minutes = True, (self.steps - step) * self.images_per_step / rate / 60
            if minutes > 1:
                say(f"about {minutes:.0f} minutes at {rate:.0f} images/s{self.hint if minutes > 10 else ''}")
        if self.tty and now - self.shown > 0.5:
            if not self.rate and now - self.looked > 2:  # no line yet: read the device occasionally
                self.looked, self.line = now, _short(self.means())
            self.shown, columns = now, 80
            with contextlib.suppress(OSError, ValueError):  # the terminal was closed
                columns = os.get_terminal_size(sys.stderr.fileno()).columns
            say("\r\033[K" + self.status(step)[:columns - 1], sys.stderr, end="")

    def close(self):
        if self.tty and self.folder:
            say("", sys.stderr)
        if self.folder:
            self.board.flush()  # the file stays open for figures and final numbers


def _short(means):
    return "  ".join(f"{name} {value:.3g}" for name, value in means.items())


def history(folder):
    """The lines of metrics.jsonl as dicts, each with "step" and "seconds"; skips one that a kill cut off."""
    path, lines = folder / "metrics.jsonl", []
    for text in path.read_bytes().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


# ---- Images -----------------------------------------------------------------------------------------------

def to_uint8(x, scale=(0.0, 1.0)):
    """Convert images (..., H, W) with values in `scale` to uint8 on the CPU, with clipping."""
    x = (x.detach().float() - scale[0]) / (scale[1] - scale[0])
    return x.clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def grid(x, columns, scale=(0.0, 1.0)):
    """Arrange images (n, 1 or 3, H, W) in rows of `columns` with grey lines between: uint8 (3, H', W')."""
    x = F.pad(to_uint8(x, scale), (0, 2, 0, 2), value=128)  # make_grid would import torchvision: 3.6 seconds
    x = torch.cat([x, x.new_full((-len(x) % columns, *x.shape[1:]), 128)])
    x = F.pad(rearrange(x, "(r c) k h w -> k (r h) (c w)", c=columns), (2, 0, 2, 0), value=128)
    return x.expand(3, -1, -1).contiguous()


def with_captions(images, captions):
    """Stack uint8 images (3, H, W) of equal width, each below its caption: uint8 (3, H', W)."""
    parts = []
    for x, caption in zip(images, captions):
        lines = textwrap.wrap(caption, max(12, x.shape[2] * 2 // 11))
        strip = Image.new("RGB", (x.shape[2], 4 + 14 * len(lines)), "white")
        for i, line in enumerate(lines):
            ImageDraw.Draw(strip).text((3, 2 + 14 * i), line, fill="black", font_size=11)
        parts += [torch.from_numpy(np.array(strip)).permute(2, 0, 1), x]
    return torch.cat(parts, 1)


def save_png(path, image, most=None):
    """Write one uint8 image (1 or 3, H, W) as PNG, completely or not at all; `most`: shrink to this size."""
    array = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    if most:
        picture.thumbnail((most, most))
    with whole(path) as f:
        picture.save(f, format="PNG")


def animate(files, path, most=60):
    """Write at most `most` of the pictures `files` as an animated GIF; do nothing for fewer than two."""
    if len(files) < 2:
        return
    chosen = [files[i] for i in np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int)]
    frames = [Image.open(f).convert("P", palette=Image.Palette.ADAPTIVE, colors=64) for f in chosen]
    with whole(path) as f:
        frames[0].save(f, format="GIF", save_all=True, append_images=frames[1:], loop=0,
                       duration=[150] * (len(frames) - 1) + [1500])


COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (140, 86, 75),
           (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207))


class Axes:
    """A small chart for line and scatter figures, drawn at twice its final size.

    xlim, ylim: data ranges.  low: put the legend at the bottom.  UserError: limits that are not finite or not
    increasing.
    """

    def __init__(self, xlim, ylim, xlabel, ylabel, size=(640, 420), low=False):
        if not all(map(math.isfinite, (*xlim, *ylim))) or xlim[0] >= xlim[1] or ylim[0] >= ylim[1]:
            raise UserError(f"a chart needs finite, rising limits, found x {xlim} and y {ylim}")
        self.xlim, self.ylim, self.size, self.low = xlim, ylim, size, low
        self.image = Image.new("RGB", (2 * size[0], 2 * size[1]), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.box = (130, 40, 2 * size[0] - 40, 2 * size[1] - 110)  # left, top, right, bottom as drawn
        self.labels = 0
        left, _, right, bottom = self.box
        self.draw.rectangle(self.box, outline="black", width=2)
        for t in ticks(*xlim):
            x = self.at(t, ylim[0])[0]
            self.draw.line((x, bottom, x, bottom + 8), fill="black", width=2)
            self.draw.text((x, bottom + 14), f"{t:g}", fill="black", anchor="ma", font_size=24)
        for t in ticks(*ylim):
            y = self.at(xlim[0], t)[1]
            self.draw.line((left - 8, y, left, y), fill="black", width=2)
            self.draw.text((left - 14, y), f"{t:g}", fill="black", anchor="rm", font_size=24)
        self.draw.text(((left + right) / 2, bottom + 58), xlabel, fill="black", anchor="ma", font_size=28)
        self.draw.text((10, 4), ylabel, fill="black", font_size=28)

    def at(self, x, y):
        """Data coordinates -> pixels as drawn."""
        left, top, right, bottom = self.box
        return (left + (x - self.xlim[0]) / (self.xlim[1] - self.xlim[0]) * (right - left),
                bottom - (y - self.ylim[0]) / (self.ylim[1] - self.ylim[0]) * (bottom - top))

    def line(self, x, y, label=None, colour=None):
        """A curve through the points (x_i, y_i), clipped to the limits."""
        low, high = self.ylim
        points = [self.at(px, min(max(py, low), high)) for px, py in zip(x, y)
                  if self.xlim[0] <= px <= self.xlim[1]]
        colour = colour or COLOURS[self.labels % len(COLOURS)]
        self.draw.line(points, fill=colour, width=4, joint="curve")
        self.legend(label, colour)

    def points(self, x, y, label=None, colour=None, radius=3):
        """A dot at each (x_i, y_i) within the limits."""
        colour = colour or COLOURS[self.labels % len(COLOURS)]
        for p in zip(x, y):
            if self.xlim[0] <= p[0] <= self.xlim[1] and self.ylim[0] <= p[1] <= self.ylim[1]:
                px, py = self.at(*p)
                self.draw.ellipse((px - radius, py - radius, px + radius, py + radius), fill=colour)
        self.legend(label, colour)

    def legend(self, label, colour):
        if label is not None:
            _, top, right, bottom = self.box
            y = bottom - 24 - 34 * self.labels if self.low else top + 24 + 34 * self.labels
            self.draw.line((right - 40, y, right - 14, y), fill=colour, width=8)
            self.draw.text((right - 50, y), str(label), fill="black", anchor="rm", font_size=24)
        self.labels += 1

    def picture(self):
        """The chart at its final size: uint8 (3, H, W)."""
        image = self.image.resize(self.size, Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def ticks(low, high):
    """About five round numbers from `low` to `high`."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= 6)
    first = math.ceil(low / step - 1e-9)
    return [round(step * k, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]
