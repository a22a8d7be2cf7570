"""What all runs share: flags, device, seeds, ranks, folders, checkpoints and a clean stop."""

import argparse
import atexit
import contextlib
import errno
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch.utils.tensorboard.summary import hparams

from common import UserError, data, export, intact, log, prepare
from common.fuse import cannot_compile, describe, has_bf16
from common.log import say

ANEW = ("resume", "sample", "grid", "real", "set", "label", "export", "explore", "check")  # never restored
# Flags that a resumed run may change.  Changing any other one is an error.
FREE = {*ANEW, "name", "out", "data_dir", "steps", "device", "amp", "compile", "graph", "log_every",
        "save_every",
        "dataset",     # it may have moved; Batches checks that the number of pictures is the same
        "batch_size"}  # the number of ranks may differ; Batches checks that the total batch is the same
DRAWING = ("sample", "export", "explore", "prompt")  # use a trained run as it is
PATHS = ("dataset", "data_dir", "exemplars")  # flags that a resumed run reads again
NAMED = (*data.BUILT_IN, *data.PLACE, "toy", "chairs")  # values of --dataset that are no paths
TOO_LARGE = ("can't allocate memory", "size calculation overflowed", "Overflow when unpacking")  # torch, CPU
UNWRITABLE = {errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ELOOP,
              errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTDIR, errno.EPERM, errno.EROFS}


def number(kind, low, high=1e15, open_low=False):
    """An argparse type: `kind` (int or float) from `low` to `high`; `open_low` excludes `low` itself."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or open_low and value == low:
            span = f"{'above' if open_low else 'at least'} {low} and at most {high:.15g}"
            span = span.removesuffix(" and at most 1e+15")
            raise argparse.ArgumentTypeError(f"{text[:40]} found, {span} expected")
        return value
    parse.__name__ = kind.__name__
    return parse


def parser(file, doc, **defaults):
    """A parser with the flags that all scripts share; `defaults` for dataset, steps, batch_size and so on.

    From here on, an uncaught UserError ends the process with one line on stderr and exit code 1.
    """
    script = Path(file).stem
    sys.excepthook = _one_line(script)
    p = argparse.ArgumentParser(prog=f"python {script}.py", usage="%(prog)s [--flag value ...]",
                                epilog=_epilog(script, doc), allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument_group("run").add_argument
    flag = argparse.BooleanOptionalAction
    add("--dataset", help="a name, a folder of images or an .npz file [%(default)s]")
    add("--data-dir", metavar="DIR", default="data", help="where data sets are kept [%(default)s]")
    add("--out", metavar="DIR", default="runs", help="where run folders are created [%(default)s]")
    add("--name", default="", help="suffix of the run's folder")
    add("--paper", action="store_true", help="use only the published settings [tuned in places]")
    add("--quick", action="store_true", help="a narrow, short run for a CPU")
    add("--skip-bad", action="store_true", help="skip pictures that cannot be read")
    add("--steps", metavar="N", type=number(int, 1), help="iterations [depends on the experiment]")
    add("--batch-size", metavar="N", type=number(int, 2),
        help="images per step and rank [depends on the experiment]")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="random seed [%(default)s]")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps ... [%(default)s: cuda if there is one]")
    add("--amp", action=flag, help="bfloat16 autocast [if the hardware has bfloat16]")
    add("--compile", action=flag, help="torch.compile the whole step [--no-compile]")
    add("--graph", action=flag, help="run the step as one CUDA graph [on a GPU]")
    add("--log-every", metavar="N", type=number(int, 1), default=100,
        help="steps between log lines [%(default)s]")
    add("--save-every", metavar="N", type=number(int, 1), default=1000,
        help="steps between checkpoints [%(default)s]")
    add("--resume", metavar="RUN", help="continue the run in this folder with its settings")
    add("--check", action="store_true", help="exit with 1 if the key result is out of range")
    add = p.add_argument_group("use a trained run: --resume RUN, or an exported .npz file").add_argument
    add("--sample", type=number(int, 1), metavar="N", help="write N PNGs and stop")
    add("--grid", action="store_true", help="with --sample: one PNG with all N")
    add("--real", action="store_true", help="with --sample: also N real pictures, for FID tools")
    add("--label", help="short for --set label=LABEL")
    add("--set", action="append", metavar="NAME=VALUE", help="set a label, a code or an attribute")
    add("--export", metavar="FILE",
        help="save the generator as a torch.export program (.pt2) or as weights (.npz)")
    add("--explore", metavar="RUN", help="try the generator in a browser, with sliders; needs no --resume")
    p.set_defaults(script=script, **defaults)
    return p


def _epilog(script, doc):
    """The end of the help, in 80 columns: title, authors and commands from a script's header."""
    title, *_ = doc.strip().split("\n\n")
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, 79)] + [""]
    for line in re.findall(r"^ +(python .*)", doc, re.MULTILINE):
        command, _, remark = (part.strip() for part in line.partition("  "))
        parts = textwrap.wrap(command, 77, initial_indent="  ", subsequent_indent="      ",
                              break_on_hyphens=False)
        lines += [*(part + " \\" for part in parts[:-1]), parts[-1]]
        if remark and len(parts[-1]) + len(remark) < 78:
            lines[-1] += f"  {remark}"
        elif remark:
            lines.append(f"      {remark}")
    return "\n".join([*lines, "", f"Equations, and where each stands: the first lines of {script}.py"])


