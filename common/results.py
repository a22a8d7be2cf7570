"""Recorded runs: results/ holds one small JSON file per run, from which RESULTS.md is generated.

    python -m common.results                           write RESULTS.md
    python -m common.results --keep runs/gan-mnist     copy a run's results.json into results/
    python -m common.results --run ig-cls --seed 5     repeat a recorded command and keep its results
    python -m common.results --defaults                time the seven default runs

results/experiments.json lists experiments and published values; results/notes/ has notes on each script, and
results/ablations/ the records behind the tables in these notes.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path, PureWindowsPath

from common import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("gan", "cgan", "dcgan", "text2image", "infogan", "aae", "vaegan")
NEEDED = ("commit", "seed", "step", "seconds", "machine", "mode", "versions", "date", "results")
SETTINGS = ("paper", "tuned", "quick", "other")
LOCAL = {"data-dir", "out", "name", "resume", "sample", "grid", "real", "set", "label", "export", "explore",
         "check", "device", "log-every", "save-every", "n",
         "prompt", "beside", "exemplars"}  # specific to a machine or to sampling: not kept
CHOICE = {"dataset", "net", "task", "prior", "model", "encoder", "labels", "clusters", "z-dim", "factor",
          "variant", "conditional", "attributes", "features", "dis", "phi-t", "image-features"}
LENGTH = {"steps", "width", "encoder-steps", "style-steps", "gan-steps", "nn-steps", "nn-samples"}
MODE = {"amp", "compile", "graph", "skip-bad", "seed"}
PATH = re.compile(r"(?:^|(?<=[\s'\"=:,(]))(?:/|~|\.\.[\\/]|[A-Za-z]:[\\/]|\\\\)[^\s/]")


def flags(command, but=()):
    """{flag: values} of a recorded command, in order."""
    found, values = {}, []
    for word in shlex.split(command):
        if word.startswith("--"):
            values = found[word[2:]] = []
        else:
            values.append(word)
    return {f: v for f, v in found.items() if f.removeprefix("no-") not in but}


def typed(start, chosen):
    """The words `start` and the flags `chosen` (flag -> values) as one command line."""
    return shlex.join([*start, *(w for f, v in chosen.items() for w in [f"--{f}", *v])])


def by_hand(record):
    """{flag: values} of settings changed: flags of none of the kinds above; --paper only beside others."""
    found = flags(record["command"], LOCAL | CHOICE | LENGTH | MODE)
    return {} if set(found) == {"paper"} else found


def about(record):
    """(script, data set, width as a fraction of the paper's) of a record."""
    settings, script = record["all settings"], record["command"].split()[1].removesuffix(".py")
    dataset = PureWindowsPath(settings["dataset"]).name.removesuffix(".npz")
    return script, dataset, float(settings.get("width") or 1)


def published(experiment, record):
    """Whether data, network and protocol (as the script reports it) match the published value."""
    own, (_, dataset, width) = record["results"].get(experiment["id"], {}), about(record)
    return ("paper" in own and dataset in experiment["data"] and width == 1 and
            all(record["all settings"].get(k) in v for k, v in experiment.get("where", {}).items()))


def read(path):
    """Read a report or record.  UserError: it is missing, damaged or incomplete."""
    try:
        found = json.loads(path.read_text())
        about(found), SETTINGS.index(found["settings"]), [found[k] for k in NEEDED]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise UserError(f"{path} is no results.json of a finished run ({e})") from None
    return found


def load():
    """{name: record} of results/, sorted by name."""
    return {p.stem: read(p) for p in sorted((ROOT / "results").glob("*-s[0-9]*.json"))}


def stripped(report):
    """The record of a run: its report without names and paths of the machine.  UserError: a path remains."""
    def plain(v):
        return f"path/to/{PureWindowsPath(v).name}" if isinstance(v, str) and PATH.match(v) else v
    command = {f: [plain(w) for w in v] for f, v in flags(report["command"], LOCAL).items()}
    settings = {k: plain(v) for k, v in report["all settings"].items() if k.replace("_", "-") not in LOCAL}
    record = report | {"command": typed(report["command"].split()[:2], command), "all settings": settings}
    record["settings"] = "other" if set(by_hand(record)) - {"paper", "quick"} else report["settings"]
    if left := PATH.search(text := json.dumps(record)):
        raise UserError(f"a path of this machine is among its results: {text[left.start():][:40]}")
    return record


def keep(folder, name=None):
    """Copy a run's results.json into results/ and return the record's name: `name`, overwriting it, else
    <script>-<dataset>[-<experiment>]-<settings>[-<name>]-s<seed>.  UserError: another run has this name."""
    report = read(Path(folder) / "results.json")
    record, (script, dataset, width) = stripped(report), about(report)
    chosen = [w for f, v in flags(record["command"], {"dataset"}).items() if f in CHOICE for w in v or [f]]
    words = [script, dataset, *(w for w in chosen if "/" not in w), f"w{width:g}" * (width != 1),
             record["settings"], report["all settings"].get("name") or "", f"s{record['seed']}"]
    own = re.sub(r"[^\w.+-]+", "_", "-".join(filter(None, words)))
    target, text = ROOT / "results" / f"{name or own}.json", json.dumps(record, indent=1) + "\n"
    if not name and target.exists() and target.read_text() != text:
        raise UserError(f"results/{target.name} holds another run: delete it, or give this one a --name")
    target.write_text(text)
    return target.stem


def value(group, name):
    """A table cell: mean, deviation and values over seeds, or one run's value; and its further numbers."""
    def number(v):
        return "not finite" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4g}"
    found = [r["results"][name] for r in group]
    values, unit = [own["value"] for own in found], f" {found[0].get('unit', '')}".rstrip()
    each, seeds = (", ".join(map(str, v)) for v in (map(number, values), (r["seed"] for r in group)))
    names = [k for k in found[0] if k != "value" and not k.startswith("paper")
             and all(type(own.get(k)) in (int, float) for own in found)
             and any(own[k] != own["value"] for own in found)]
    more = [f"{k} {number(statistics.mean(own[k] for own in found))}" for k in names]
    if len(group) == 1:
        return f"**{each}**{unit}; " + "; ".join([f"seed {seeds}", *more])
    if None in values:
        head = each
    else:
        std = statistics.stdev(values)
        head = f"{statistics.mean(values):.4g} ± {std:{'.2g' if std < 99.5 else '.0f'}}"
    return (f"**{head}**{unit}; seeds {seeds}" + f": {each}" * (None not in values)
            + f"; means: {', '.join(more)}" * bool(more))


