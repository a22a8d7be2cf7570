"""Documents are tests: commands parse, names that headers point to exist, lines are short."""

import ast
import importlib
import re
import shlex

import pytest
from conftest import ROOT, script

SCRIPTS = sorted(p for p in ROOT.glob("*.py"))
NAMES = [p.stem for p in SCRIPTS]
TEXTS = "\n".join((ROOT / name).read_text("utf-8") for name in ("README.md", "FAQ.md", "weights/README.md"))


def commands(text):
    """The words after `python` of every command that runs one of the scripts."""
    found = re.findall(r"\bpython (\w+)\.py((?: +[^#`(|\n]+)?)", text)
    return [(name, shlex.split(rest)) for name, rest in found if name in NAMES]


def header(path):
    return ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_every_command_of_headers_and_documents_parses(path):
    module = importlib.import_module(path.stem)
    mine = [words for name, words in commands(header(path) + "\n" + TEXTS) if name == path.stem]
    assert mine, "no command found"
    for words in mine:
        for flag in {"--resume", "--explore"} & {*words}:   # of a run that is not here
            words[words.index(flag) + 1] = str(ROOT / "weights" / f"{path.stem}.npz")
        module.parse_args(words)


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_every_name_that_a_header_points_to_exists(path):
    module = importlib.import_module(path.stem)
    source = path.read_text()
    lines = re.findall(r"-> (.+)$", header(path), re.MULTILINE)
    assert len(lines) >= 4
    for name in re.findall(r"\w+", " ".join(lines)):
        assert hasattr(module, name) or re.search(rf"def {name}\(", source), name


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_help_reads_and_names_every_flag(path):
    result = script(path.name, "--help", COLUMNS="80")
    assert result.returncode == 0 and header(path).splitlines()[0][:60] in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    text = " ".join(result.stdout.replace('"', "").replace("\\\n", "").split())
    for name, words in commands(header(path)):
        assert name != path.stem or " ".join(["python", path.name, *words]) in text, words
    for flag in ("--dataset", "--steps", "--resume", "--sample", "--check", "--no-graph"):
        assert flag in result.stdout


def test_importing_a_script_does_nothing():
    result = script("-c", f"import sys; sys.dont_write_bytecode = True; import {', '.join(NAMES)}")
    assert result.returncode == 0 and result.stdout == result.stderr == ""


def test_tensorflow_is_not_imported_where_it_is_installed(tmp_path):
    (tmp_path / "tensorflow.py").write_text("print('imported')")
    words = "-c", "from common import log; log.SummaryWriter(r'{}').close()".format(tmp_path / "events")
    result = script(*words, PYTHONPATH=str(tmp_path))
    assert result.returncode == 0 and result.stdout == "" and any((tmp_path / "events").iterdir())


def test_scripts_stand_alone():
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
                assert not set(modules) & set(NAMES), f"{path.name} imports {modules}"


def test_columns():
    for path in [*SCRIPTS, *ROOT.glob("common/*.py"), *ROOT.glob("tests/*.py")]:
        long = [i for i, line in enumerate(path.read_text("utf-8").splitlines(), 1) if len(line) > 110]
        assert not long, f"{path.name}: lines {long}"
