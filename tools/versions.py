"""Pin the versions that were tested, and run the tests at either end of the ranges in pyproject.toml.

Usage, from the repository's root::

    python -m tools.versions newest [-- PYTEST ARGUMENTS]
    python -m tools.versions oldest [--leave NAME ...] [-- PYTEST ARGUMENTS]
    python -m tools.versions pin

``newest`` and ``oldest`` make a virtual environment in ``build/versions/`` and run pytest there. The oldest are the
lower bounds of the direct dependencies; one named by ``--leave`` keeps its range, one pinned by ``==`` is left out.
``pin`` writes ``constraints.txt`` from the environment that runs it: after ``newest`` has passed, run it there, as
``build/versions/newest/bin/python -m tools.versions pin``. README's commands install with that file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

__all__ = ["closure", "complaints", "constraints", "direct", "oldest"]

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
HEADER = "# The versions that the tests passed with. Made by `python -m tools.versions pin`, not by hand.\n"
# torch brings these on some machines only, each build of it its own.
ACCELERATORS = ("cuda-", "nvidia-", "triton")


def direct(project: Mapping[str, object]) -> list[Requirement]:
    """List the direct dependencies of a ``[project]`` table, those of its extras too, without the project itself."""
    extras = project.get("optional-dependencies", {})
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if requirement.name != project["name"]]


def oldest(requirements: Iterable[Requirement], leave: Iterable[str] = ()) -> list[str]:
    """List what to install for the lower bounds: ``name==bound``, the range of what is left, nothing for exact pins.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    lines = []
    for requirement in requirements:
        bounds = {part.operator: part.version for part in requirement.specifier}
        if "==" in bounds:
            continue
        if ">=" not in bounds:
            raise ValueError(f"{requirement} has no lower bound")
        lines.append(str(requirement) if requirement.name in leave else f"{requirement.name}=={bounds['>=']}")
    return lines


def closure(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Map what the requirements installed, and what that needs in turn, to its version.

    Raises:
        PackageNotFoundError: a requirement itself is not installed.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(requirement, True) for requirement in requirements]
    while waiting:
        requirement, needed = waiting.pop()
        new = {(requirement.name, extra) for extra in ("", *requirement.extras)} - seen
        if not new:
            continue
        seen |= new
        try:
            found = distribution(requirement.name)
        except PackageNotFoundError:
            if needed:
                raise
            continue
        versions[canonicalize_name(requirement.name)] = found.version
        for needs in map(Requirement, found.requires or ()):
            if needs.marker is None or any(needs.marker.evaluate({"extra": extra}) for _, extra in new):
                waiting.append((needs, False))
    return versions


def constraints(versions: Mapping[str, str]) -> str:
    """Write pins that hold on any machine: no build of one accelerator, no local part such as ``+cpu``."""
    pins = {name: Version(version).public for name, version in versions.items() if not name.startswith(ACCELERATORS)}
    return HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def complaints(requirements: Iterable[Requirement], text: str) -> list[str]:
    """Tell what is wrong with a constraints file: lines that are no plain pin, and dependencies outside their range."""
    pins, wrong = {}, []
    for line in text.splitlines():
        name, _, version = line.partition("==")
        if line.startswith("#"):
            continue
        plain = version and name.replace("-", "").isalnum() and not Version(version).local
        if not plain or name.startswith(ACCELERATORS):
            wrong.append(f"{line} is no pin for every machine")
        pins[name] = version
    for requirement in requirements:
        pin = pins.get(canonicalize_name(requirement.name))
        if requirement.name.startswith(ACCELERATORS):  # torch asks for its own version, where it brings one
            continue
        if pin is None:
            wrong.append(f"{requirement.name} has no pin")
        elif not requirement.specifier.contains(pin):
            wrong.append(f"{requirement.name}=={pin} is outside {requirement.specifier}")
    return wrong


def main() -> int:
    """Do what the command line says; the exit code is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["newest", "oldest", "pin"])
    parser.add_argument("--leave", action="append", default=[], help="a dependency that keeps its whole range")
    parser.add_argument("pytest", nargs="*", help="what pytest is given, after --")
    arguments = parser.parse_args()
    requirements = direct(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])
    if arguments.command == "pin":
        CONSTRAINTS.write_text(constraints(closure(requirements)))
        return 0
    environment = ROOT / "build" / "versions" / arguments.command
    python = environment / "bin" / "python"
    wanted = [".[dev]"] if arguments.command == "newest" else [".", *oldest(requirements, arguments.leave)]
    subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "-e", *wanted], cwd=ROOT, check=True)
    return subprocess.run([python, "-m", "pytest", *arguments.pytest], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