def groups(records, name):
    """The records with this number, grouped if they differ only in seed, PAPER settings first."""
    found = {}
    for r in filter(lambda r: name in r["results"], records.values()):
        key = (SETTINGS.index(r["settings"]), *about(r), typed([], flags(r["command"], LENGTH | MODE)),
               r.get("note", ""), r["step"], r["machine"], r["mode"])
        found.setdefault(key, []).append(r)
    return [sorted(found[key], key=lambda r: r["seed"]) for key in sorted(found)]


def row(first, paper, group, name):
    """The table cells of one group of runs."""
    r, (_, dataset, width), text = group[0], about(group[0]), value(group, name)
    changed = "; ".join(filter(None, [f"`{typed([], by_hand(r))}`" * bool(by_hand(r)), r.get("note")])) + ": "
    cells = {"paper": [text, "", ""], "tuned": ["", text, ""]}.get(r["settings"], ["", "", changed + text])
    times = [f"{s:.0f} s" if s < 120 else f"{s / 60:.0f} min" for s in sorted(r["seconds"] for r in group)]
    machine = r["machine"].replace(", 1 threads", ", 1 thread")
    how = [dataset, f"{r['step']:,} steps", " to ".join(dict.fromkeys([times[0], times[-1]])), machine,
           *re.findall(r"bf16|fp32", r["mode"]), "full width" if width == 1 else f"width {width:g}"]
    notes = dict.fromkeys(g["log"] for g in group if "log" in g)
    commands = [f"`{typed(g['command'].split()[:2], flags(g['command'], {'seed'}))}`" for g in group]
    commits = [re.sub(r"^(.{7})\w*", r"\1", g["commit"]) for g in group if g["commit"]]
    return [first, paper, *cells, "; ".join([", ".join(how), *notes]),
            ", ".join(dict.fromkeys([*commands, *commits]))]


def rows(e, records):
    """Rows of one experiment: the paper's value beside runs with the same data and network, or alone."""
    found = groups(records, e["id"])
    same = [g for g in found if "data" not in e or published(e, g[0])]  # no "data": the paper has no number
    head = f"**{e['id']}**: {e['what']}", e["paper"]
    out = [row(*([e["id"], ""] if i else head), g, e["id"]) for i, g in enumerate(same)]
    out = out or [[*head, "", "", "", "", e.get("not run", "not run yet")]]
    return out + [row(e["id"], "not comparable", g, e["id"]) for g in found if g not in same]


