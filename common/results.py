"""Recorded runs: results/ holds one small JSON file for each, and RESULTS.md is written from them.

    python -m common.results                           write RESULTS.md
    python -m common.results --keep runs/gan-mnist     copy a run's results.json into results/
    python -m common.results --run ig-cls --seed 5     run a recorded command again and keep its results
    python -m common.results --defaults                time the seven default runs

results/experiments.json lists the experiments and the papers' values, results/notes/SCRIPT.md says what is
known about a script, results/before.md holds the numbers recorded before these files were kept.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path, PureWindowsPath

from common import UserError

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("gan", "cgan", "dcgan", "text2image", "infogan", "aae", "vaegan")
NEEDED = ("command", "settings", "all settings", "commit", "seed", "step", "seconds", "machine", "mode",
          "versions", "date", "results")
SETTINGS = ("paper", "tuned", "quick", "other")
# What a flag of a recorded command is.  Any other flag is a setting changed by hand.
LOCAL = {"data-dir", "out", "name", "resume", "sample", "check", "device", "log-every", "save-every", "n",
         "prompt", "prompts", "beside", "exemplars"}  # of one machine, or of what is drawn: not kept
CHOICE = {"dataset", "net", "task", "prior", "model", "encoder", "labels", "clusters", "z-dim", "factor",
          "variant", "conditional", "attributes", "features", "dis", "phi-t", "image-features"}
LENGTH = {"steps", "width", "encoder-steps", "style-steps", "gan-steps", "nn-steps", "nn-samples"}
MODE = {"amp", "compile", "graph", "skip-bad", "seed"}
PATH = re.compile(r"(?:^|(?<=[\s'\"=:,(]))(?:/|~|\.\.[\\/]|[A-Za-z]:[\\/]|\\\\)[^\s/]")


def flags(command, without=()):
    """{flag: values} of a recorded command, in its order."""
    return {f: v for f, *v in map(str.split, command.split(" --")[1:]) if f not in without}


def typed(start, chosen):
    """`start` and the flags of `chosen` (flag -> values) as one line."""
    return " ".join([*start, *(w for f, v in chosen.items() for w in [f"--{f}", *v])])


def by_hand(record):
    """The settings changed by hand, flag -> values, with --paper or --quick if that was changed."""
    found = {f: v for f, v in flags(record["command"]).items()
             if f.removeprefix("no-") not in LOCAL | CHOICE | LENGTH | MODE}
    return {} if set(found) == {"paper"} else found


def about(record):
    """(script, data set, width as a fraction of the paper's) of a record."""
    settings = record["all settings"]
    return (record["command"].split()[1].removesuffix(".py"), PureWindowsPath(settings["dataset"]).stem,
            float(settings.get("width") or 1))


def published(experiment, record):
    """Whether the paper's value may stand beside this run: the script says that its protocol is the paper's,
    data and width are, and so are the settings of the network, `experiment["where"]` (name -> values)."""
    own, (_, dataset, width) = record["results"].get(experiment["id"], {}), about(record)
    return ("paper" in own and dataset in experiment["data"] and width == 1 and
            all(record["all settings"].get(k) in v for k, v in experiment.get("where", {}).items()))


def read(path):
    """The report or record in `path`.  UserError: it is missing, damaged or incomplete."""
    try:
        found = json.loads(path.read_text())
        if [k for k in NEEDED if k not in found] or found["settings"] not in SETTINGS or not about(found):
            raise ValueError(f"{', '.join(NEEDED)} expected")
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as e:
        raise UserError(f"{path} is no results.json of a finished run ({e})") from None
    return found


def load():
    """{name: record} of results/, in order of name."""
    return {p.stem: read(p) for p in sorted((ROOT / "results").glob("*-s[0-9]*.json"))}


def stripped(report):
    """The record of a run: its report without names and paths of one machine.  UserError: a path is left."""
    def plain(v):
        return f"path/to/{PureWindowsPath(v).name}" if isinstance(v, str) and PATH.match(v) else v
    command = {f: [plain(w) for w in v] for f, v in flags(report["command"], LOCAL).items()}
    settings = {k: plain(v) for k, v in report["all settings"].items() if k.replace("_", "-") not in LOCAL}
    record = report | {"command": typed(report["command"].split()[:2], command), "all settings": settings}
    record["settings"] = "other" if set(by_hand(record)) - {"paper", "quick"} else report["settings"]
    left = PATH.search(text := json.dumps(record))
    if left:
        raise UserError(f"a path of this machine is among its results: {text[left.start():][:40]}")
    return record


def keep(folder, name=None):
    """Copy a run's results.json into results/ and return the record's name: `name`, which is replaced, else
    <script>-<dataset>[-<experiment>]-<settings>[-<name>]-s<seed>.  UserError: another run has it."""
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


def number(v):
    return "not finite" if v is None else f"{v:,}" if isinstance(v, int) else f"{v:.4g}"


def value(group, name):
    """The cell of one number: mean and deviation over seeds and each value, or all that one run says of it."""
    own = group[0]["results"][name]
    values, unit = [r["results"][name]["value"] for r in group], f" {own.get('unit', '')}".rstrip()
    if len(group) > 1 and None not in values:
        return (f"**{statistics.mean(values):.4g} ± {statistics.stdev(values):.2g}**{unit}; seeds "
                f"{', '.join(str(r['seed']) for r in group)}: {', '.join(map(number, values))}")
    more = [f"{k} {number(v)}" for k, v in own.items()
            if type(v) in (int, float) and k != "value" and not k.startswith("paper")]
    return f"**{', '.join(map(number, values))}**{unit}; " + "; ".join([f"seed {group[0]['seed']}", *more])


def groups(records, name):
    """The records that hold this number, those that differ in seed alone together, PAPER's first."""
    found = {}
    for r in records.values():
        if name in r["results"]:
            chosen = {f: v for f, v in flags(r["command"]).items() if f in CHOICE}
            key = (SETTINGS.index(r["settings"]), *about(r), str(chosen), str(by_hand(r)), r.get("note", ""),
                   r["step"], r["machine"])
            found.setdefault(key, []).append(r)
    return [sorted(found[key], key=lambda r: r["seed"]) for key in sorted(found)]


def row(first, paper, group, name):
    """The cells of one group of runs."""
    r, cells = group[0], ["", "", ""]
    _, dataset, width = about(r)
    place = min(SETTINGS.index(r["settings"]), 2)
    changed = "; ".join(filter(None, [f"`{typed([], by_hand(r))}`" * bool(by_hand(r)), r.get("note")]))
    cells[place] = f"{changed}: " * (place == 2) + value(group, name)
    times = [f"{s:.0f} s" if s < 120 else f"{s / 60:.0f} min" for s in sorted(r["seconds"] for r in group)]
    how = [dataset, f"{r['step']:,} steps", " to ".join(dict.fromkeys([times[0], times[-1]])), r["machine"],
           *re.findall(r"bf16|fp32", r["mode"]), "full width" if width == 1 else f"width {width:g}"]
    commands = [f"`{typed(g['command'].split()[:2], flags(g['command'], {'seed'}))}`" for g in group]
    commits = [re.sub(r"^(.{7})\w*", r"\1", g["commit"]) for g in group if g["commit"]]
    return [first, paper, *cells, ", ".join(how), ", ".join(dict.fromkeys([*commands, *commits]))]


def rows(e, records, before):
    """The rows of one experiment: the paper's value beside runs with its data and network, or alone."""
    found = groups(records, e["id"])
    same = [g for g in found if "data" not in e or published(e, g[0])]  # no "data": the paper has no number
    title = " ".join(filter(None, [f"**{e['id']}**: {e['what']}.", e.get("protocol")]))
    out = [row(e["id"] if i else title, "" if i else e["paper"], g, e["id"]) for i, g in enumerate(same)]
    if not same:
        known = re.search(rf"(?m)^\| [^|]*\b{e['id']}[ ,]", before)
        why = [e.get("not run", "" if known else "not run yet"), "recorded earlier: last section" if known else ""]
        out = [[title, e["paper"], "", "", "", "", "; ".join(filter(None, why))]]
    return out + [row(e["id"], "not comparable", g, e["id"]) for g in found if g not in same]


def markdown():
    """The text of RESULTS.md."""
    def deeper(path, levels):
        return re.sub(r"(?m)^(?=#+ )", "#" * levels, path.read_text()) if path.exists() else ""
    folder, records = ROOT / "results", load()
    table, before = json.loads((folder / "experiments.json").read_text()), deeper(folder / "before.md", 1)
    listed = {e["id"] for section in table["sections"] for e in section["experiments"]}
    parts = ["# Results\n", "<!-- Written by python -m common.results.  Do not edit. -->", *table["how to read"]]
    for section in table["sections"]:
        own = {n: r for n, r in records.items() if about(r)[0] == section.get("script")}
        more = sorted({name for r in own.values() for name in r["results"]} - listed)
        more = [{"id": n, "what": table["measures"].get(n, "not in the paper"), "paper": "none"} for n in more]
        lines = [table["columns"], ["---"] * len(table["columns"]),
                 *(line for e in section["experiments"] for line in rows(e, records, before)),
                 *(line for e in more for line in rows(e, own, before))]
        parts += [f"\n## {section['title']}\n",
                  *(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in line)} |" for line in lines),
                  "\n" + deeper(folder / "notes" / f"{section.get('script')}.md", 2)]
    return "\n".join([*parts, "## Recorded before these files were kept\n", before]).rstrip() + "\n"


