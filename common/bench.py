"""Benchmark: the speed of the scripts in each mode, compared with a tutorial's loop and the machine's limits.

    python -m common.bench                            all scripts, each with its default data set and batch
    python -m common.bench --quick --jobs 8           in a few minutes on a GPU, once the data is rendered
    python -m common.bench gan dcgan --width .25 --quick --json bench.json
    python -m common.bench vaegan --scaling           images/s for several batch sizes and picture sizes

Modes, each measured in separate processes, with interleaved repeats:
    textbook   the same networks and batch in a tutorial's loop: DataLoader, torch.optim one tensor at a time,
               loss.backward() into every network, float32
    resident   the data as one tensor on the device
    fused      the script's own step: fused optimizers, only the gradients needed, channels_last
    bf16       bfloat16 autocast, if the hardware has bfloat16
    graph      this step as one CUDA graph
    compiled   the whole step with torch.compile, on a GPU then captured as above; on a CPU, where compiling
               takes minutes, only if --modes asks for it

Flags not listed below are passed to the scripts that have them.  The script's main() runs up to `Run.loop`,
which is replaced by a loop that warms up, measures and exits.  A mode that fails prints one line and leaves
an empty row.  --jobs N prepares N processes in parallel; each is measured alone while the others are
suspended.  "start s" and "compile s" then include the time spent suspended.

"arithmetic %" and "bytes %": the work of the script's eager step at the measured rate, as a share of the
device's best matrix product and copy.  Arithmetic counts matrix products and convolutions; bytes counts what
each operation reads and writes, above 100 if caches or compilation save memory traffic.  "cpu ms": processor
time per step over all threads; with one thread, "ms" above "cpu ms" means that other processes used the core.
"start s": from process start to the first step.
"""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common import UserError, data, fuse, log, run

SCRIPTS = ("gan", "cgan", "dcgan", "aae", "vaegan", "text2image", "infogan")
EAGER = ("--no-amp", "--no-compile", "--no-graph")
MODES = {"textbook": EAGER, "resident": EAGER, "fused": EAGER, "bf16": ("--amp", *EAGER[1:]),
         "graph": ("--no-compile", "--graph"), "compiled": ("--compile",)}
OWN = {  # flags that skip to the main phase of a run
    "infogan": ("--gan-steps", "0"),                               # no regular GAN beside it
    "text2image": ("--encoder-steps", "0", "--style-steps", "0")}  # start with G and D
SIZES = {"dcgan": (("--net", "svhn"), ("--net", "64")),
         "vaegan": (("--net", "28"), ("--net", "32"), ("--net", "64"))}
ENDLESS = ("--steps", "1000000000", "--save-every", "1000000000")
FLOAT, BFLOAT, COPY = "float32 GFLOP/s", "bfloat16 GFLOP/s", "copy GB/s"


# ---- a tutorial's loop, by replacing functions that the scripts import

class Rate(float):
    """A constant rate: one tensor at a time, torch.optim is fast only with Python numbers."""
    div_ = mul_ = add_ = fill_ = clamp_ = lambda self, *_, **__: self
    item = float.__float__


class Pictures(torch.utils.data.Dataset):
    """Single pictures as float32 in `scale`, with their labels and so on."""

    def __init__(self, tensors, scale):
        self.tensors, (self.low, self.high) = tensors, scale

    def __len__(self):
        return len(self.tensors[0])

    def __getitem__(self, i):
        x, *others = (t[i] for t in self.tensors)
        return (x.float() / 255 * (self.high - self.low) + self.low, *others)


class Loader(data.Batches):
    """torch's DataLoader with the interface of data.Batches."""

    def __init__(self, *tensors, **more):
        super().__init__(*tensors, **{**more, "resident": False})
        workers = 4 if self.cuda else 0  # on a CPU the step needs the cores
        loader = torch.utils.data.DataLoader(
            Pictures(self.tensors, self.scale), self.b, shuffle=True, drop_last=True, num_workers=workers,
            persistent_workers=workers > 0, pin_memory=self.cuda)
        self.endless = itertools.chain.from_iterable(itertools.repeat(loader))

    def __next__(self):
        items = [t.to(self.device, non_blocking=True) for t in next(self.endless)]
        return items if len(items) > 1 else items[0]