def parse(p, argv=None, free=(), experiment=None, paper=None, tuned=None, quick=None):
    """The settings of a run as one namespace: flags on the command line, then saved settings (--resume), then
    defaults.

    `paper`, `tuned` and `quick` map an experiment to its settings; `experiment(args)` names the experiment.
    A setting that is still None comes from `tuned`, else from `paper`; with --paper only from `paper`; with
    --quick first from `quick`.  `args.given` lists the flags that were typed; `args.settings` is "paper",
    "tuned" or "quick".  A resumed run keeps its settings even if the defaults have changed.  Changing a saved
    flag is an error unless it is listed in FREE or `free`.
    """
    defaults = vars(p.parse_args([]))
    given = vars(p.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {k: os.path.expanduser(v) if isinstance(v, str) else v  # a shell leaves --out=~/runs as it is
             for k, v in given.items() if v is not None}
    if given.get("paper") and given.get("quick"):
        p.error("--paper and --quick exclude each other")
    if given.get("explore") and given.setdefault("resume", given["explore"]) != given["explore"]:
        p.error("--explore RUN names the run: leave --resume out")
    drawing = [k for k in DRAWING if given.get(k)]
    if drawing and not given.get("resume"):
        p.error(f"--{drawing[0]} needs --resume RUN: the run whose networks draw")
    lone = [k for k in ("grid", "real", "set", "label") if given.get(k)]
    if lone and not (given.get("sample") or given.get("explore") and lone[0] in ("set", "label")):
        p.error(f"--{lone[0]} needs --sample N" + " or --explore" * (lone[0] in ("set", "label")))
    free = {*FREE, *free, *["seed"] * bool(drawing)}
    saved = _saved(given["resume"], defaults["script"]) if given.get("resume") else {}
    for k, v in given.items():
        if k in saved and saved[k] != v and k not in free:
            raise UserError(f"{given['resume']} was run with --{k.replace('_', '-')} {saved[k]}, {v} given: "
                            "leave the flag out, or start a new run")
    args = argparse.Namespace(**{**defaults, **saved, **given})
    if not args.dataset:
        p.error("--dataset is empty: a name, a folder of images or an .npz file expected")
    args.given = sorted({*given} | {*saved.get("given", ())} & {*saved})
    if paper:
        row = saved.get("experiment")
        args.experiment = row if row in paper else experiment(args)
        chosen = paper[args.experiment] | ({} if args.paper else (tuned or {}).get(args.experiment, {}))
        if args.quick and args.experiment not in (quick or {}):
            raise UserError(f"--quick has no settings for {args.experiment}: give --width .25 and --steps")
        hasty = quick[args.experiment] if args.quick else {}
        for k, v in (chosen | hasty).items():
            if getattr(args, k, None) is None or k in hasty and k not in args.given and k not in saved:
                setattr(args, k, v)
        args.settings = "paper" if args.paper else "quick" if args.quick else "tuned"
    return args


def _saved(folder, script):
    """The settings of the run in `folder`, or in an exported file, without the flags in ANEW."""
    path = Path(folder) / "args.json"
    try:
        saved = export.settings_in(folder) if Path(folder).is_file() else json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} not found: the folder of an earlier run expected") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise UserError(f"{path} cannot be read ({e}): the flags of the run are lost") from None
    if not isinstance(saved, dict) or saved.get("script") != script:
        found = saved.get("script") if isinstance(saved, dict) else None
        raise UserError(f"{folder} is a run of {found}.py, a run of {script}.py expected")
    return {k: v for k, v in saved.items() if k not in ANEW}