def chosen(name, minutes, records):
    """The names of what to run again: the record `name`, or the first of the experiment `name`, TUNED's before
    PAPER's; without a name what fits `minutes` by recorded seconds, cheapest first."""
    able = sorted((n for n in records if not records[n].get("note")), key=lambda n: records[n]["seconds"])
    if name:
        first = [n for s in ("tuned", "paper", "quick", "other") for n in sorted(able)
                 if records[n]["settings"] == s and name in records[n]["results"]]
        if name not in records and not first:
            raise UserError(f"{name} found, an experiment that was run or the name of a file of results/ expected")
        return [name] if name in records else first[:1]
    while able and sum(records[n]["seconds"] for n in able) > 60 * (minutes or -1):
        able.pop()
    return able


def start(script, words, data_dir, out):
    """Run a script, its output shown; the exit code and the seconds that all of it took."""
    print(f"results: python {script}.py {' '.join(words)}", flush=True)
    begun = time.time()
    done = subprocess.run([sys.executable, f"{script}.py", *words, "--data-dir", data_dir, "--out", str(out)],
                          cwd=ROOT, check=False)
    return done.returncode, time.time() - begun


def again(name, record, seed, data_dir):
    """Run a record's command again; its results replace the record's, or stand beside it for another seed."""
    if record.get("note") or about(record)[0] not in SCRIPTS:
        raise UserError(f"{name} cannot be run again by its command ({record.get('note', 'no such script')})")
    seed, out = record["seed"] if seed is None else seed, ROOT / time.strftime(f"runs/again-%Y%m%d-%H%M%S/{name}")
    words = typed([], flags(record["command"]) | {"seed": [str(seed)]}).split()
    code, _ = start(about(record)[0], words, data_dir, out)
    if code:
        raise UserError(f"{name}: exit code {code}, nothing kept; the run's folder is in {out}")
    (folder,) = (path.parent for path in out.glob("*/results.json"))
    print(f"results: kept as {keep(folder, re.sub(r'-s[0-9]+$', f'-s{seed}', name))}", flush=True)


