"""The constraints file holds what pyproject.toml asks for, and the ends of its ranges are read right."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import lit_opd

ROOT = Path(__file__).parents[2]


@pytest.fixture
def versions(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from tools import versions

    return versions


@pytest.fixture
def requirements(versions):
    return versions.direct(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def test_the_constraints_pin_every_direct_dependency_inside_its_range(versions, requirements):
    assert versions.complaints(requirements, versions.CONSTRAINTS.read_text()) == [], "see tools/versions.py"


def test_every_direct_dependency_has_a_lower_bound(versions, requirements):
    assert len(versions.oldest(requirements)) == sum("==" not in str(r.specifier) for r in requirements) > 20


def test_direct_dependencies_are_those_of_the_project_and_its_extras(versions):
    project = {"name": "mine", "dependencies": ["torch>=2"], "optional-dependencies": {"a": ["mine[b]"], "b": ["b>=1"]}}
    assert [r.name for r in versions.direct(project)] == ["torch", "b"]


def test_the_oldest_are_the_lower_bounds(versions):
    requirements = [Requirement(line) for line in ("torch>=2.8,<3", "rich>=13", "trl==1.16.0", "numpy>=1.26,<3")]
    assert versions.oldest(requirements) == ["torch==2.8", "rich==13", "numpy==1.26"]
    assert versions.oldest(requirements, ["torch"]) == ["torch<3,>=2.8", "rich==13", "numpy==1.26"]
    with pytest.raises(ValueError, match="scipy<2 has no lower bound"):
        versions.oldest([Requirement("scipy<2")])


def test_what_torch_brings_on_some_machines_has_no_pin(versions):
    assert versions.complaints([Requirement("triton>=3.4")], "click==8.5.1\n") == []


def test_pins_hold_on_any_machine(versions):
    found = {"torch": "2.13.0+cpu", "nvidia-nccl-cu12": "2.1", "triton": "3.5", "cuda-bindings": "13", "click": "8.5.1"}
    assert versions.constraints(found) == versions.HEADER + "click==8.5.1\ntorch==2.13.0\n"


def test_the_version_is_the_same_wherever_it_stands():
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {cited, project["version"], lit_opd.__version__} == {lit_opd.__version__}


def test_what_a_requirement_brings_is_pinned_too(versions):
    """With the extras that were asked for, and without what only other machines or extras need."""
    found = versions.closure([Requirement("pytest>=8"), Requirement("Lightning")])
    assert {"pytest", "pluggy", "iniconfig", "lightning", "torch", "torchmetrics"} <= found.keys()
    assert not {"hypothesis", "colorama", "lit-opd"} & found.keys()
    assert all(found.values())


def test_a_requirement_that_is_not_installed_cannot_be_pinned(versions):
    with pytest.raises(ModuleNotFoundError, match="no-such-distribution"):
        versions.closure([Requirement("no-such-distribution")])


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("torch==2.9.0\n", []),
        ("# a comment\ntorch==2.9.0\nclick==8.5.1\n", []),
        ("click==8.5.1\n", ["torch has no pin"]),
        ("torch==3.0\n", ["torch==3.0 is outside <3,>=2.8"]),
        ("torch==2.9.0+cpu\n", ["torch==2.9.0+cpu is no pin for every machine"]),
        ("torch==2.9.0\n-e /home/me/mine\n", ["-e /home/me/mine is no pin for every machine"]),
        ("torch==2.9.0\nnvidia-nccl-cu12==2.1\n", ["nvidia-nccl-cu12==2.1 is no pin for every machine"]),
        ("torch==2.9.0\nmine @ https://a.b/c==1\n", ["mine @ https://a.b/c==1 is no pin for every machine"]),
    ],
)
def test_a_constraints_file_that_is_not_for_everybody_is_told(versions, text, wrong):
    assert versions.complaints([Requirement("torch>=2.8,<3")], text) == wrong
