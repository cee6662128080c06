"""Hold the floors of the design, which say who may import whom, and what no file may hold."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lit_opd"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the ground up. A room may import from those on lower floors, and from itself.
FLOORS = (
    ("errors", "kernels", "streams", "types"),
    ("config", "fast_paths", "files", "functional", "plugins", "stopping"),
    ("estimators", "measures"),
    ("data", "models", "optim", "perf", "processes"),
    ("linter", "objective", "rollout", "teachers"),
    ("distiller", "evaluation", "proving"),
    ("module", "tracking"),
    ("callbacks",),
    ("runs",),
    ("lab",),
    ("commands",),
    ("__main__", "cli"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SAME_FLOOR = {("__main__", "cli")}
LIGHTNING_FLOOR = 3
FILE_LINES, FUNCTION_LINES = 320, 60
UNSAFE = ("torch.load", "pickle.load", "pickle.loads", "eval", "exec")


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def trees_of(room):
    """The files of a room, as seen from the package, each with its syntax tree."""
    return [(path.relative_to(PACKAGE), ast.parse(path.read_text())) for path in FILES if room_of(path) == room]


every_room = pytest.mark.parametrize("room", sorted({room_of(path) for path in FILES}))


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


def test_every_room_has_a_floor():
    assert len(FLOORS) == 12
    assert {room_of(path) for path in FILES} - {"__init__"} <= FLOOR_OF.keys()


@every_room
def test_imports_go_down_or_stay_in_the_room(room):
    for path, tree in trees_of(room):
        for name in imports(tree):
            root, *rooms = name.split(".")
            assert root not in ("tools", "tests", "tutorials"), f"{path}: {name}"
            if room == "__init__":
                assert root != "lit_opd", f"{path}: {name}"
                continue
            if root == "lit_opd" and rooms and rooms[0] in FLOOR_OF:
                lower = FLOOR_OF[rooms[0]] < FLOOR_OF[room]
                assert rooms[0] == room or lower or (room, rooms[0]) in SAME_FLOOR, f"{path}: {name} is not below"
            if root in ("lightning", "pytorch_lightning"):
                assert FLOOR_OF[room] >= LIGHTNING_FLOOR, f"{path}: {name}"


@every_room
def test_only_tracking_knows_mlflow(room):
    """The others hand values to it: no import of MLflow or of its logger, no call of its client."""
    for path, tree in trees_of(room) if room != "tracking" else ():
        assert not [name for name in imports(tree) if name.split(".")[0] == "mlflow"], path
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert "MLFlowLogger" not in [alias.name for alias in node.names], path
            if isinstance(node, ast.Attribute) and node.attr == "experiment":
                assert not ast.unparse(node.value).endswith("logger"), f"{path}:{node.lineno}: MLflow's client"


@every_room
def test_files_and_functions_are_short(room):
    for path, tree in trees_of(room):
        assert len((PACKAGE / path).read_text().splitlines()) <= FILE_LINES, path
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.end_lineno - node.lineno + 1
                if ast.get_docstring(node):
                    body -= node.body[0].end_lineno - node.body[0].lineno + 1
                assert body <= FUNCTION_LINES, f"{path}: {node.name}"


@every_room
def test_nothing_unsafe(room):
    for path, tree in trees_of(room):
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}: bare except"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert not (isinstance(node.value, ast.Constant) and node.value.value), f"{path}: {node.arg}=True"
            if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "trust_remote_code":
                assert ast.unparse(node.value) == "False", path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE:
                safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
                assert safe, f"{path}:{node.lineno}: {ast.unparse(node.func)}"
