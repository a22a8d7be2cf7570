"""On a real card, `python -m pytest -m gpu`, under five minutes: every script, task, model, network and
variant at its default width in a CUDA graph, to its figures and results.json; the compiled, the captured and
the plain step agree; the loop never waits; runs resume and sample; the benchmark runs.

All runs are processes of their own, started side by side in the order of the tests: half as many as there are
cores, eight at most.  GAN_TEST_DEVICE=cpu makes them narrow and plain on a CPU, to try the tests themselves.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils._pytree import tree_flatten_with_path

from common import log, render

DEVICE = os.environ.get("GAN_TEST_DEVICE", "cuda")
CARD = DEVICE.startswith("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(CARD and not torch.cuda.is_available(),
                                                  reason="needs a CUDA GPU")]
SCRIPTS = ("gan", "dcgan", "cgan", "aae", "vaegan", "text2image", "infogan")
SHORT = {"cgan": ("--nn-samples", "1000"), "infogan": ("--gan-steps", "20"),
         "text2image": ("--encoder-steps", "20", "--style-steps", "20")}
HEADS, SMALL_HEADS, SHAPES = (("--dataset", f"{name}.npz") for name in ("heads64", "heads32", "shapes"))
RUNS = {  # each at its own width and batch, and a figure that only this one draws or that comes last
    "gan": ((), "fig3"),
    "dcgan": (HEADS, "fig8"),
    "cgan": ((), "fig2"),
    "aae": ((), "fig4a"),
    "vaegan": (HEADS, "fig3"),
    "text2image": (SHAPES, "fig8b"),
    "infogan": ((), "fig2b"),
    "aae semi": (("--task", "semi", "--nn-steps", "20"), "styles"),
    "aae cluster": (("--task", "cluster"), "fig9"),
    "aae reduce": (("--task", "reduce"), "fig11"),
    "aae style": (("--task", "style"), "fig7"),
    "aae likelihood": (("--task", "likelihood"), "samples"),
    "aae vae": (("--model", "vae"), "fig4a"),
    "text2image int-cls": ((*SHAPES, "--variant", "int-cls"), "fig8b"),
    "text2image gan": ((*SHAPES, "--variant", "gan"), "fig8b"),
    "text2image int": ((*SHAPES, "--variant", "int"), "fig8b"),
    "vaegan vae": ((*HEADS, "--model", "vae"), "fig3"),
    "vaegan gan": ((*HEADS, "--model", "gan"), "fig3"),
    "vaegan vae_dis": ((*HEADS, "--model", "vae_dis"), "fig3"),
    "vaegan vaegan_dis0": ((*HEADS, "--model", "vaegan_dis0", "--conditional", "--gating"), "fig4"),
    "cgan dcgan28": (("--net", "dcgan28"), "fig2"),
    "cgan dcgan32": ((*SMALL_HEADS, "--net", "dcgan32", "--attributes", "glasses,hat"), "fig2"),
    "cgan tags": ((*SHAPES, "--net", "tags"), "table2"),
    "dcgan imagenet": ((*SMALL_HEADS, "--net", "imagenet"), "fig8"),
    "dcgan svhn": ((*SMALL_HEADS, "--net", "svhn"), "fig8"),
    "infogan svhn": ((*SMALL_HEADS, "--net", "svhn"), "fig3a"),
    "infogan celeba": ((*SMALL_HEADS, "--net", "celeba"), "fig6_c1"),
    "infogan faces": ((*SMALL_HEADS, "--net", "faces"), "fig3a"),
    "infogan chairs": ((*HEADS, "--net", "chairs"), "fig3a"),
    "gan tfd": ((*SMALL_HEADS, "--net", "tfd"), "fig2b"),
    "gan cifar-fc": ((*SMALL_HEADS, "--net", "cifar-fc"), "fig2c"),
    "gan cifar-conv": ((*SMALL_HEADS, "--net", "cifar-conv", "--alternate", "--k", "2"), "fig2d"),
    "gan toy": (("--dataset", "toy"), "fig1"),
}
# One configuration a script, narrow, for comparisons: float32 without TF32.
NARROW = {
    "gan": ("--width", ".1"),
    "dcgan": (*SMALL_HEADS, "--net", "svhn", "--width", ".25"),
    "cgan": ("--net", "dcgan28", "--width", ".25"),
    "aae": ("--task", "semi", "--width", ".1", "--nn-steps", "0"),
    "vaegan": (*SMALL_HEADS, "--net", "32", "--width", ".25"),
    "text2image": (*SHAPES, "--width", ".1", "--encoder-steps", "12", "--style-steps", "12"),
    "infogan": (*SMALL_HEADS, "--net", "faces", "--gan-steps", "0"),
}
MODES = {"plain": ("--no-compile", "--no-graph"), "graph": ("--no-compile",), "compiled": ("--compile",)}
# Of a norm, see apart().  On an H200, cuDNN's atomics and Adam's first steps, signs of gradients, put
# networks up to .03 apart in 12 steps.  Moments of gradients near zero differ by their own size: left out.
TOLERANCE = {"graph": 0.06, "compiled": 0.06, "resume": 0.06}
MOMENTS = ("exp_avg", "exp_avg_sq", "s")
EXACT = {"NVIDIA_TF32_OVERRIDE": "0"}

LOOP_ALONE = """if True:  # a script up to the end of its loop; in the steps given first a wait is an error
    import importlib, json, sys, torch
    from common.run import Run
    if "--compile" in sys.argv:  # Inductor's own random numbers are not PyTorch's
        from torch._inductor import config
        config.fallback_random = True
    checked, loop = set(json.loads(sys.argv[1])), Run.loop
    debug = torch.cuda.set_sync_debug_mode if torch.cuda.is_available() else lambda mode: None

    def watched(self, end=None):
        for step in loop(self, end):
            debug("error" if step in checked else "default")
            yield step
            debug("default")
            checked.discard(step)
        if self.step < sum(vars(self.args).get(k, 0) for k in ("encoder_steps", "steps", "style_steps")):
            return
        assert not checked, checked
        debug("error")
        try:
            torch.ones(1, device=self.args.device).item()
        except RuntimeError:
            print("a wait is an error")
        sys.exit()

    Run.loop = watched
    importlib.import_module(sys.argv[2]).main(sys.argv[3:])