def defaults(data_dir):
    """Run the seven scripts one after another and print a table of seconds; the exit code."""
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
    add("--run", metavar="ID", help="run again: a file of results/, or an experiment (tuned settings first)")
    add("--minutes", type=float, help="run again what fits this budget, by recorded seconds, cheapest first")
    add("--defaults", action="store_true", help="run all scripts with their defaults and time them")
    add("--check", action="store_true", help="exit with 1 if RESULTS.md is not up to date")
    p.add_argument("--seed", type=int, help="with --run: another seed than the recorded one")
    p.add_argument("--data-dir", default="data", help="where data sets are kept [%(default)s]")
    args = p.parse_args(argv)
    if args.seed is not None and not args.run:
        p.error("--seed needs --run ID")
    if args.defaults:
        return defaults(args.data_dir)
    try:
        for folder in args.keep or ():
            print(f"results: kept as {keep(folder)}")
        records, path = load(), ROOT / "RESULTS.md"
        for name in chosen(args.run, args.minutes, records):
            again(name, records[name], args.seed, args.data_dir)
        if not args.check:
            path.write_text(markdown())
        elif not path.exists() or path.read_text() != markdown():
            raise UserError("RESULTS.md is not up to date: python -m common.results writes it")
    except UserError as e:
        sys.exit(f"results: {e}")


if __name__ == "__main__":
    sys.exit(main())