def descend(*losses_and_opts):
    """fuse.descend() with loss.backward(): gradients for every parameter that the loss depends on."""
    pairs, kept = list(zip(losses_and_opts[::2], losses_and_opts[1::2])), []
    for i, (loss, opt) in enumerate(pairs, 1):
        opt.zero_grad()
        loss.backward(retain_graph=i < len(pairs))
        kept += [(p, p.grad) for group in opt.param_groups for p in group["params"]]
        if i < len(pairs):
            opt.zero_grad()  # otherwise the next loss's gradients would be added to the kept ones
    for p, g in kept:
        p.grad = g
    for _, opt in pairs:
        opt.step()


def place(args, *nets):
    nets = [net.to(args.device) for net in nets]
    return nets if len(nets) > 1 else nets[0]


def optimizer(kind, **fixed):
    """`kind` of torch.optim, one tensor at a time; `fixed`: values built into the script's optimizer."""
    def make(params, lr, momentum=None, fused=None, **more):
        more |= {} if momentum is None else {"momentum": Rate(momentum)}
        return kind(params, Rate(lr), foreach=False, **more, **fixed)
    return make


def adam(params, lr, betas=(0.5, 0.999), weight_decay=0.0):
    return optimizer(torch.optim.Adam)(params, lr, betas=betas, weight_decay=weight_decay)


def textbook(script, loader):
    """Import the module `script` with a tutorial's loop.  It must not have been imported before."""
    fuse.descend, fuse.place, fuse.frozen = descend, place, lambda *nets: contextlib.nullcontext()
    fuse.SGD = optimizer(torch.optim.SGD)
    fuse.Adam = adam
    data.Batches = Loader if loader else data.Batches
    module = importlib.import_module(script)
    module.RMSProp = optimizer(torch.optim.RMSprop, alpha=0.9)  # vaegan.py's own
    return module


# ---- one measurement, in a separate process

class Done(Exception):
    """Raised to leave the script's main() when all measurements are done."""


class Bytes(TorchDispatchMode):
    """Sums the bytes that each operation reads and writes."""
    total = 0

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out = f(*args, **(kwargs or {}))
        if not f.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.total += sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        return out


def loop(self, job, found, turn, end=None):
    """Replaces Run.loop: warm up, wait for `turn()`, measure for job["seconds"] or at least two steps, and
    write the results to `found`."""
    if end == self.step:  # a phase without steps
        return
    args, numbers = self.args, itertools.count(1)
    cuda, compiled = args.device.startswith("cuda"), job["mode"] == "compiled"
    if compiled and not args.compile:
        raise UserError("--compile is not possible here")
    self.logger = log.Logger(None, args.steps, args.batch_size)

    def steps(n):
        began = time.perf_counter()
        for _ in range(n):
            yield next(numbers)
        if args.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - began

    found["start"] = time.time() - job["began"]
    warm = (6 if args.graph else 2) + 2 * compiled  # compilation, three steps, capture, replays
    preparing = yield from steps(warm)
    turn()
    step = yield from steps(1)
    for seconds in (0.1 * job["seconds"], job["seconds"]):  # first estimate, and let the clock rise
        n = max(1 + (seconds == job["seconds"]), round(seconds / step))
        cpu = time.process_time()
        step = (yield from steps(n)) / n
        cpu = (time.process_time() - cpu) / n
    peak = Path("/proc/self/status")  # getrusage would include the parent process
    peak = peak.read_text() if peak.exists() else ""
    found |= {"step": step, "cpu": cpu, "batch": args.batch_size, "compile": preparing - warm * step,
              "host": int(peak.split("VmHWM:")[1].split()[0]) * 1024 if "VmHWM:" in peak else None,
              "gpu": torch.cuda.max_memory_allocated() if cuda else None}
    if job["count"]:  # in separate steps, as each would count the other's work
        with FlopCounterMode(display=False) as flops:
            yield from steps(1)
        with Bytes() as moved:
            yield from steps(1)
        found |= {"flops": flops.get_total_flops(), "bytes": moved.total}
    raise Done


