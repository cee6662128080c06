"""RESULTS.md: its blocks are made of stored numbers, and nothing else on the page moves."""

import json
import re
import types
from pathlib import Path

import numpy as np
import pytest

from lit_opd.lab.compare.collect import Point, RunResult
from lit_opd.lab.compare.digest import make_report
from lit_opd.lab.compare.document import write_report

ROOT = Path(__file__).parents[2]
PROMPTS = tuple(f"{i:04x}" for i in range(30))
# accuracy, reverse KL, forward KL, entropy; tokens of a step
LEVELS = {
    "token": (0.5, 0.4, 0.2, 0.3, 100.0),
    "full kl": (0.5, 0.2, 0.1, 0.3, 100.0),
    "mute": (0.0, 6.0, 3.0, 1.0, 9.0),
}
NAMES = ("accuracy", "reverse_kl", "forward_kl", "student_entropy")
PAGE = """# Results

By hand: 0.123 is not a number of ours.

<!-- results toy: ranking reverse_kl -->
<!-- end -->

Between.
<!-- results toy: ties accuracy -->
old
<!-- end -->
<!-- results toy: compute -->
<!-- end -->
<!-- results other: ranking accuracy -->
*Not measured yet.*
<!-- end -->
After.
"""


@pytest.fixture(scope="module")
def tool():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        from tools import make_results
        from tools.results import blocks, store

        yield types.SimpleNamespace(page=make_results, blocks=blocks, store=store)


def made_up(variant, seed):
    rng = np.random.default_rng([seed, list(LEVELS).index(variant)])
    *levels, tokens = LEVELS[variant]
    values = {n: level + 0.01 * rng.standard_normal(len(PROMPTS)) for n, level in zip(NAMES, levels, strict=True)}
    values["accuracy"] = (rng.random(len(PROMPTS)) < levels[0]).astype(float)
    curves = {
        name: [Point(step, tokens * step, 0.1 * step, float(array.mean() + 1 - step / 40)) for step in (0, 20, 40)]
        for name, array in values.items()
    }
    cost = {"steps": 40.0, "tokens": 40 * tokens, "seconds": 4.0, "peak_memory_mb": 512.0}
    per_prompt = {name: array.tolist() for name, array in values.items()}
    return RunResult(variant, seed, "FINISHED", f"{variant}{seed}", PROMPTS, per_prompt, curves, cost)


@pytest.fixture(scope="module")
def report():
    return make_report([made_up(variant, seed) for variant in LEVELS for seed in (0, 1, 2)])


