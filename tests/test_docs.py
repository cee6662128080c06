"""The documents run as they stand, in a scratch folder that holds what a checkout holds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RUNNER = ROOT / "tools" / "run_docs.py"


@pytest.fixture
def scratch(tmp_path):
    for name in ("conf", "tools", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def run_document(document, scratch, *options):
    # `python` in a document is the one that runs the tests.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(RUNNER), str(ROOT / document), "--folder", str(scratch), *options]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_readme(scratch):
    # `try`, `test` and `smollm2` are what .ci/run does, in a fresh environment; a short run stands in for the first.
    short = "fit --config conf/quickstart.yaml trainer.max_steps=2 data.validation_size=16 evaluation.teacher=false"
    subprocess.run([sys.executable, "-m", "lit_opd", *short.split()], cwd=scratch, check=True, capture_output=True)
    run_document("README.md", scratch, "--skip", "try", "--skip", "test", "--skip", "smollm2")


@pytest.mark.slow
@pytest.mark.parametrize("document", sorted(p.name for p in (ROOT / "tutorials").glob("*.md")))
def test_tutorial(document, scratch):
    run_document(f"tutorials/{document}", scratch)


def test_the_gate_runs_readmes_own_commands():
    gate, names = (ROOT / ".ci" / "run").read_text(), ("try", "test", "smollm2")
    assert re.findall(r"^readme (\w+)$", gate, re.MULTILINE) == list(names)
    command = [sys.executable, str(RUNNER), str(ROOT / "README.md"), "--print"]
    for name, expected in zip(
        names, ("fit --config conf/quickstart.yaml", "pytest", "fit --config conf/smollm2.yaml"), strict=True
    ):
        printed = subprocess.run([*command, "--only", name], capture_output=True, text=True, check=True).stdout
        assert printed.strip().endswith(expected)


def test_the_registry_table_is_the_registry():
    from lit_opd.commands.estimators import markdown_table

    shown = re.search(r"<!-- estimators -->\n(.*?)\n<!-- /estimators -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert shown is not None
    assert shown.group(1) == markdown_table(), "put the output of `python -m lit_opd estimators --markdown` into README"


def test_every_rule_of_the_linter_is_explained():
    from lit_opd.linter import RULES

    readme = (ROOT / "README.md").read_text()
    assert [rule.__name__ for rule in RULES if f"`{rule.__name__}`" not in readme] == []


def test_links_and_pictures_exist():
    for document in (ROOT / "README.md", *(ROOT / "tutorials").glob("*.md"), ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_a_failing_block_fails(tmp_path):
    (tmp_path / "page.md").write_text("```bash\nfalse\n```\n")
    done = subprocess.run([sys.executable, str(RUNNER), "page.md"], cwd=tmp_path, capture_output=True)
    assert done.returncode != 0


def test_a_server_block_must_answer(tmp_path):
    (tmp_path / "page.md").write_text("```bash server\nsleep 1; exit 3  # --port 9\n```\n")
    done = subprocess.run([sys.executable, str(RUNNER), "page.md"], cwd=tmp_path, capture_output=True)
    assert done.returncode != 0