def work(job, turn):
    """Prepare the measurement `job`, wait for `turn()`, measure.  Returns a dict."""
    if job["mode"] == "limits":
        turn()
        return limits(torch.device(job["device"]), job["seconds"])
    plain, found = job["mode"] in ("textbook", "resident"), {}
    load = (lambda name: textbook(name, job["mode"] == "textbook")) if plain else importlib.import_module
    module = load(job["script"])
    with tempfile.TemporaryDirectory() as out, contextlib.suppress(Done), \
            mock.patch.object(run.Run, "loop", lambda self, *end: loop(self, job, found, turn, *end)), \
            mock.patch.object(run.Run, "show", lambda *_: None):
        module.main([*job["words"], "--out", out])
    return found


def serve(job):
    """work(job) for Machine.measure(): print "ready", wait for a line on stdin, print the results."""
    sys.excepthook, answers = run._one_line("bench"), sys.stdout

    def turn():
        print("ready", file=answers, flush=True)
        if not sys.stdin.readline():
            sys.exit(1)  # the parent is gone

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # hide the script's output
        found = work(job, turn)
    print(json.dumps(found), file=answers, flush=True)


def limits(device, seconds):
    """The best rates of the device: matrix products, and a copy (reads plus writes)."""
    cuda, rates = device.type == "cuda", {}
    n = 8192 if cuda else 1536

    def best(f):
        times, end = [], time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            began = time.perf_counter()
            f()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - began)
        return min(times)

    for name, dtype in ((FLOAT, torch.float32), (BFLOAT, torch.bfloat16)):
        if name == FLOAT or fuse.has_bf16(device):
            a, b, c = torch.randn(3, n, n, device=device).to(dtype)
            rates[name] = 2e-9 * n ** 3 / best(lambda a=a, b=b, c=c: torch.mm(a, b, out=c))
    a, b = torch.zeros(2, 2**28 if cuda else 2**26, device=device)
    return rates | {COPY: 2e-9 * a.nbytes / best(lambda: b.copy_(a))}


# ---- all measurements

class Machine:
    """Runs measurements in separate processes; while one measures, the others are suspended."""

    def __init__(self, jobs, cache):
        self.turn, self.processes = threading.Lock(), set()
        self.environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        if jobs > 1:
            self.environment["TORCHINDUCTOR_COMPILE_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))

    def signal(self, name, processes):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                if hasattr(os, "killpg"):  # include its DataLoader and compiler workers
                    os.killpg(process.pid, getattr(signal, name))
                elif name == "SIGKILL":
                    process.kill()

    def measure(self, job):
        """work(job) in a new process.  UserError: its error line, if it failed."""
        command = [sys.executable, "-m", "common.bench", "--work", json.dumps(job | {"began": time.time()})]
        with tempfile.TemporaryFile("w+") as errors:
            with self.turn:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                           stderr=errors, env=self.environment, start_new_session=True)
                self.processes.add(process)
            try:
                ready = next((line for line in process.stdout if line == "ready\n"), "")
                with self.turn:
                    others = self.processes - {process}
                    self.signal("SIGSTOP", others)
                    with contextlib.suppress(BrokenPipeError):
                        process.stdin.write("\n" * bool(ready))
                        process.stdin.close()
                    answer = next((line for line in process.stdout if line.startswith(("{", "["))), "")
                    self.signal("SIGCONT", others)
                process.wait()
            finally:
                self.signal("SIGKILL", [process])
                self.processes.discard(process)
            if answer:
                return json.loads(answer)
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"exit code {process.returncode}"]
            line = next((s for s in reversed(said) if re.match(r"[\w.]+(Error|Exception|\.py): ", s)),
                        said[-1])
            raise UserError(f"{job.get('script', '')} {job['mode']}: {line}".strip())


def row_of(job, runs):
    """The table row of the repeats `runs`: medians, but maxima of compile time and memory; empty without
    runs."""
    row = {"script": job["script"], "flags": job["shown"], "batch": None, "mode": job["mode"],
           **dict.fromkeys(("images/s", "low", "high", "x textbook", "ms", "cpu ms", "arithmetic %",
                            "bytes %", "start s", "compile s", "host MB", "gpu MB", "flops", "bytes")),
           "repeats": len(runs)}
    if not runs:
        return row
    rates = sorted(r["batch"] / r["step"] for r in runs)
    middle = {key: statistics.median(r[key] for r in runs) for key in ("step", "cpu", "start")}
    most = {key: max(r[key] for r in runs) for key in ("compile", "host", "gpu") if runs[0][key] is not None}
    row |= {"batch": runs[0]["batch"], "images/s": statistics.median(rates), "low": rates[0],
            "high": rates[-1], "ms": 1e3 * middle["step"], "cpu ms": 1e3 * middle["cpu"],
            "start s": middle["start"],
            "compile s": max(0.0, most["compile"]) if job["mode"] in ("compiled", "graph") else None}
    row |= {f"{key} MB": most[key] / 1e6 for key in ("host", "gpu") if key in most}
    return row | {key: next((r[key] for r in runs if key in r), None) for key in ("flops", "bytes")}


