"""The documents that run, and how the tests run them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RUNNER = ROOT / "tools" / "run_docs.py"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tutorials/*.md"),
                    ROOT / "conf" / "recipes" / "README.md"])  # fmt: skip
# `try`, `test` and `smollm2` are what .ci/run does, in a fresh environment.
OF_THE_GATE = {"README.md": ("try", "test", "smollm2")}
# What somebody reads first, in this order, in one folder: tests/test_strangers_path.py walks it.
PATH = tuple(ROOT / name for name in ("README.md", "docs/data.md", "tutorials/04_measure_and_compare.md"))
RUNNABLE = re.compile(r"^```(bash|python)\b", re.MULTILINE)
# CONTRIBUTING sets up a checkout, RESULTS trains for hours.
EXECUTED = [path for path in DOCUMENTS if RUNNABLE.search(path.read_text())
            and path.name not in ("CONTRIBUTING.md", "RESULTS.md")]  # fmt: skip


_SPEC = importlib.util.spec_from_file_location("run_docs", RUNNER)
sys.modules["run_docs"] = run_docs = importlib.util.module_from_spec(_SPEC)  # where dataclasses look for it
_SPEC.loader.exec_module(run_docs)
blocks_of = run_docs.blocks_of


def name_of(document):
    return str(document.relative_to(ROOT))


def run_document(document, folder, warm_python):
    """Run all blocks of a document but those of the gate, and compare what it quotes with what they print."""
    # `python` in a document is the one that runs the tests.
    found_in = (warm_python.parent, Path(sys.executable).parent, os.environ["PATH"])
    environment = os.environ | {"PATH": os.pathsep.join(map(str, found_in))}
    skipped = [word for name in OF_THE_GATE.get(name_of(document), ()) for word in ("--skip", name)]
    command = [sys.executable, str(RUNNER), str(document), "--folder", str(folder), *skipped]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed = [line.rstrip() for line in done.stdout.splitlines()]
    quoted = re.findall(r"^```text output\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)
    assert [line for block in quoted for line in block.splitlines() if line not in printed] == []