"""


def workers():
    """Half of the cores, eight at most, and six GB of the card's memory for each."""
    n = min(8, (os.cpu_count() or 2) // 2)
    if CARD and torch.cuda.is_available():
        n = min(n, torch.cuda.mem_get_info()[0] // (6 * 2**30))
    return max(1, n)


def job_of(name, folder):
    """The command lines of a job, one after the other: what each test waits for by its name."""
    kind, _, rest = name.partition(": ")
    script, _, mode = rest.partition(" ")

    def words(own, *more):
        own = [str(folder / w) if w.endswith(".npz") else w for w in (*own, *more)]
        return [*own, "--device", DEVICE, "--data-dir", str(folder), "--out", str(folder / "runs")]

    if kind == "run":
        narrow = () if CARD or script == "gan" and mode == "toy" else ("--width", ".05")
        own = words(RUNS[rest][0], "--steps", "30", "--name", rest.replace(" ", "-"), *narrow)
        lines = [[f"{script}.py", *SHORT.get(script, ()), *own]]
        if mode == "vae_dis":  # after the GAN whose Dis it takes
            first = [w.replace("vae_dis", "gan") if w == "vae_dis" else w for w in lines[0]]
            first[first.index("--name") + 1] = "dis"
            lines = [first, [*lines[0], "--dis", str(folder / "runs" / "vaegan-heads64-dis")]]
        return lines
    narrow = [*SHORT.get(script, ()), *words(NARROW[script], "--no-amp", "--log-every", "1")] if rest else []
    if kind == "compare":
        return [["-c", LOOP_ALONE, "[]", script, *narrow, *MODES[mode], "--steps", "12", "--name", mode]]
    if kind == "wait":  # from the ninth step of each phase to its last but one
        phases = (12, 20, 12) if script == "text2image" else (20,)
        ends = np.cumsum(phases).tolist()
        checked = [s for n, end in zip(phases, ends) for s in range(end - n + 9, end)]
        return [["-c", LOOP_ALONE, json.dumps(checked), script, *narrow, "--batch-size", "32",
                 "--steps", "20", "--name", "wait"]]
    if kind == "resume":
        begun = str(folder / "runs" / f"{script}-{dataset(script)}-half")
        again = [f"{script}.py", "--resume", begun, "--data-dir", str(folder)]
        return [[f"{script}.py", *narrow, "--steps", "8", "--name", "whole"],
                [f"{script}.py", *narrow, "--steps", "4", "--name", "half"],
                [*again, "--steps", "8"], [*again, "--sample", "4"]]
    modes = "graph,compiled" if CARD else "fused,bf16,textbook"
    return [["-m", "common.bench", "gan", "--quick", "--modes", modes, "--device", DEVICE, "--data-dir",
             str(folder), "--json", str(folder / "bench.json")]]


def refused(names):
    """Why a test that waits for these jobs is left out."""
    if not names[-1].endswith(" compiled"):
        return ""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
        return "compiling a whole iteration needs torch 2.11"
    return "" if CARD or names[-1] == "compare: gan compiled" else "minutes of compiling on a CPU"


def dataset(script):
    words = NARROW[script]
    return words[words.index("--dataset") + 1].removesuffix(".npz") if "--dataset" in words else "mnist"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """MNIST and small sets of rendered pictures; the runs are made in it."""
    path = tmp_path_factory.mktemp("cuda")
    shutil.copytree(ROOT / "data" / "MNIST", path / "MNIST")
    sets = {"heads64": render.faces(1500), "heads32": render.faces(1500, 32), "shapes": render.shapes(600)}
    for name, found in sets.items():
        found.pop("attribute_values", None)  # lists of several lengths
        np.savez(path / f"{name}.npz", **{k: np.asarray(v) for k, v in found.items()})
    return path


@pytest.fixture(scope="session")
def jobs(request, folder):
    """Name of a job -> a future of its processes; those of all tests to come are started at once."""
    seconds = {}

    def run(name):
        began, done = time.perf_counter(), []
        for words in job_of(name, folder):
            exact = EXACT if name.startswith(("compare", "resume")) else {}
            done.append(subprocess.run(
                [sys.executable, *words], cwd=ROOT, text=True, capture_output=True, check=False,
                timeout=280 if CARD else 1200, env={**os.environ, "OMP_NUM_THREADS": "2", **exact}))
            if done[-1].returncode:
                break
        seconds[name] = time.perf_counter() - began
        return done

    params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    names = dict.fromkeys(name for p in params for name in p.get("names", ()) if not refused(p["names"]))
    pool = ThreadPoolExecutor(workers())
    futures = {name: pool.submit(run, name) for name in names}
    yield futures
    pool.shutdown(cancel_futures=True)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        slowest = sorted(seconds, key=seconds.get)[:-6:-1]
        print("\nslowest:", ", ".join(f"{name} {seconds[name]:.0f} s" for name in slowest))


def finished(jobs, name):
    """The processes of a job, all of which ended well."""
    done = jobs[name].result()
    assert done[-1].returncode == 0, f"{name}: {done[-1].stdout[-500:]}\n{done[-1].stderr[-3000:]}"
    return done


def named(*names):
    """A test for each of `names`: tuples of the jobs that it waits for."""
    return pytest.mark.parametrize("names", [n if isinstance(n, tuple) else (n,) for n in names],
                                   ids=lambda names: names[-1].partition(": ")[2] or names[-1])


def apart(run, other):
    """How far two runs are apart, relative to the norm of what the first holds: each network, each scalar
    logged, and of an optimizer SGD's momenta and Adam's counts, which show an update too many or too few."""
    sides = []
    for folder in (run, other):
        side = {}
        parts = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)["parts"]
        for path, leaf in tree_flatten_with_path(parts)[0]:
            keys = [getattr(step, "key", getattr(step, "idx", None)) for step in path]
            if torch.is_tensor(leaf) and leaf.isfinite().all():
                name = f"{keys[0]} {keys[-1]}" if "state" in keys else keys[0]
                side.setdefault(name, []).append(leaf.double().flatten())
        for line in log.history(folder):
            for key in line.keys() - {"seconds", "images/s"}:
                side.setdefault(f"log {key}", []).append(torch.tensor([line[key]], dtype=torch.double))
        sides.append({name: torch.cat(tensors) for name, tensors in side.items()})
    a, b = sides
    assert a.keys() == b.keys() and len(a) > 8 and any(name.startswith("opt") and " " in name for name in a)
    return {name: ((a[name] - b[name]).norm() / a[name].norm().clamp(min=1e-12)).item() for name in a
            if not (name.startswith("opt") and name.split()[-1] in MOMENTS)}


def numbers(found):
    """All numbers in a nested dict or list."""
    for v in found.values() if isinstance(found, dict) else found if isinstance(found, list) else [found]:
        if isinstance(v, (dict, list)):
            yield from numbers(v)
        elif isinstance(v, (int, float)):
            yield v


def check_run(name, jobs, folder):
    """Figures, finite numbers in results.json and metrics.jsonl, and the mode."""
    finished(jobs, name)
    name = name.removeprefix("run: ")
    run, = (folder / "runs").glob(f"{name.split()[0]}-*-{name.replace(' ', '-')}")
    assert (run / f"{RUNS[name][1]}.png").stat().st_size > 500, sorted(p.name for p in run.iterdir())
    report, lines = json.loads((run / "results.json").read_text()), log.history(run)
    assert report["results"] and lines and len(lines[-1]) > 3
    assert all(map(math.isfinite, numbers([report["results"], lines])))
    assert not CARD or "graph" in report["mode"].replace("-", " ").lower().split(), report["mode"]


@named(*(f"run: {script}" for script in SCRIPTS))
def test_each_script_at_its_default_width(names, jobs, folder):
    check_run(names[0], jobs, folder)


@named(*(f"wait: {script}" for script in SCRIPTS))
def test_the_loop_never_waits_for_the_device(names, jobs):
    done = finished(jobs, names[0])
    assert not CARD or "a wait is an error" in done[0].stdout


@named(*((f"compare: {script} plain", f"compare: {script} {mode}") for mode in ("graph", "compiled")
         for script in SCRIPTS))
def test_modes_agree(names, jobs, folder):
    script, mode = names[-1].removeprefix("compare: ").split()
    if refused(names):
        pytest.skip(refused(names))
    for name in names:
        finished(jobs, name)
    found = apart(*(folder / "runs" / f"{script}-{dataset(script)}-{m}" for m in ("plain", mode)))
    assert max(found.values()) <= TOLERANCE[mode], found


@named("resume: gan", "resume: dcgan")
def test_a_captured_run_resumes_and_samples(names, jobs, folder):
    finished(jobs, names[0])
    script = names[0].removeprefix("resume: ")
    whole, half = (folder / "runs" / f"{script}-{dataset(script)}-{name}" for name in ("whole", "half"))
    found = apart(whole, half)
    assert max(found.values()) <= TOLERANCE["resume"], found
    assert [line["step"] for line in log.history(half)] == list(range(1, 9))
    assert len(list((half / "samples").glob("*.png"))) == 4


@named(*(f"run: {name}" for name in RUNS if name not in SCRIPTS))
def test_every_other_task_model_and_network_at_its_default_width(names, jobs, folder):
    check_run(names[0], jobs, folder)


@named("bench")
def test_the_benchmark(names, jobs, folder):
    finished(jobs, names[0])
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    assert len(rows) >= 2 and all(row["images/s"] > 0 for row in rows)
