"""Recorded runs: the files of results/, the rule for published values, keeping, running again, RESULTS.md."""

import copy
import importlib
import json
import time

import pytest
from conftest import script

from common import UserError, results

RECORDS = results.load()
PAPER = {"id": "x-error", "what": "error, %", "paper": "5.25", "data": ["mnist"],
         "where": {"net": [None, "mnist"]}}

# A script that writes what common/run.py writes, in the time that a test has.
SCRIPT = """
import argparse, json, pathlib, sys
p = argparse.ArgumentParser()
for flag in "seed", "data-dir", "out", "lr-D": p.add_argument("--" + flag)
a = p.parse_args()
if a.seed == "13": sys.exit(3)
report = json.loads(pathlib.Path("report.json").read_text())
report |= {"seed": int(a.seed or 0), "command": " ".join(["python", "gan.py", *sys.argv[1:]])}
folder = pathlib.Path(a.out, "gan-mnist")
folder.mkdir(parents=True)
(folder / "results.json").write_text(json.dumps(report))
"""


def report(command="python gan.py", settings="tuned", seed=0, value=6.5, **own):
    """A run's results.json."""
    return {"command": command, "settings": settings,
            "all settings": {"dataset": "mnist", "net": None, "width": 1.0, "name": "", "data_dir": "data",
                             "out": "runs", **own},
            "commit": "0123456789abcdef+", "seed": seed, "step": 1000, "seconds": 30.5, "machine": "a card",
            "mode": "step: eager | compile off | bf16 | 1 rank | cpu", "versions": {"torch": "2.6.0"},
            "date": "2026-01-01", "results": {"x-error": {"value": value, "unit": "%", "paper": 5.25}}}


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty checkout with one experiment and one script."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    (tmp_path / "results" / "notes").mkdir(parents=True)
    table = {"columns": ["", "paper", "PAPER", "TUNED", "other", "how", "command"], "how to read": ["How."],
             "measures": {}, "sections": [{"title": "A paper", "script": "gan", "experiments": [PAPER]}]}
    (tmp_path / "results" / "experiments.json").write_text(json.dumps(table))
    (tmp_path / "gan.py").write_text(SCRIPT)
    (tmp_path / "report.json").write_text(json.dumps(report()))
    return tmp_path


def run_folder(house, name, content):
    folder = house / "runs" / name
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def cells():
    """The rows of the table of RESULTS.md, as lists of cells."""
    lines = [line for line in results.markdown().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines][2:]


def test_RESULTS_md_is_up_to_date():
    assert (results.ROOT / "RESULTS.md").read_text("utf-8") == results.markdown()
    assert results.main(["--check"]) is None


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_is_whole_and_names_no_folder_of_a_machine(name):
    record = RECORDS[name]
    kinds = {"command": str, "settings": str, "all settings": dict, "seed": int, "step": int, "machine": str,
             "versions": dict, "results": dict}
    assert all(isinstance(record[k], kind) for k, kind in kinds.items())
    assert results.about(record)[0] in results.SCRIPTS and record["results"]
    assert name.startswith("-".join(results.about(record)[:2]))
    assert name.endswith(f"-s{record['seed']}") and record["settings"] in name.split("-")
    assert record == results.stripped(record) | {"settings": record["settings"]}
    assert bool(results.by_hand(record) or record.get("note")) == (record["settings"] in ("quick", "other"))


@pytest.mark.parametrize("name", RECORDS)
def test_the_script_still_takes_the_recorded_command(name):
    command = RECORDS[name]["command"]
    if "path/to/" not in command:
        script_of = importlib.import_module(results.about(RECORDS[name])[0])
        args = script_of.parse_args(command.split()[2:])
        assert args.seed == RECORDS[name]["seed"] and args.dataset == RECORDS[name]["all settings"]["dataset"]


def test_RESULTS_md_has_every_experiment_once_and_every_number_recorded():
    text = results.markdown()
    table = json.loads((results.ROOT / "results" / "experiments.json").read_text("utf-8"))
    ids = [e["id"] for section in table["sections"] for e in section["experiments"]]
    assert len(ids) == len(set(ids)) >= 58
    assert all(text.count(f"**{name}**: ") == 1 for name in ids)
    assert all(f"**{name}**" in text for r in RECORDS.values() for name in r["results"])
    assert results.PATH.search(text) is None


@pytest.mark.parametrize("change, stands", [
    ({}, True),
    ({"dataset": "faces"}, False),           # other data
    ({"dataset": "/home/me/mnist"}, True),   # the same from another place
    ({"width": 0.5}, False),                 # a narrower network
    ({"width": None}, True),                 # a script without the flag
    ({"net": "mnist"}, True),
    ({"net": "dcgan28"}, False),             # another network
])
def test_a_published_value_stands_beside_the_same_data_and_network_alone(change, stands):
    assert results.published(PAPER, report(**change)) is stands