def markdown():
    """The text of RESULTS.md."""
    def deeper(path, levels):
        return re.sub(r"(?m)^(?=#+ )", "#" * levels, path.read_text("utf-8")) if path.exists() else ""
    folder, records = ROOT / "results", load()
    table, parts = json.loads((folder / "experiments.json").read_text("utf-8")), []
    listed = {e["id"] for section in table["sections"] for e in section["experiments"]}
    for section in table["sections"]:
        own = {n: r for n, r in records.items() if about(r)[0] == section.get("script")}
        more = sorted({name for r in own.values() for name in r["results"]} - listed)
        more = [{"id": n, "what": table["measures"].get(n, "a measure"), "paper": "none"} for n in more]
        lines = [table["columns"], ["---"] * len(table["columns"]),
                 *(line for e in section["experiments"] for line in rows(e, records)),
                 *(line for e in more for line in rows(e, own))]
        parts += [f"\n## {section['title']}\n",
                  *(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in line)} |" for line in lines),
                  "\n" + deeper(folder / "notes" / f"{section.get('script')}.md", 2)]
    parts += ["## Speed\n", deeper(folder / "speed.md", 1)]
    return "\n".join(["# Results\n", *table["how to read"], *parts]).rstrip() + "\n"


def chosen(name, minutes, records):
    """The records to repeat: one by name, an experiment's first (TUNED before PAPER), or all that fit."""
    able = sorted((n for n, r in records.items() if not r.get("note") and "path/to/" not in r["command"]),
                  key=lambda n: records[n]["seconds"])
    if name:
        found = [n for s in ("tuned", "paper", "quick", "other") for n in records
                 if n in able and (n == name
                                   or records[n]["settings"] == s and name in records[n]["results"])]
        if not found:
            raise UserError(f"{name} found, an experiment or a record that can be run again expected")
        return found[:1]
    return [n for i, n in enumerate(able, 1)
            if sum(records[m]["seconds"] for m in able[:i]) <= 60 * (minutes or -1)]


def start(script, words, data, out):
    """Run a script and show its output.  Returns the exit code and the total seconds."""
    print(f"results: python {script}.py {' '.join(words)}", flush=True)
    begun = time.time()
    words = [*words, "--data-dir", data, "--out", out]
    return subprocess.call([sys.executable, f"{script}.py", *words], cwd=ROOT), time.time() - begun


def again(name, record, seed, data_dir):
    """Repeat a record's command.  The results replace the record, or become a new one for another seed."""
    seed = record["seed"] if seed is None else seed
    kept = re.sub(r"-s[0-9]+$", f"-s{seed}", name)
    out = ROOT / "runs" / time.strftime("again-%Y%m%d-%H%M%S") / kept
    words = shlex.split(typed([], flags(record["command"]) | {"seed": [str(seed)]}))
    if code := start(about(record)[0], words, data_dir, out)[0]:
        raise UserError(f"{name}: exit code {code}, nothing kept; the run's folder is in {out}")
    (folder,) = (path.parent for path in out.glob("*/results.json"))
    print(f"results: kept as {keep(folder, kept)}", flush=True)


def defaults(data_dir):
    """Run the seven scripts in turn and print a table of seconds.  Returns the exit code."""
    out = ROOT / time.strftime("runs/defaults-%Y%m%d-%H%M%S")
    lines = [(f"{script}.py", *start(script, [], data_dir, out)) for script in SCRIPTS]
    lines.append(("all", max(abs(code) for _, code, _ in lines), sum(seconds for *_, seconds in lines)))
    print("\n| script | exit code | seconds, figures and numbers included |\n|---|---|---|")
    print("\n".join(f"| {name} | {code} | {seconds:.0f} |" for name, code, seconds in lines))
    return int(lines[-1][1] > 0)


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m common.results", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_mutually_exclusive_group().add_argument
    add("--keep", nargs="+", metavar="RUN", help="folders of finished runs to record")
    add("--run", metavar="ID", help="repeat a record of results/, or an experiment (tuned settings first)")
    add("--minutes", type=float, help="repeat what fits in this time by the recorded seconds, cheapest first")
    add("--defaults", action="store_true", help="run and time all scripts with their defaults")
    add("--check", action="store_true", help="exit with 1 if RESULTS.md is not up to date")
    p.add_argument("--seed", type=int, help="random seed of repeated runs [the recorded one]")
    p.add_argument("--data-dir", default="data", help="where data sets are kept [%(default)s]")
    args = p.parse_args(argv)
    if args.defaults:
        return defaults(args.data_dir)
    try:
        for folder in args.keep or ():
            print(f"results: kept as {keep(folder)}")
        records, path = load(), ROOT / "RESULTS.md"
        for name in chosen(args.run, args.minutes, records):
            again(name, records[name], args.seed, args.data_dir)
        if not args.check:
            path.write_text(markdown(), "utf-8")
        elif not path.exists() or path.read_text("utf-8") != markdown():
            raise UserError("RESULTS.md is not up to date: python -m common.results writes it")
    except (UserError, KeyboardInterrupt) as e:
        sys.exit(f"results: {str(e) or 'interrupted'}")


if __name__ == "__main__":
    sys.exit(main())