@pytest.fixture(scope="module")
def folder(report, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "report"
    write_report(report, folder)
    return folder


class Store:
    """As much of an MLflow client as is asked: three finished runs, whose values are those of their seed."""

    def get_run(self, run_id):
        assert run_id == "parent"
        return types.SimpleNamespace(
            info=types.SimpleNamespace(experiment_id="7"), data=types.SimpleNamespace(tags={"git_sha": "0123456789ab"})
        )

    def search_runs(self, experiments, query, order_by):
        assert experiments == ["7"]
        assert "'parent'" in query
        return [
            types.SimpleNamespace(
                info=types.SimpleNamespace(run_id=str(seed), start_time=1000, end_time=11_000),
                data=types.SimpleNamespace(tags={"variant": variant}),
            )
            for variant, seed in (("token", 1), ("token", 2), ("mute", 3))
        ]

    def get_metric_history(self, run_id, name):
        return [types.SimpleNamespace(step=step, value=int(run_id) + step) for step in (1, 2, 10, 15)]


@pytest.fixture(scope="module")
def stored(tool, folder):
    report = json.loads((folder / "report.json").read_text())
    trimmed = tool.store.trim("toy", report, tool.store.read_record(Store(), "parent"), tool.page.this_machine())
    return json.loads(json.dumps(trimmed))


def cells(text):
    """Rows of a Markdown table, by their first cell."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def test_blocks_are_filled_once_and_for_all_and_prose_is_left_alone(tool, stored):
    filled = tool.page.fill(PAGE, {"toy": stored})
    assert filled != PAGE
    assert tool.page.fill(filled, {"toy": stored}) == filled
    assert tool.page.BLOCK.sub("", filled) == tool.page.BLOCK.sub("", PAGE)
    assert "\nold\n" not in filled
    assert "|\n<!--" not in filled  # a table ends at an empty line only: the comment would be a row of it
    assert "*Not measured yet.*" in filled  # of a comparison that is not stored


def test_a_ranking_shows_the_reports_means_and_verdicts(tool, stored, report):
    rows = cells(tool.blocks.block("ranking reverse_kl", stored))
    ranking = next(ranking for ranking in report.rankings if ranking.yardstick == "reverse_kl")
    assert list(rows)[2:] == [row.variant for row in ranking.rows] == ["full kl", "token", "mute"]
    for row in ranking.rows:
        mean, low, high = (float(number) for number in re.findall(r"[\d.]+", rows[row.variant][0]))
        assert (mean, low, high) == pytest.approx((row.mean.mean, row.mean.low, row.mean.high), abs=0.005)
        assert rows[row.variant][-1] == row.standing
    assert float(rows["token"][1].split()[0]) == pytest.approx(0.2, abs=0.02)  # worse than the best: above it


def test_a_chosen_pair_is_the_first_minus_the_second_whichever_way_it_is_stored(tool, stored):
    one, other = (tool.blocks.block(f"pairs {pair}", stored) for pair in ("token vs full kl", "full kl vs token"))
    assert "`token` - `full kl` | reverse KL | 0.20" in one
    assert "`full kl` - `token` | reverse KL | -0.20" in other
    numbers = [[float(n) for n in re.findall(r"-?\d+\.\d+", row)][:3] for row in one.splitlines()[3:4]]
    turned = [[float(n) for n in re.findall(r"-?\d+\.\d+", row)][:3] for row in other.splitlines()[3:4]]
    assert [[-n[0], -n[2], -n[1]] for n in numbers] == turned
    assert "`full kl` is better" in one
    assert "`full kl` is better" in other
    assert one.count("\n") == 1 + len(NAMES)
    assert len(tool.blocks.block("pairs token vs mute; token vs full kl", stored).splitlines()) == 2 + 2 * len(NAMES)


def test_ties_are_the_pairs_that_were_not_told_apart(tool, stored, report):
    for ranking in report.rankings:
        shown = tool.blocks.block(f"ties {ranking.yardstick}", stored)
        tied = [pair for pair in ranking.pairs if not pair.distinguishable]
        assert f"{len(tied)} of {len(ranking.pairs)} pairs" in shown
        for pair in ranking.pairs:
            assert (f"| `{pair.first}` | `{pair.second}` |" in shown) == (pair in tied)
    assert "1 of 3 pairs" in tool.blocks.block("ties accuracy", stored)
    assert "<details>" not in tool.blocks.block("ties reverse_kl", stored)


def test_an_objective_that_stops_writing_does_not_set_the_budget_of_the_others(tool, stored):
    shown = tool.blocks.block("equal-cost reverse_kl", stored)
    assert "Left out, for less than half of the median's tokens: `mute`." in shown
    assert "at 4,000 sampled tokens" in shown
    assert list(cells(shown))[2:] == ["full kl", "token"]
    assert "- At 4,000 sampled tokens, 1 of 1 pairs can be told apart: `full kl` from `token`." in shown
    kept = stored["equal_costs"][1]
    tied = stored | {"equal_costs": [kept | {"tokens": kept["tokens"] | {"apart": []}}]}
    assert "- At 4,000 sampled tokens, 0 of 1 pairs can be told apart." in tool.blocks.block(
        "equal-cost reverse_kl", tied
    )


def test_compute_adds_up_the_runs(tool, stored):
    rows = cells(tool.blocks.block("compute", stored))
    assert rows["runs"] == ["9"]
    assert rows["training"] == ["36 s for 360 steps"]
    assert rows["sampled for training"] == ["0.03 million tokens"]
    assert rows["with loading, evaluation and logging"] == ["30 s"]
    assert rows["commit of the runs"] == ["`0123456`"]
    without = cells(tool.blocks.block("compute", stored | {"record": {}}))
    assert rows.keys() - without.keys() == {"with loading, evaluation and logging", "commit of the runs"}


def test_costs_are_of_one_run_the_quickest_first(tool, stored):
    rows = cells(tool.blocks.block("costs", stored))
    assert rows["token"] == ["4,000", "4", "100", "0.1", "1,000", "512"]


def test_courses_are_means_over_seeds_at_steps(tool, stored, report):
    rows = cells(tool.blocks.block("training train/entropy at 1 10 of token; mute", stored))
    assert rows["token"] == ["2.5", "11.5"]  # seeds 1 and 2
    assert list(rows)[2:] == ["token", "mute"]
    assert list(stored["record"]["training"]["train/entropy"]["token"]) == ["1", "10"]  # of 1, 2, 10 and 15
    assert list(cells(tool.blocks.block("training rollout/length at 1", stored)))[2:] == ["token", "mute"]
    values = [
        curve.points[1].value for curve in report.curves if (curve.yardstick, curve.variant) == (NAMES[1], "token")
    ]
    assert cells(tool.blocks.block("curve reverse_kl", stored))["token"][1] == f"{np.mean(values):.3g}"


def test_the_setting_names_the_runs_that_are_missing(tool, report, stored):
    assert cells(tool.blocks.block("setting", stored))["runs that did not finish"] == ["none"]
    out = {"variant": "mute", "seed": 3, "why": "killed after 7 steps"}
    assert "| `mute` | 3 | killed after 7 steps |" in tool.blocks.block("setting", stored | {"left_out": [out]})


@pytest.mark.parametrize(("what", "message"), [
    ("podium", "there is no block 'podium'; there are setting, ranking"),
    ("ranking jsd", "no 'jsd'; there are accuracy, reverse_kl"),
    ("pairs token vs nobody", "no pair 'token' vs 'nobody' in accuracy"),
    ("curve jsd", "no curve of 'jsd'"),
    ("training train/loss at 1", "no 'train/loss' of training steps"),
    ("training train/entropy at 1 of nobody", "no 'nobody' among token, mute"),
    ("figure curves jsd", "no figure 'curves jsd'; there are curves accuracy"),
])  # fmt: skip
def test_a_block_that_cannot_be_made_says_why(tool, stored, what, message):
    page = PAGE + f"<!-- results toy: {what} -->\n<!-- end -->\n"
    with pytest.raises(SystemExit, match=re.escape(f"`<!-- results toy: {what} -->`: {message}")):
        tool.page.fill(page, {"toy": stored})


def test_missing_markers_are_refused(tool, stored):
    for kind in tool.page.REQUIRED:
        page = re.sub(rf"<!-- results toy: {kind}[^\n]*\n(old\n)?<!-- end -->\n", "", PAGE)
        with pytest.raises(SystemExit, match=f"no block '{kind}' of 'toy'; put `<!-- results toy: {kind}"):
            tool.page.fill(page, {"toy": stored})
    with pytest.raises(SystemExit, match="no `<!-- end -->` on a line below `<!-- results toy: ties accuracy -->`"):
        tool.page.fill(PAGE.replace("old\n<!-- end -->", "old"), {"toy": stored})
    with pytest.raises(SystemExit, match="no `<!-- end -->`"):
        tool.page.fill(PAGE + "<!-- results toy: costs -->\n", {"toy": stored})


def test_the_command_stores_numbers_and_figures_and_fills_the_page(tool, folder, tmp_path, monkeypatch, capsys):
    page = tmp_path / "RESULTS.md"
    page.write_text(PAGE)
    monkeypatch.setattr("sys.argv", ["make_results", f"toy={folder}", "--page", str(page), "--docs", str(tmp_path)])
    tool.page.main()
    names = sorted(path.name for path in tmp_path.glob("results_toy*"))
    assert names == sorted(["results_toy.json", *(f"results_toy_curves_{name}.png" for name in tool.blocks.DRAWN)])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))
    assert "| `full kl` |" in page.read_text()
    tool.page.main()
    assert capsys.readouterr().out.splitlines() == [f"{page}: filled", f"{page}: nothing to change"]


@pytest.mark.parametrize(("argument", "message"), [
    ("toy", "'toy': expected NAME=FOLDER"), ("to-y=x", "expected NAME=FOLDER"),
    ("toy=nowhere", "toy=nowhere: no report.json there"), ("none=nowhere", "no block 'ranking' of 'none'"),
])  # fmt: skip
def test_wrong_arguments_are_refused_before_anything_is_written(tool, tmp_path, monkeypatch, argument, message):
    page = tmp_path / "RESULTS.md"
    page.write_text(PAGE)
    monkeypatch.setattr("sys.argv", ["make_results", argument, "--page", str(page), "--docs", str(tmp_path)])
    with pytest.raises(SystemExit, match=message):
        tool.page.main()
    assert [path.name for path in tmp_path.iterdir()] == ["RESULTS.md"]
    assert page.read_text() == PAGE


def test_the_comparison_of_a_report_is_found_beside_it(tool, folder, tmp_path):
    (folder.parent / "comparison.json").write_text('{"mlflow_run_id": "abc"}')
    assert tool.page.parent_of(folder) == "abc"
    with pytest.raises(SystemExit, match="comparison.json: not found; --uri needs"):
        tool.page.parent_of(tmp_path)


def test_a_report_without_runs_is_refused(tool, tmp_path):
    (tmp_path / "report.json").write_text('{"rankings": []}')
    with pytest.raises(SystemExit, match="no run of it has finished"):
        tool.page.take("toy", tmp_path, tmp_path, None)


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_the_committed_page_is_what_its_numbers_give(tool, name):
    numbers = ROOT / "docs" / f"results_{name}.json"
    if not numbers.exists():
        pytest.skip(f"docs/{numbers.name} is not there: that comparison has not been taken into RESULTS.md yet")
    page = (ROOT / "RESULTS.md").read_text()
    assert numbers.stat().st_size < 300_000
    assert tool.page.fill(page, {name: json.loads(numbers.read_text())}) == page, "run python -m tools.make_results"
    for figure in re.findall(rf"\]\((docs/results_{name}_\w+\.png)\)", page):
        assert (ROOT / figure).exists(), figure