class Run:
    """One run: sets up device, seeds, ranks and folder, then drives steps, checkpoints and results.

    Resolves `args.device`, `args.amp`, `args.compile` and `args.graph` in place.
    `lead`: whether this process logs, draws and saves (rank 0).
    """

    def __init__(self, args):
        self.asked, self.kept, self.read = dict(vars(args)), dict(vars(args)), None
        for key in PATHS:  # absolute, since a run may be resumed from another directory
            value = self.asked.get(key)
            if value and not (key == "dataset" and value in NAMED) and os.path.exists(value):
                self.kept[key] = os.path.realpath(value)
        self.args, self.parts, self.step, self.stopped = args, {}, 0, False
        self.start, self.end = 0, args.steps  # of the current loop
        self.logger = self.board = None
        self.drawn = False
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.lead = self.rank == 0
        args.device = str(_device(args.device, self.lead))
        # The module with the device's random state: torch.cuda, torch.mps, ...
        self.random = None if args.device == "cpu" else torch.get_device_module(args.device)
        cuda = args.device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(args.device)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        args.amp = has_bf16(torch.device(args.device)) if args.amp is None else args.amp
        why_not = cannot_compile(torch.device(args.device)) if args.compile else ""
        if why_not and self.lead:
            say(f"not compiled: {why_not}", sys.stderr)
        args.compile = bool(args.compile) and not why_not
        args.graph = cuda if args.graph is None else args.graph and cuda
        torch.manual_seed(args.seed)
        source = Path(os.path.abspath(args.dataset)).name.removesuffix(".npz")  # of "." too
        label = data.printable(source) + (f"-{args.name}" if args.name else "")
        self.folder = Path(args.resume or Path(args.out) / f"{args.script}-{label}")
        if args.resume and self.folder.is_file():  # an exported file has no run folder
            if not self.drawing:
                raise UserError(f"{args.resume} holds a generator, not a run: use it with --sample, "
                                "--export or --explore")
            self.folder = Path(args.out) / self.folder.stem
        self.lock = None
        if not args.resume:
            self._lead_alone(self._claim)

    @property
    def drawing(self):
        """Whether to use a trained run as it is: --sample, --export, --explore, text2image's --prompt."""
        return any(getattr(self.args, flag, None) for flag in DRAWING)

    def _lead_alone(self, act):
        """Call `act` on rank 0 alone.  If it raises a UserError, all ranks exit."""
        error = None
        if self.lead:
            try:
                act()
            except UserError as e:
                error = e
        if self.world > 1:
            failed = torch.tensor(float(error is not None), device=self.args.device)
            dist.broadcast(failed, 0)
            if failed.item() and not self.lead:
                sys.exit(1)
        if error:
            raise error

    def _claim(self):
        """Create and lock the run's folder.  A folder with a checkpoint is refused; one left by a run that
        ended before its first checkpoint is reused."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock()
        except OSError as e:
            raise UserError(f"cannot write to {self.folder} ({e.strerror}): give another --out") from None
        if (self.folder / "checkpoint.pt").exists():
            raise UserError(f"{self.folder} already holds a run: continue with --resume {self.folder}, "
                            "or give this one another --name")
        for old in (*self.folder.glob("events.out.*"), self.folder / "metrics.jsonl"):
            old.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "frames", ignore_errors=True)

    def _lock(self):
        """Lock the folder for training until this process ends; other processes may still read it."""
        if self.lock:
            return
        file = open(self.folder / "lock", "a+b")  # noqa: SIM115
        if not prepare.lock(file):
            file.close()
            raise UserError(f"another process is training in {self.folder}: wait for it, or give this run "
                            "another --name")
        self.lock = file
        for left in self.folder.glob("*.tmp"):  # left by killed processes
            left.unlink(missing_ok=True)

    def keep(self, about=dict, **parts):
        """Register the parts of the checkpoint (anything with state_dict), and load them when resuming.

        `about()` is called before each save, with a separate random state.  It returns a dict of what the
        script's drawer() needs to know about the data (numbers, strings, lists, tensors).  It may also
        prepare the generator for sampling, for example calibrate its BatchNorm statistics.
        Call keep() once, after all argument checks and before the first step: from then on the folder holds
        a run.
        """
        self.parts, self.about = parts, about
        if self.args.resume:
            return self._load()
        if self.lead:
            log.write_text(self.folder / "args.json", json.dumps(self.kept, indent=1) + "\n")
            (self.folder / "metrics.jsonl").touch()
        if self.world > 1:
            # All ranks hold the same networks, but must draw different latents.
            torch.manual_seed(self.args.seed + 7919 * self.rank)

    def loop(self, end=None):
        """Yield the steps from the current one to `end` (None: --steps); log, save and stop cleanly between
        steps.  A run of several phases calls it once per phase."""
        args = self.args
        if end is not None:
            self.start, self.end = self.step, end
        if self.step >= self.end:
            return
        if self.logger is None:
            self._lead_alone(self._train_alone)
            if self.lead:
                say(f"{describe(args)} | {args.steps:,} steps | {self.folder}")
            folder = self.folder if self.lead else None
            hint = "; --quick or --width .25 takes less" if args.device == "cpu" and not args.quick else ""
            images = getattr(self.parts.get("batches"), "batch", args.batch_size * self.world)
            self.logger = log.Logger(folder, self.end, images, self.step, args.script, hint)
        self.logger.steps, self.logger.since = self.end, time.perf_counter()
        old = {s: signal.signal(s, self._stop) for s in stops()}
        try:
            for step in range(self.step + 1, self.end + 1):
                yield step
                self.step = step
                self.logger.progress(step)
                stop = self._all_stop(step)
                save = step % args.save_every == 0 or step == self.end or stop
                if save or step % args.log_every == 0:
                    self._finite(self.logger.write(step))
                if save:
                    self.save()
                if stop:
                    if self.lead:
                        say(f"\nstopped after step {step} and saved: continue with --resume {self.folder}",
                            sys.stderr)
                    sys.exit(130)
        finally:
            self.logger.close()
            for s, handler in old.items():
                signal.signal(s, handler)

    def _train_alone(self):
        """Lock a resumed run.  UserError if another process has trained it since its checkpoint was read."""
        try:
            self._lock()
        except OSError as e:
            raise UserError(f"cannot write to {self.folder} ({e.strerror})") from None
        if self.args.resume and self.read != _stamp(self.folder / "checkpoint.pt"):
            raise UserError(f"another process has trained {self.folder} meanwhile: give the command again")

    @property
    def feed(self):
        """Arguments for Batches: batch size, device, seed, rank and number of ranks."""
        return {"batch_size": self.args.batch_size, "device": self.args.device, "seed": self.args.seed,
                "rank": self.rank, "world": self.world}

    def log(self, scalars):
        """Add one step's 0-dim tensors to the means of the log interval, without a device synchronization."""
        self.logger.add(scalars)

    def every(self, n):
        """Whether the current step is a multiple of `n` or the last of its loop."""
        return (self.step + 1) % n == 0 or self.step + 1 == self.end

    def draws(self):
        """Whether to draw samples in this step, on rank 0 alone: after 2, 5, 10 and 20 % of the loop, after
        the first minute, and every --save-every steps."""
        step, steps = self.step + 1 - self.start, self.end - self.start
        early = {math.ceil(steps * part) for part in (0.02, 0.05, 0.1, 0.2) if steps >= 100}
        late = not self.drawn and time.perf_counter() - self.logger.start > 60
        return self.lead and (late or step in early or self.every(self.args.save_every))

    @contextlib.contextmanager
    def aside(self):
        """Within the block, random numbers depend only on the seed; training's random state is restored
        afterwards."""
        with torch.random.fork_rng([]), contextlib.ExitStack() as after:
            if self.random:
                after.callback(self.random.set_rng_state, self.random.get_rng_state())
            torch.manual_seed(self.args.seed)
            yield

    def _stop(self, number, frame):
        if self.stopped:  # a second signal stops at once
            raise KeyboardInterrupt
        self.stopped = True

    def _all_stop(self, step):
        """Whether to stop now.  Ranks agree every ten steps, so that all stop after the same step."""
        if self.world == 1:
            return self.stopped
        if step % 10:
            return False
        flag = torch.tensor(float(self.stopped), device=self.args.device)
        dist.all_reduce(flag)
        return flag.item() > 0

    def _finite(self, means):
        bad = [f"{name} is {value}" for name, value in means.items() if not math.isfinite(value)]
        if bad:
            raise UserError(self._diverged(", ".join(bad)))

    def _diverged(self, what):
        return (f"step {self.step}: {what}, a finite value expected.  A checkpoint in {self.folder}, if any, "
                "is kept: try a lower learning rate, --no-amp or another seed")

    def save(self):
        """Write checkpoint.pt to a temporary file, sync it and rename it, so that an interrupted save leaves
        the previous checkpoint intact."""
        if not self.lead:
            return
        with self.aside():
            about = self.about()
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        for name, part in self.parts.items():
            if isinstance(part, torch.nn.Module) and not all(t.isfinite().all() for t in part.parameters()):
                raise UserError(self._diverged(f"a parameter of {name} is infinite or NaN"))
        state = {"script": self.args.script, "step": self.step, "world": self.world, "parts": parts,
                 "about": about, "random": torch.get_rng_state()}
        if self.random:
            state[f"random_{torch.device(self.args.device).type}"] = self.random.get_rng_state()
        path = self.folder / "checkpoint.pt"
        try:
            with log.whole(path) as f:
                torch.save(state, f)
                f.flush()
                os.fsync(f.fileno())
            self.read = _stamp(path)
        except (OSError, RuntimeError) as e:
            raise UserError(f"step {self.step}: cannot write {path} ({e}); an earlier one is kept") from None

    @contextlib.contextmanager
    def _reading(self):
        """Yield the checkpoint's contents.  UserError: it is missing, damaged or does not fit."""
        path = self.folder / "checkpoint.pt"
        try:
            self.read = _stamp(path)
            yield _checkpoint(path, self.args.device)
        except FileNotFoundError:
            raise UserError(f"{path} not found: the run was stopped before its first checkpoint.  Start it "
                            "again without --resume") from None
        except (UserError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as e:  # torch raises a dozen kinds for damaged files
            raise UserError(f"{path} is damaged or not a checkpoint of this run ({data.brief(e)})") from e

    def _load(self):
        with self._reading() as state:
            odd = sorted(set(self.parts) ^ set(state["parts"]))
            if odd:
                raise UserError(f"{self.folder} and the script differ in {odd[0]}: another version wrote it")
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            self.step, kind = state["step"], torch.device(self.args.device).type
            made = next((key.removeprefix("random_") for key in state if key.startswith("random_")), "cpu")
            if kind != made and self.lead:
                say(f"{self.folder} was written on {made}: on {kind} the run continues, but not bit for bit")
            if self.world == 1 == state["world"] and kind == made:
                torch.set_rng_state(state["random"].cpu())
                if self.random:
                    self.random.set_rng_state(state[f"random_{kind}"].cpu())
            else:
                torch.manual_seed(self.args.seed + 7919 * self.rank + 104729 * self.step)

    def parts_saved(self):
        """The checkpoint's parts by name, with the result of about() as "about"."""
        with self._reading() as state:
            return {**state["parts"], "about": state.get("about", {})}

    def show(self, name, image):
        """Save the uint8 picture (3, H, W) as NAME.png in the run's folder and in TensorBoard."""
        if not self.lead:
            return
        self.drawn = True
        log.save_png(self.folder / f"{name}.png", image)
        if name == "samples" and self.logger:  # a frame of training.gif
            (self.folder / "frames").mkdir(exist_ok=True)
            log.save_png(self.folder / "frames" / f"{self.step + 1:08d}.png", image, most=480)
        self._board().add_image(f"figures/{name}", image, self.step)
        self._board().flush()

    def _board(self):
        self.board = self.logger.board if self.logger else self.board or log.SummaryWriter(self.folder)
        return self.board

    def shipped(self):
        """The settings that --export FILE.npz stores: those of the run, without paths of this machine."""
        kept = {k: v for k, v in self.kept.items() if k not in {*ANEW, "data_dir", "out", "name"}}
        return {k: f"path/to/{Path(v).name}" if isinstance(v, str) and v != Path(v).name else v
                for k, v in kept.items()}

    def results(self, results, passed=True):
        """Write results.json and print one line per number; with --check, exit with 1 unless `passed`.

        `results`: experiment id -> dict with "value" and, if there is one, "paper" (the paper's value).
        """
        if not self.lead:
            return
        lines = log.history(self.folder)
        asked = {k: self.asked[k] for k in self.args.given}
        settings = {k: v for k, v in self.asked.items() if k not in ("given", "settings", "script")}
        report = {"command": shlex.join(["python", f"{self.args.script}.py", *_flags(asked)]),
                  "settings": getattr(self.args, "settings", "tuned"), "all settings": settings,
                  "commit": _commit(), "seed": self.args.seed, "step": self.step,
                  "seconds": lines[-1]["seconds"] if lines else 0,
                  "machine": machine(self.args.device), "mode": describe(self.args),
                  "versions": {"python": platform.python_version(), "torch": torch.__version__,
                               "torchvision": version("torchvision"), "numpy": np.__version__},
                  "date": time.strftime("%Y-%m-%d"), "results": results}
        log.animate(sorted((self.folder / "frames").glob("*.png")), self.folder / "training.gif")
        flat = {k: v if isinstance(v, (int, float)) else data.printable(v) for k, v in settings.items()
                if k not in FREE or k == "dataset"}
        numbers = {k: r["value"] for k, r in results.items() if isinstance(r["value"], (int, float))}
        for summary in hparams(flat, numbers):  # add_hparams() would open another event file
            self._board().file_writer.add_summary(summary, self.step)
        self._board().flush()
        log.write_text(self.folder / "results.json", json.dumps(_for_json(report), indent=1) + "\n")
        for name, r in results.items():
            paper = f"   (paper {_short(r['paper'])})" if "paper" in r else ""
            say(f"{name:24} {_short(r['value'])} {r.get('unit', '')}{paper}")
        say(f"figures and results.json in {self.folder}")
        if self.args.check and not passed:
            say(f"{self.args.script}.py: --check: the key result is out of range", sys.stderr)
            sys.exit(1)


def stops():
    """The signals that stop a run after the current step; SIGHUP only if it is not ignored (nohup)."""
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    heard = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *[hangup] * heard]


