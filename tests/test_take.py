"""Take it with you: networks, objective and step of a script run in an empty folder beside common/fuse.py."""

import ast
import importlib
import shutil

import pytest
from conftest import ROOT, script

# What a step of the script is called with, x in [0, 1] or [-1, 1].
STEPS = {
    "gan": "G, *_, train_step = build(args, torch.full((1, 28, 28), .5)); print(train_step(x))",
    "cgan": "G, *_, train_step = build(args, 10, torch.full((1, 28, 28), .5)); "
            "print(train_step(x, torch.arange(8)))",
    "dcgan": "G, *_, train_step = build(args, 3); print(train_step(x.expand(-1, 3, -1, -1)))",
    "infogan": "G, *_, train_step = build(args); print(train_step(x))",
    "aae": "parts, train_step = build(args, 0, torch.zeros(1, 28, 28), torch.ones(1, 28, 28)); "
           "print(train_step(x, torch.full((8,), 10)))",
    "vaegan": "parts, train_step = build(args, 0); "
              "print(train_step(x.expand(-1, 3, -1, -1), torch.zeros(8, 0)))",
}
WORDS = {"dcgan": ["--net", "svhn"], "vaegan": ["--net", "32"], "aae": ["--task", "likelihood"]}
# What some of them take from the rest of common/ as well, where a setting asks for it.
MORE = {"infogan": {"data.warp"}, "aae": {"data.warp"}, "gan": {"run.fetch"},
        "text2image": {"data.brief", "metrics.batched"}}


def reached(tree, start):
    """The top-level statements of a module that define what `start` needs, and the names from common/ in
    them."""
    defined = {}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        for name in [getattr(node, "name", None), *(x.id for t in targets for x in ast.walk(t)
                                                    if isinstance(x, ast.Name))]:
            if name:
                defined[name] = node
    todo, seen, other = list(start), set(), set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            for x in ast.walk(defined[name]):
                if isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name):
                    other |= {f"{x.value.id}.{x.attr}"} if x.value.id in PARTS else set()
                if isinstance(x, ast.Name) and x.id in defined:
                    todo.append(x.id)
    return [node for node in tree.body if any(defined[name] is node for name in seen)], other


PARTS = {p.stem for p in ROOT.glob("common/*.py")}


@pytest.mark.parametrize("name", [*STEPS, "text2image"])
def test_a_step_needs_fuse_alone(name, tmp_path):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    nodes, other = reached(tree, ["build"])
    assert other == MORE.get(name, set())
    if name not in STEPS:
        return
    module = importlib.import_module(name)
    args = module.parse_args([*WORDS.get(name, []), "--paper", "--width", ".05", "--device", "cpu"])
    args.amp = args.compile = args.graph = False
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))
               and getattr(node, "module", "") not in ("common", "common.metrics")]
    size = getattr(args, "size", None) or args.net
    lines = ["import argparse", *map(ast.unparse, (*imports, *nodes)),
             f"args = argparse.Namespace(**{vars(args)!r})",
             f"x = torch.rand(8, 1, {size}, {size})", STEPS[name]]
    (tmp_path / "common").mkdir()
    for part in ("__init__", "fuse"):
        shutil.copy(ROOT / "common" / f"{part}.py", tmp_path / "common")
    (tmp_path / "step.py").write_text("\n".join(lines))
    result = script("step.py", cwd=tmp_path)
    assert result.returncode == 0 and "tensor" in result.stdout, result.stderr[-2000:]