def compare(rows, rates):
    """Add to the rows of one script with its flags the shares of the limits `rates`, and the speedup over the
    textbook loop."""
    work, base = next((r for r in rows if r["flops"]), None), rows[0]
    for row in (r for r in rows if r["ms"]):
        if base["mode"] == "textbook" and base["ms"]:
            row["x textbook"] = row["images/s"] / base["images/s"]
        if work and rates:
            peak = rates.get(FLOAT if MODES[row["mode"]] == EAGER else BFLOAT, rates[FLOAT])
            for key, of, best in (("arithmetic %", "flops", peak), ("bytes %", "bytes", rates[COPY])):
                row[key] = 1e-4 * work[of] / row["ms"] / best


def table(rows):
    """A Markdown table of the rows, without empty columns."""
    columns = ["script", "flags", "batch", "mode", "images/s", "low", "high", "x textbook", "ms",
               "cpu ms", "arithmetic %", "bytes %", "host MB", "gpu MB", "start s", "compile s"]
    columns = [c for c in columns if any(row[c] not in (None, "") for row in rows)]

    def cell(v):
        if v is None or isinstance(v, str):
            return v or ""
        return f"{v:.0f}" if v >= 100 or v == int(v) else f"{v:.3g}"

    lines = [columns, ["---" if c in ("script", "flags", "mode") else "---:" for c in columns]]
    lines += [[cell(row[c]) for c in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def parser_of(script):
    """The argparse parser of a script."""
    class Found(Exception):
        pass

    def stop(p, *_, **__):
        raise Found(p)

    try:
        with mock.patch.object(run, "parse", stop), mock.patch.object(sys, "excepthook", sys.excepthook):
            importlib.import_module(script).parse_args([])
    except Found as e:
        return e.args[0]


def share_out(p, words, scripts):
    """Script -> which of the further flags it has.  Exits on a bad value or a flag that no script has."""
    groups, flags, known = [], {}, set()
    for word in words:
        if not word.startswith("--") and not groups:
            p.error(f"{word} found after a flag: scripts come first")
        groups = [*groups, [word]] if word.startswith("--") else [*groups[:-1], [*groups[-1], word]]
    for script in scripts:
        parser = parser_of(script)
        mine = [g for g in groups if g[0].split("=")[0] in parser._option_string_actions]
        known |= {g[0] for g in mine}
        flags[script] = [word for g in mine for word in g]
        parser.parse_args(flags[script])
    odd = [g[0] for g in groups if g[0] not in known]
    if odd:
        p.error(f"{odd[0]} found, which none of {', '.join(scripts)} has")
    return flags


def parse_args(argv=None):
    """The benchmark's own flags, and script -> flags for it."""
    p = argparse.ArgumentParser(prog="python -m common.bench", usage="%(prog)s [script ...] [flags]",
                                description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--modes", help="modes from the list above, separated by commas [all available; with "
                   "--quick not resident and fused, if there is bf16]")
    p.add_argument("--repeats", type=run.number(int, 1), help="processes per mode [3, --quick 1]")
    p.add_argument("--seconds", type=run.number(float, 0, open_low=True),
                   help="to measure, per process [10, --quick 2]")
    p.add_argument("--jobs", type=run.number(int, 1), default=1, metavar="N",
                   help="processes prepared in parallel [%(default)s]")
    p.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    p.add_argument("--scaling", action="store_true", help="compare batch and picture sizes, not modes")
    p.add_argument("--device", default="auto", help="as for the scripts [%(default)s]")
    p.add_argument("--json", metavar="FILE", type=Path, help="also write all measurements to this file")
    words = sys.argv[1:] if argv is None else argv
    scripts = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    args, further = p.parse_known_args(words[len(scripts):])
    device = run._device(args.device)
    args.device, args.repeats = str(device), args.repeats or (1 if args.quick else 3)
    args.seconds = args.seconds or (2 if args.quick else 10)
    bf16, cuda = fuse.has_bf16(device), device.type == "cuda"
    there = [m for m in MODES if {"bf16": bf16, "graph": cuda}.get(m, True)]
    default = [m for m in there if cuda or m != "compiled"]
    if args.scaling:  # the mode that the scripts use by default
        default = [[m for m in default if m != "compiled"][-1]]
    elif args.quick and bf16:
        default = [m for m in default if m not in ("resident", "fused")]
    modes = args.modes.split(",") if args.modes else default
    for what, names, known in (("script", scripts, SCRIPTS), ("mode", modes, there)):
        for name in names:
            if name not in known:
                p.error(f"{what} {name} found, expected out of {', '.join(known)}")
    args.modes = [m for m in there if m in modes]
    return args, share_out(p, further, scripts or SCRIPTS)


def main(argv=None):
    sys.excepthook = run._one_line("bench")
    args, flags = parse_args(argv)
    report = {"machine": run.machine(args.device), "torch": torch.__version__,
              "date": time.strftime("%Y-%m-%d"), "limits": {}, "rows": []}
    cache = tempfile.TemporaryDirectory()  # compile with a cold cache
    machine = Machine(args.jobs, cache.name)
    found, failed = {}, set()  # (script, flags, mode) -> (job, results of its repeats)

    def write():
        try:
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
        except OSError as e:
            raise UserError(f"--json {args.json} cannot be written ({e.strerror})") from None

    def attempt(job, key=None):
        """machine.measure(job).  If it fails, print one line, return None and skip further repeats."""
        try:
            return None if key in failed else machine.measure(job)
        except UserError as e:
            if key not in failed:
                print(e, file=sys.stderr, flush=True)
            failed.add(key)

    def measure(settings):
        """Measure all modes of each (script, words).  Returns script -> batch size of those that ran."""
        queue = []
        counted = next((m for m in ("fused", "resident", "bf16", "textbook") if m in args.modes), None)
        for script, words in settings:
            for repeat, mode in itertools.product(range(args.repeats), args.modes):
                job = {"script": script, "mode": mode, "shown": " ".join(words), "seconds": args.seconds,
                       "words": [*OWN.get(script, ()), *words, "--device", args.device, *ENDLESS,
                                 *MODES[mode]], "count": repeat == 0 and mode == counted}
                found.setdefault((script, job["shown"], mode), (job, []))
                queue.append(job)
        if args.jobs > 1:  # start the slowest first
            queue.sort(key=lambda job: job["mode"] != "compiled")
        keys = [(job["script"], job["shown"], job["mode"]) for job in queue]
        futures = {pool.submit(attempt, job, key): key for job, key in zip(queue, keys)}
        for future in as_completed(futures):
            key, one = futures[future], future.result()
            if one:
                found[key][1].append(one)
                print(*filter(None, key), f"{one['batch'] / one['step']:.4g} images/s", file=sys.stderr,
                      flush=True)
            report["rows"] = [row_of(*pair) for pair in found.values()]
            for _, rows in itertools.groupby(report["rows"], lambda row: (row["script"], row["flags"])):
                compare(list(rows), report["limits"])
            write()
        return {row["script"]: row["batch"] for row in report["rows"] if row["batch"]}

    write()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run `finally`, or processes stay suspended
    pool = ThreadPoolExecutor(args.jobs)
    try:
        job = {"mode": "limits", "device": args.device, "seconds": min(2, args.seconds)}
        report["limits"] = attempt(job) or {}
        batches = measure(flags.items())
        if args.scaling:
            factors = (0.5, 2) if args.quick else (0.25, 0.5, 2, 4)
            measure([(script, [*flags[script], *more]) for script, batch in batches.items() for more in (
                *(["--batch-size", str(max(2, round(factor * batch)))] for factor in factors),
                *SIZES.get(script, ()))])
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        machine.signal("SIGKILL", set(machine.processes))
    best = ", ".join(f"{rate:.3g} {name}" for name, rate in report["limits"].items())
    print(f"{report['machine']}, PyTorch {report['torch']}: {best}\n\n{table(report['rows'])}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        serve(json.loads(sys.argv[2]))
    else:
        main()