def test_a_published_value_stands_where_the_script_sets_it_for_its_protocol():
    other = report()
    del other["results"]["x-error"]["paper"]
    assert not results.published(PAPER, other)
    other["results"] = {}
    assert not results.published(PAPER, other)


def test_no_recorded_run_on_other_data_has_a_published_value_in_its_row():
    rows = [r.split(" | ") for r in results.markdown().splitlines() if r.startswith("| ")]
    shapes = [r for r in rows if len(r) > 5 and r[5].startswith("shapes")]
    assert len(shapes) > 4 and {r[1] for r in shapes} <= {"not comparable", "none", ""}


def test_PAPER_and_TUNED_never_share_a_cell_and_seeds_are_summed_up(house):
    for seed, value in enumerate((5.0, 6.0, 7.0)):
        run = report(f"python gan.py --seed {seed}", seed=seed, value=value)
        results.keep(run_folder(house, f"a{seed}", run))
    results.keep(run_folder(house, "b", report("python gan.py --paper", "paper", value=8.0)))
    results.keep(run_folder(house, "c", report("python gan.py --lr-D 0.1 --paper", "paper", value=9.0)))
    results.keep(run_folder(house, "d", report("python gan.py --width 0.5", width=0.5, value=10.0)))
    paper, tuned, other, narrow = cells()
    assert paper[:5] == ["**x-error**: error, %", "5.25", "**8** %; seed 0", "", ""]
    assert tuned[2:] == ["", "**6 ± 1** %; seeds 0, 1, 2: 5, 6, 7", "",
                         "mnist, 1,000 steps, 30 s, a card, bf16, full width", "`python gan.py`, 0123456+"]
    assert other[2:5] == ["", "", "`--lr-D 0.1 --paper`: **9** %; seed 0"]
    assert narrow[1] == "not comparable" and narrow[3] == "**10** %; seed 0"
    assert narrow[5].endswith("width 0.5")


def test_further_numbers_stand_behind_the_value_and_are_averaged_over_seeds(house):
    for seed, least in enumerate((1.0, 2.0)):
        run = report(f"python gan.py --seed {seed}", seed=seed)
        run["results"]["x-error"] |= {"least": least, "by class": [1, 2], f"only {seed}": 3}
        results.keep(run_folder(house, f"a{seed}", run))
    (both,) = cells()
    assert both[3].endswith("; means: least 1.5")
    (house / "results" / next(n for n in results.load() if n.endswith("s1"))).with_suffix(".json").unlink()
    (one,) = cells()
    assert one[3].endswith("; seed 0; least 1; only 0 3")


def test_a_run_without_a_finite_number_is_named_among_its_seeds(house):
    for seed, value in ((2, 30.12), (3, None)):
        run = report(f"python gan.py --seed {seed}", seed=seed, value=value)
        run |= {"log": "as printed"} if seed == 3 else {}
        results.keep(run_folder(house, f"a{seed}", run))
    (only,) = cells()
    assert only[3] == "**30.12, not finite** %; seeds 2, 3"
    assert only[5].endswith("full width; as printed")


def test_numbers_of_other_scripts_are_never_beside_published_baselines(house):
    table = json.loads((house / "results" / "experiments.json").read_text())
    table["sections"][0]["experiments"] = [PAPER | {"data": [], "not run": "published by others"}]
    (house / "results" / "experiments.json").write_text(json.dumps(table))
    results.keep(run_folder(house, "a", report()))
    first, own = cells()
    assert first[2:5] == ["", "", ""] and own[:2] == ["x-error", "not comparable"]


def test_words_with_spaces_are_one_value():
    command = "python text2image.py --prompt 'a red square' --set 'name=two --words' --no-amp"
    assert results.flags(command) == {"prompt": ["a red square"], "set": ["name=two --words"], "no-amp": []}
    assert results.typed(["python", "text2image.py"], results.flags(command)) == command


def test_what_has_not_been_run_is_listed_with_the_reason(house):
    assert cells() == [["**x-error**: error, %", "5.25", "", "", "", "", "not run yet"]]
    results.keep(run_folder(house, "a", report(dataset="faces")))
    first, faces = cells()
    assert first[-1] == "not run yet" and first[1] == "5.25" and faces[1] == "not comparable"


def test_keep_drops_what_concerns_one_machine_alone(house):
    command = ("python gan.py --data-dir /mnt/data --out /mnt/runs --name one --device cuda:1 --seed 4 "
               "--no-amp --log-every 5 --dataset '/mnt/my pictures/birds' --encoder 'C:\\runs\\enc' "
               "--labels 100")
    full = report(command, seed=4, dataset="/mnt/pictures/birds", data_dir="/mnt/data", name="one")
    name = results.keep(run_folder(house, "one", full))
    assert name == "gan-birds-100-tuned-one-s4"
    kept = results.load()[name]
    assert kept["command"] == ("python gan.py --seed 4 --no-amp --dataset path/to/birds "
                               "--encoder path/to/enc --labels 100")
    assert kept["all settings"] == {"dataset": "path/to/birds", "net": None, "width": 1.0}
    assert kept["results"] == full["results"] and kept["commit"] == full["commit"]


