"""The floors of the design: who may import whom; and what no file may hold."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_opd"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "types": 0, "config": 0, "bounds": 0, "errors": 0, "plugins": 0,
    "functional": 1,
    "estimators": 2, "metrics": 2, "curves": 2, "measures": 2,
    "models": 3, "rollout": 3, "data": 3, "optim": 3, "perf": 3, "diagnostics": 3,
    "module": 4, "processes": 4, "evaluation": 4, "linter": 4,
    "callbacks": 5, "lab": 5, "tracking": 5,
    "cli": 6, "__main__": 6,
}  # fmt: skip
LIGHTNING_FLOOR = 3
FILE_LINES, FUNCTION_LINES = 320, 60
UNSAFE = ("torch.load", "pickle.load", "pickle.loads", "eval", "exec")


def trees():
    return [pytest.param(path, ast.parse(path.read_text()), id=str(path.relative_to(PACKAGE))) for path in FILES]


def imports(tree):
    """Every module that is imported, wherever the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # `from lit_opd import models` imports a room, `from lit_opd.models import Pair` too.
            rooms = [f"lit_opd.{alias.name}" for alias in node.names]
            yield from (rooms if node.module == "lit_opd" else [node.module])


def floor_of(path):
    return FLOORS[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]


def test_every_room_has_a_floor():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms - {"__init__"} <= FLOORS.keys()


@pytest.mark.parametrize(("path", "tree"), trees())
def test_imports_go_down_or_stay(path, tree):
    if path == PACKAGE / "__init__.py":
        assert not [name for name in imports(tree) if name.startswith("lit_opd")]
        return
    for name in imports(tree):
        root, *rooms = name.split(".")
        assert root not in ("tools", "tests", "tutorials"), name
        if root == "lit_opd" and rooms and rooms[0] in FLOORS:
            assert FLOORS[rooms[0]] <= floor_of(path), f"{name} is above"
        if root in ("lightning", "pytorch_lightning"):
            assert floor_of(path) >= LIGHTNING_FLOOR, name


@pytest.mark.parametrize(("path", "tree"), trees())
def test_files_and_functions_are_short(path, tree):
    assert len(path.read_text().splitlines()) <= FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node):
                body -= node.body[0].end_lineno - node.body[0].lineno + 1
            assert body <= FUNCTION_LINES, node.name


@pytest.mark.parametrize(("path", "tree"), trees())
def test_nothing_unsafe(path, tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert not (isinstance(node.value, ast.Constant) and node.value.value), "trust_remote_code=True"
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "trust_remote_code":
            assert ast.unparse(node.value) == "False"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE:
            safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
            assert safe, f"{ast.unparse(node.func)} in line {node.lineno}"
