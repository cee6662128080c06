"""The documents run as they stand, and say what the code and the committed results say."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from documents import DOCUMENTS, EXECUTED, OF_THE_GATE, PATH, ROOT, RUNNER, blocks_of, name_of, run_document
from safetensors import safe_open

from lit_opd import estimators
from lit_opd.config import Config
from lit_opd.estimators.oracle.laws import LAWS
from lit_opd.linter import RULES

README = (ROOT / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("document", [page for page in EXECUTED if page not in PATH], ids=name_of)
def test_a_document_runs(document, scratch, warm_python):
    run_document(document, scratch, warm_python)


def test_all_kinds_of_documents_are_executed():
    assert {path.parent.name for path in EXECUTED} == {ROOT.name, "docs", "tutorials"}


@pytest.mark.parametrize("document", EXECUTED, ids=name_of)
def test_a_reader_sees_which_file_a_block_is(document):
    """What stands behind the backticks is not shown where a page is rendered."""
    for block in blocks_of(document):
        if name := block.settings.get("file"):
            assert block.code.startswith(f"# {name}\n"), f"{document.name} writes {name} without saying so"


def test_the_gate_runs_readmes_own_commands():
    gate, names = (ROOT / ".ci" / "run").read_text(), OF_THE_GATE["README.md"]
    assert re.findall(r"^readme (\w+)", gate, re.MULTILINE) == list(names)
    command = [sys.executable, str(RUNNER), str(ROOT / "README.md"), "--print"]
    for name, expected in zip(
        names, ("fit --config conf/quickstart.yaml", "pytest", "fit --config conf/smollm2.yaml"), strict=True
    ):
        printed = subprocess.run([*command, "--only", name], capture_output=True, text=True, check=True).stdout
        assert printed.strip().endswith(expected)


def test_readme_takes_a_minute():
    assert len(README.encode()) <= 9000


def test_the_tiny_pair_is_as_large_as_readme_says():
    said = re.search(r"A student of ([\d.]+)M parameters .* a teacher of ([\d.]+)M parameters", README)
    for model, millions in zip(("student", "teacher"), said.groups(), strict=True):
        with safe_open(ROOT / "lit_opd" / "tiny" / model / "model.safetensors", "pt") as weights:
            count = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        assert f"{count / 1e6:.1f}" == millions


def test_readmes_table_is_what_the_command_prints(capsys):
    """docs/quickstart.json is what `summary.json` of that run holds of its results."""
    from lit_opd.commands.running import print_outcome
    from lit_opd.measures.intervals import Interval
    from lit_opd.runs.distillation import Outcome

    run = json.loads((ROOT / "docs" / "quickstart.json").read_text())
    results = {when: {name: Interval(**value) for name, value in run[when].items()}
               for when in ("before", "after", "teacher")}  # fmt: skip
    logger = SimpleNamespace(experiment_id="1", run_id="2")
    outcome = Outcome(**results, steps=run["steps"], perf={}, checkpoint=Path(), student=Path(), logger=logger)
    print_outcome(Config(), outcome)
    printed = capsys.readouterr().out.partition("checkpoint:")[0]
    table = "\n".join(line.rstrip() for line in printed.splitlines()).rstrip()
    assert f"```text\n{table}\n```" in README, f"put this into README:\n{table}"


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (r"\*\*(\d+) estimators", len(estimators.names())),
        (r"\*\*(\d+) rules", len(RULES)),
        (r"to (\d+) laws", len(LAWS)),
        (r"\[all (\d+)\]\(conf/recipes", len(list((ROOT / "conf" / "recipes").glob("*.yaml")))),
    ],
)
def test_readme_counts_as_the_code_does(pattern, count):
    assert re.findall(pattern, README) == [str(count)]


@pytest.mark.parametrize(
    ("pattern", "page", "there"),
    [
        (r"CPU ([\d.]+) times as fast", "benchmark_w1.md", "time, TRL fixed / lit_opd"),
        (r"with ([\d.]+) of its memory", "benchmark_w1.md", "peak RSS, lit_opd / TRL fixed"),
        (r"completions ([\d.]+) times with", "benchmark_w2.md", "completions a second, lit_opd / TRL fixed"),
        (r"times with ([\d.]+) \(\[W2\]", "benchmark_w2.md", "peak RSS, lit_opd / TRL fixed"),
    ],
)
def test_readmes_benchmarks_are_those_measured(pattern, page, there):
    (said,) = re.findall(pattern, README)
    (found,) = re.findall(rf"^- {re.escape(there)}: ([\d.]+)", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    assert said == f"{float(found):.{len(said.partition('.')[2])}f}"


def test_readmes_results_are_those_of_the_results():
    results = (ROOT / "docs" / "results.md").read_text()
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    intervals = re.findall(r"\d\.\d+ \[\d\.\d+,\s\d\.\d+\]", prose)
    assert len(intervals) == 2
    assert [interval for interval in intervals if f"| `full reverse` | {interval} |" not in results] == []
    ((pairs, ties),) = re.findall(r"of (\d+) pairs of objectives,\s(\d+) could", prose)
    assert f"{ties} of {pairs} pairs could not be told apart" in results


def test_smollm2_gains_what_the_documents_say():
    stored = json.loads((ROOT / "docs" / "results_smollm2.json").read_text())["report"]
    untrained, reached = stored["untrained"]["accuracy"], stored["metrics"]["accuracy"]["variants"]
    (seconds,) = [cost["seconds"] for cost in stored["costs"] if cost["variant"] == "full reverse"]
    (said,) = re.findall(
        r"goes from (\S+) to (\S+) \[.*?over (\w+) seeds.*?, (\d+) seconds of training", README, re.DOTALL
    )
    assert said[:2] == (f"{untrained:.2f}", f"{reached['full reverse']['mean']:.2f}")
    assert said[2:] == ({5: "five"}[len(stored["seeds"])], f"{seconds:.0f}")
    page = (ROOT / "docs" / "results.md").read_text()
    ((before, after),) = re.findall(r"\(accuracy (\S+) before, (\S+) after\)", page)
    assert (before, after) == (f"{untrained:.3g}", f"{reached['token']['mean']:.3g}")


def test_the_table_of_speed_is_that_of_the_benchmarks():
    sides = {"lit_opd": "lit_opd", "TRL, with autocast around its loss": "TRL fixed", "TRL as shipped (one run)":
             "TRL as shipped", "the same, started with our allocator settings (one run)":
             "TRL fixed, our allocator settings"}  # fmt: skip
    page = (ROOT / "docs" / "speed.md").read_text()
    for label, side in sides.items():
        (said,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", page, re.MULTILINE)
        w1, w2 = (measured(name, side) for name in ("benchmark_w1.md", "benchmark_w2.md"))
        assert said.split(" | ") == [w1["s / step"], f"{w1['time / limit']}x", w1["peak RSS, MB"],
                                     w2["completions / s"], w2["peak RSS, MB"]]  # fmt: skip


def measured(page, side):
    """The medians of a side: {column: number}."""
    rows = [line.strip("| \n").split(" | ") for line in (ROOT / "docs" / page).read_text().splitlines()]
    header = next(row for row in rows if row[0] == "side")
    return dict(zip(header, next(row for row in rows if row[0] == side), strict=True))


def test_tables_made_from_the_code_are_those_of_the_code(warm_python):
    # In a process of its own, whose tables no other test adds to.
    command = [warm_python, "-m", "tools.make_docs", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_of_the_linter_is_explained():
    page, names = (ROOT / "docs" / "linter.md").read_text(), [rule.__name__ for rule in RULES]
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == names  # one line in the table
    assert sorted(re.findall(r"^\*\*`(\w+)`\*\*", page, re.MULTILINE)) == sorted(names)  # and one paragraph


def test_estimators_that_are_recommended_or_warned_of_are_registered_ones():
    page = (ROOT / "docs" / "which_estimator.md").read_text()
    advice = re.findall(r"^\| [^|]+ \| `(\w+)`[^|]* \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    warnings = re.findall(r"^\| `(\w+)`[^|]* \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    assert len(advice) == 12
    assert len(warnings) == 3
    assert [name for name in (*advice, *warnings) if name not in estimators.names()] == []


def test_the_floors_of_contributing_are_those_that_are_held():
    from test_floors import FLOORS

    rows = re.findall(r"^\| (\d+) \| (.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [number for number, _ in rows] == [str(number) for number in range(len(FLOORS))]
    assert [tuple(sorted(re.findall(r"`(\w+)`", rooms))) for _, rooms in rows] == [tuple(sorted(r)) for r in FLOORS]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_and_pictures_exist(document):
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(#([^)]*))?\)", document.read_text()):
        file = document.parent / target if target else document
        assert file.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{document.name} links to {target}#{anchor}"


def anchors(document):
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return [f"{slug}-{slugs[:i].count(slug)}" if slug in slugs[:i] else slug for i, slug in enumerate(slugs)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_that_are_named_exist(document):
    rooms = "lit_opd|tests|tools|docs|conf|tutorials"
    for name in re.findall(rf"`((?:{rooms})/[\w./-]+)`", document.read_text()):
        assert (ROOT / name).exists(), f"{document.name} names {name}"


def test_a_failing_block_fails(tmp_path):
    (tmp_path / "page.md").write_text("```bash\nfalse\n```\n")
    done = subprocess.run([sys.executable, str(RUNNER), "page.md"], cwd=tmp_path, capture_output=True)
    assert done.returncode != 0


def test_a_server_block_must_answer(tmp_path):
    (tmp_path / "page.md").write_text("```bash server\nsleep 1; exit 3  # --port 9\n```\n")
    done = subprocess.run([sys.executable, str(RUNNER), "page.md"], cwd=tmp_path, capture_output=True)
    assert done.returncode != 0