def test_keep_names_settings_changed_by_hand(house):
    def name(*words, **own):
        return results.keep(run_folder(house, str(time.perf_counter_ns()), report(*words, **own)))
    assert name("python gan.py --steps 10 --no-compile") == "gan-mnist-tuned-s0"
    assert name("python gan.py --paper", "paper") == "gan-mnist-paper-s0"
    assert name("python gan.py --quick", "quick") == "gan-mnist-quick-s0"
    assert name("python gan.py --net dcgan28 --no-bn", net="dcgan28") == "gan-mnist-dcgan28-other-s0"
    assert name("python gan.py --paper --lr-D 0.1", "paper", width=0.25) == "gan-mnist-w0.25-other-s0"


def test_keep_refuses_a_path_among_the_numbers_and_damaged_files(house):
    leak = report()
    leak["results"]["x-error"]["unit"] = "as in /home/me/notes"
    lacking = copy.deepcopy(report())
    del lacking["commit"]
    for folder in (run_folder(house, "a", leak), run_folder(house, "b", lacking), run_folder(house, "c", []),
                   run_folder(house, "d", report(settings="mine")), house / "nowhere"):
        with pytest.raises(UserError) as e:
            results.keep(folder)
        assert "\n" not in str(e.value)
    assert not results.load()


def test_another_run_of_the_same_name_is_not_replaced(house):
    first = run_folder(house, "a", report(value=1.0))
    assert results.keep(first) == results.keep(first)      # the same run twice is no collision
    with pytest.raises(UserError, match="gan-mnist-tuned-s0.json holds another run"):
        results.keep(run_folder(house, "b", report(value=2.0)))
    assert results.load()["gan-mnist-tuned-s0"]["results"]["x-error"]["value"] == 1.0
    assert results.keep(run_folder(house, "c", report(value=2.0, name="c"))) == "gan-mnist-tuned-c-s0"


def test_run_again_replaces_the_record_and_another_seed_stands_beside_it(house, capfd):
    results.keep(run_folder(house, "a", report("python gan.py --lr-D 0.1", value=1.0, name="fast")))
    assert results.main(["--run", "x-error"]) is None
    assert results.main(["--run", "gan-mnist-other-fast-s0", "--seed", "5"]) is None
    assert "python gan.py --lr-D 0.1 --seed 5" in capfd.readouterr().out
    kept = results.load()
    assert list(kept) == ["gan-mnist-other-fast-s0", "gan-mnist-other-fast-s5"]
    assert kept["gan-mnist-other-fast-s0"]["results"]["x-error"]["value"] == 6.5
    assert kept["gan-mnist-other-fast-s5"]["command"] == "python gan.py --lr-D 0.1 --seed 5"
    assert results.main(["--check"]) is None
    with pytest.raises(SystemExit, match="results: gan-mnist-other-fast-s0: exit code 3, nothing kept"):
        results.main(["--run", "x-error", "--seed", "13"])


def test_an_unknown_id_and_a_stale_RESULTS_md_are_one_line(house):
    with pytest.raises(SystemExit, match="^results: nonsense found, an experiment .* expected$"):
        results.main(["--run", "nonsense"])
    with pytest.raises(SystemExit, match="^results: RESULTS.md is not up to date: .*$"):
        results.main(["--check"])
    assert not (house / "RESULTS.md").exists()


def test_what_fits_a_budget_runs_cheapest_first():
    records = {name: report() | {"seconds": seconds} for name, seconds in [("a", 50), ("b", 20), ("c", 45)]}
    records["d"] = report() | {"seconds": 1, "note": "changed in the code: everything"}
    assert results.chosen(None, 65 / 60, records) == ["b", "c"]
    assert results.chosen(None, 0.1, records) == results.chosen(None, None, records) == []
    records["a"]["settings"], records["b"]["settings"] = "paper", "other"
    assert results.chosen("x-error", None, records) == ["c"] and results.chosen("b", None, records) == ["b"]
    with pytest.raises(UserError, match="d found"):
        results.chosen("d", None, records)


def test_defaults_times_every_script_and_reports_failures(house, monkeypatch, capfd):
    (house / "cgan.py").write_text("import sys; sys.exit(4)")
    monkeypatch.setattr(results, "SCRIPTS", ("gan", "cgan"))
    assert results.main(["--defaults", "--data-dir", "elsewhere"]) == 1
    table = capfd.readouterr().out.splitlines()[-4:]
    assert table[1].startswith("| gan.py | 0 |") and table[2].startswith("| cgan.py | 4 |")
    assert table[3].startswith("| all | 4 |")
    assert len(list((house / "runs").glob("defaults-*/gan-mnist/results.json"))) == 1


def test_it_needs_no_torch():
    code = "import sys; from common import results; sys.exit('torch' in sys.modules)"
    assert script("-c", code).returncode == 0
