"""A process that begins anew: the same number, the same words, other memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from lit_opd.allocator import settings

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only Linux with glibc has these settings")
PROGRAM = """if True:
    import os, sys
    from lit_opd.allocator import begin_again
    print(os.getpid(), *sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
    begin_again()
"""


def untouched():
    return {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES" and "MALLOC_" not in name}


@glibc
def test_a_process_begins_anew_once():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "one", "two words"], env=untouched(), capture_output=True, text=True, check=True
    )
    first, second = done.stdout.splitlines()
    number, *rest = first.split()
    assert rest == ["one", "two", "words", "None"]
    assert second == f"{number} one two words {settings({})['GLIBC_TUNABLES']}"


@glibc
@pytest.mark.parametrize("name", ["GLIBC_TUNABLES", "MALLOC_ARENA_MAX"])
def test_what_the_user_chose_stays(name):
    assert settings({name: ""}) == {}
    assert settings({"PATH": "x"})


@glibc
def test_glibc_understands_the_settings():
    """Its loader lists the tunables with their values."""
    loader = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/ld-linux" in line)
    done = subprocess.run([loader, "--list-tunables"], env=settings({}), capture_output=True, text=True, check=True)
    values = dict(line.split(":", 1) for line in done.stdout.splitlines())
    for setting in settings({})["GLIBC_TUNABLES"].split(":"):
        name, value = setting.split("=")
        assert int(values[name].split()[0], 0) == int(value)


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert settings({}) == {}


@glibc
def test_fit_is_such_a_process(tmp_path):
    """Told by what the loader reads: it is handed the settings only once the command has begun again."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys; print(os.environ.get('GLIBC_TUNABLES'), file=sys.stderr)"
    )
    environment = untouched() | {"PYTHONPATH": str(tmp_path)}
    for command, starts in (("fit", 2), ("validate", 1)):
        words = [sys.executable, "-m", "lit_opd", command, "optim.lrr=1"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.stderr.splitlines()[:-1] == ["None", settings({})["GLIBC_TUNABLES"]][:starts]
        assert done.stderr.splitlines()[-1].startswith("error: optim.lrr")