def _stamp(path):
    s = path.stat()
    return s.st_ino, s.st_mtime_ns, s.st_size


def _for_json(value):
    """`value` with None in place of NaN and infinity, which JSON cannot hold."""
    if isinstance(value, dict):
        return {k: _for_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_for_json(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _commit():
    """The commit of this checkout, with a plus for uncommitted changes; None without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        found = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip() + "+" * bool(changed.stdout)


def machine(device):
    """The name of the GPU, or of the processor with the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    where = "" if device == "cpu" else f"{device} of "
    n = torch.get_num_threads()
    return f"{where}{(names or [platform.processor()])[0]}, {n} thread{'s' * (n > 1)}"


def _checkpoint(path, device):
    """The contents of a checkpoint, verified."""
    intact(path)
    return torch.load(path, map_location=device, weights_only=True)


def fetch(where, wanted, device="cpu", **nets):
    """Load `nets` from the checkpoint of another run; `where` is its folder or the file.

    UserError: the file cannot be read, is damaged, or lacks one of `nets` in this size.  `wanted` says in
    that message which run is expected.
    """
    path = Path(where) / "checkpoint.pt" if Path(where).is_dir() else Path(where)
    try:
        parts = _checkpoint(path, device)["parts"]
        for name, net in nets.items():
            net.load_state_dict(parts[name])
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): {wanted} expected") from None
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as e:
        raise UserError(f"{path} is damaged or holds no {', '.join(nets)} of these sizes: {wanted} "
                        "expected") from e


def _device(name, lead=True):
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    other = here.type if here is not None and here.type != "cuda" else None
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if other and lead:
            say(f"on the CPU: --device {other} is here too, but this repository has not been run on it")
    try:
        device = torch.device(name)
        if device.type == "cpu":
            return torch.device("cpu")  # "cpu:0" too
        device = torch.device(device.type, int(os.environ.get("LOCAL_RANK", str(device.index or 0))))
        if device.type == "cuda":
            torch.cuda.get_device_name(device)
        elif device.type != other or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError
    except (RuntimeError, AssertionError):
        choice = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        choice += [f"{other} (one rank)"] if other else []
        raise UserError(f"--device {name} found, {' or '.join(choice)} expected") from None
    return device


def _flags(given):
    """The given flags as they would be typed; False becomes --no-..."""
    words = []
    for k, v in given.items():
        flag = k.replace("_", "-")
        if v is False:
            words.append(f"--no-{flag}")
        elif v is not None and v != "":
            words += [f"--{flag}", *map(str, [] if v is True else v if isinstance(v, list) else [v])]
    return words


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _one_line(script):
    """An excepthook that prints mistakes of the user and failures of the machine as one line on stderr."""
    def hook(kind, error, trace):
        said = " ".join(str(error).split())[:80]
        if issubclass(kind, UserError):
            line = str(error)
        elif issubclass(kind, KeyboardInterrupt):
            line = "interrupted"
        elif issubclass(kind, OSError) and error.errno in UNWRITABLE:
            line = (f"{error.filename or 'a file of the run'} cannot be written ({error.strerror}): "
                    "free some space, or give another --out")
        elif issubclass(kind, NotImplementedError) and "PYTORCH_ENABLE_MPS_FALLBACK" in str(error):
            line = (f"{str(error).split('.')[0]}: set the environment variable "
                    "PYTORCH_ENABLE_MPS_FALLBACK=1 to run it on the CPU")
        elif dist.is_initialized() and (issubclass(kind, dist.DistError) or "gloo" in str(error)):
            line = f"another rank has ended: continue with --resume from the last checkpoint ({said} ...)"
        elif (issubclass(kind, (MemoryError, torch.OutOfMemoryError))
              or any(text in str(error) for text in TOO_LARGE)):
            line = f"not enough memory for batch, networks or data of this size ({said} ...)"
        else:
            return sys.__excepthook__(kind, error, trace)
        say(f"{script}.py: {line}", sys.stderr)
    return hook
