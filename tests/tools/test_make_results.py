"""RESULTS.md and docs/results.md: their blocks are made of stored numbers, and their prose says what these say."""

import json
import re
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lit_opd.lab.compare.cells import interval
from lit_opd.lab.compare.collect import Point, RunResult
from lit_opd.lab.compare.digest import LeftOut, make_report, to_json
from lit_opd.lab.compare.document import overview, write_report
from lit_opd.lab.compare.grid import load_comparison

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

<!-- results toy: overview -->
<!-- end -->

Between.
<!-- results toy: pairs token vs mute -->
old
<!-- end -->
<!-- results other: ranking accuracy -->
*Not measured yet.*
<!-- end -->
After.
"""
TABLES = """# In full

<!-- results toy: ranking reverse_kl -->
<!-- end -->
<!-- results toy: figure seeds -->
<!-- end -->
<!-- results toy: compute -->
<!-- end -->
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
    curves = {name: [Point(0, 0.0, 0.0, LEVELS["token"][place] * (0.8 if name == "accuracy" else 2)), *points[1:]]
              for place, (name, points) in enumerate(curves.items())}  # fmt: skip
    cost = {"steps": 40.0, "tokens": 40 * tokens, "seconds": 4.0, "peak_memory_mb": 512.0}
    per_prompt = {name: array.tolist() for name, array in values.items()}
    return RunResult(variant, seed, "FINISHED", f"{variant}{seed}", PROMPTS, per_prompt, curves, cost)


@pytest.fixture(scope="module")
def report():
    return make_report([made_up(variant, seed) for variant in LEVELS for seed in (0, 1, 2)], "all")


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
def trimmed(tool, folder):
    report = json.loads((folder / "report.json").read_text())
    return json.loads(json.dumps(tool.store.trim("toy", report, tool.store.read_record(Store(), "parent"))))


@pytest.fixture(scope="module")
def results(tool, trimmed):
    return tool.store.read(trimmed, "docs/")


def cells(text):
    """Rows of a Markdown table, by their first cell."""
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def test_blocks_are_filled_once_and_for_all_and_prose_is_left_alone(tool, results):
    def fill(text):
        return tool.page.fill(Path("RESULTS.md"), text, {"toy": results}, Path("docs"))

    filled = fill(PAGE)
    assert filled != PAGE
    assert fill(filled) == filled
    assert tool.page.BLOCK.sub("", filled) == tool.page.BLOCK.sub("", PAGE)
    assert "\nold\n" not in filled
    assert "|\n<!--" not in filled  # a table ends at an empty line only: the comment would be a row of it
    assert "*Not measured yet.*" in filled  # of a comparison that is not stored


def test_what_is_stored_is_what_the_report_says(tool, results, report):
    assert list(results.report.metrics) == list(NAMES)
    ordered = replace(report, metrics={name: report.metrics[name] for name in NAMES})
    assert tool.blocks.block("overview", results) == overview(ordered)
    for name, found in results.report.metrics.items():
        asked = report.metrics[name]
        assert [(row.variant, row.verdict) for row in found.rows] == [(row.variant, row.verdict) for row in asked.rows]
        assert [c.p for c in found.contrasts] == pytest.approx([c.p for c in asked.contrasts], rel=1e-5)


def test_a_ranking_shows_the_reports_means_and_verdicts(tool, results, report):
    shown = tool.blocks.block("ranking reverse_kl", results)
    rows, found = cells(shown), report.metrics["reverse_kl"]
    assert list(rows)[2:] == [row.variant for row in found.rows] == ["full kl", "token", "mute"]
    assert [rows[row.variant][0] for row in found.rows] == [interval(row) for row in found.rows]
    assert [rows[row.variant][-1] for row in found.rows] == ["best", "worse", "collapsed"]
    assert float(rows["token"][1].split()[0]) == pytest.approx(2, rel=0.1)  # a ratio
    assert "0 of 3 pairs could not be told apart; 2 have an objective that collapsed." in shown
    assert "- `mute` collapsed in 3 of 3 runs." in shown
    share = tool.blocks.block("ranking accuracy", results)
    assert "difference to the best" in share
    assert "1 of 3 pairs could not be told apart; 2 have an" in share
    entropy = tool.blocks.block("ranking student_entropy", results)
    assert "could not be told apart" not in entropy
    assert "verdict" not in entropy


def test_a_chosen_pair_is_the_first_against_the_second_whichever_way_it_is_stored(tool, results):
    one, other = (tool.blocks.block(f"pairs {pair}", results) for pair in ("token vs full kl", "full kl vs token"))
    (forth,), (back,) = ([row for row in text.splitlines() if "reverse KL" in row] for text in (one, other))
    assert forth.startswith("| `token` / `full kl` |")
    (mean, low, high), (inverse, least, most) = ([float(n) for n in re.findall(r"\d\.\d+", row)][:3]
                                                 for row in (forth, back))  # fmt: skip
    assert mean == pytest.approx(2, rel=0.1)
    assert low < mean < high
    assert least < inverse < most
    assert [mean * inverse, low * most, high * least] == pytest.approx([1, 1, 1], abs=0.02)
    assert "`full kl` is better" in forth
    assert "`full kl` is better" in back
    assert "| `token` - `full kl` | accuracy |" in one
    assert "not told apart" in one
    assert "entropy" not in one  # it has no good direction
    both = tool.blocks.block("pairs token vs mute; full kl vs mute", results)
    assert both.count("| `mute` collapsed |") == 6
    assert "accuracy | 0.5" in both


def test_an_objective_that_stops_writing_does_not_set_the_budget_of_the_others(tool, results):
    shown = tool.blocks.block("equal-cost reverse_kl", results)
    assert "Left out, for less than half of the median's tokens: `mute`." in shown
    assert "at 4,000 sampled tokens" in shown
    assert sorted(list(cells(shown))[2:]) == ["full kl", "token"]


def test_compute_adds_up_the_runs(tool, results):
    rows = cells(tool.blocks.block("compute", results))
    assert rows["runs"] == ["9"]
    assert rows["training"] == ["36 s for 360 steps"]
    assert rows["sampled for training"] == ["0.03 million tokens"]
    assert rows["with loading, evaluation and logging"] == ["30 s"]
    without = cells(tool.blocks.block("compute", replace(results, record={})))
    assert rows.keys() - without.keys() == {"with loading, evaluation and logging"}


def test_costs_are_of_one_run_the_quickest_first(tool, results):
    rows = cells(tool.blocks.block("costs", results))
    assert rows["token"] == ["4,000", "4", "100", "0.1", "1,000", "512"]


def test_courses_are_means_over_seeds_at_steps(tool, results, report):
    rows = cells(tool.blocks.block("training train/entropy at 1 10 of token; mute", results))
    assert rows["token"] == ["2.5", "11.5"]  # seeds 1 and 2
    assert list(rows)[2:] == ["token", "mute"]
    assert list(results.record["training"]["train/entropy"]["token"]) == ["1", "10"]  # of 1, 2, 10 and 15
    assert list(cells(tool.blocks.block("training rollout/length at 1", results)))[2:] == ["token", "mute"]
    values = [
        curve.points[1].value for curve in report.curves if (curve.yardstick, curve.variant) == (NAMES[1], "token")
    ]
    assert cells(tool.blocks.block("curve reverse_kl", results))["token"][1] == f"{np.mean(values):.3g}"


def test_rates_are_shown_by_objective_with_the_best_of_each_in_bold(tool):
    """Of equal rates the lowest is chosen, and of a cost the least."""
    levels = {"token lr=2e-3": 0.2, "token lr=7e-4": 0.4, "full kl lr=2e-3": 0.3, "full kl lr=7e-4": 0.3}
    runs = [replace(made_up("token", 5), variant=variant, per_prompt=dict.fromkeys(NAMES, [level] * len(PROMPTS)))
            for variant, level in levels.items()]  # fmt: skip
    results = tool.store.read(
        json.loads(json.dumps(tool.store.trim("rates", to_json(make_report(runs, "best")), {}))), ""
    )
    assert tool.blocks.best_rates(results, "accuracy") == {"token": "7e-4", "full kl": "7e-4"}
    assert tool.blocks.best_rates(results, "reverse_kl") == {"token": "2e-3", "full kl": "7e-4"}
    rows = cells(tool.blocks.block("rates accuracy", results))
    assert rows["accuracy (share of completions) at rate"] == ["2e-3", "7e-4"]
    assert (rows["token"], rows["full kl"]) == (["0.2", "**0.4**"], ["0.3", "**0.3**"])


def test_the_setting_says_how_it_was_made_and_names_the_runs_that_are_missing(tool, results):
    shown = tool.blocks.block("setting", results)
    assert cells(shown)["tested"] == ["every two variants"]
    assert "All runs finished." in shown
    out = [LeftOut("mute", 3, "FAILED", "abc", "killed after 7 steps")]
    shown = tool.blocks.block("setting", replace(results, report=replace(results.report, left_out=out)))
    assert "| `mute` | 3 | killed after 7 steps |" in shown


@pytest.mark.parametrize(("what", "message"), [
    ("podium", "there is no block 'podium'; there are setting, overview"),
    ("ranking jsd", "no 'jsd'; there are accuracy, reverse_kl"),
    ("pairs token vs nobody", "no pair 'token' vs 'nobody' in accuracy"),
    ("rates accuracy", "'token' is not named OBJECTIVE lr=RATE"),
    ("curve jsd", "no curve of 'jsd'"),
    ("equal-cost jsd", "nothing at equal cost of 'jsd'"),
    ("training train/loss at 1", "no 'train/loss' of training steps"),
    ("training train/entropy at 1 of nobody", "no 'nobody' among token, mute"),
    ("figure curves jsd", "no figure 'curves jsd'; there are seeds, curves accuracy"),
])  # fmt: skip
def test_a_block_that_cannot_be_made_says_why(tool, results, what, message):
    page = f"<!-- results toy: {what} -->\n<!-- end -->\n"
    with pytest.raises(SystemExit, match=re.escape(f"x.md: `<!-- results toy: {what} -->`: {message}")):
        tool.page.fill(Path("x.md"), page, {"toy": results}, Path())


def test_missing_markers_are_refused(tool, results):
    def check(page, tables=TABLES):
        tool.page.check_markers({Path("one.md"): page, Path("two.md"): tables}, {"toy": results})

    check(PAGE)
    for kind in tool.page.REQUIRED:
        page, tables = (re.sub(rf"<!-- results toy: {kind}[^\n]*\n<!-- end -->\n", "", text) for text in (PAGE, TABLES))
        with pytest.raises(SystemExit, match=rf"one.md or two.md: no block '{kind}' of 'toy'; put `<!-- results toy"):
            check(page, tables)
    rates, none = "<!-- results toy: rates accuracy -->\n<!-- end -->\n", ""
    check(none, rates + "<!-- results toy: compute -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="no block 'compute' of 'toy'"):
        check(none, rates)
    with pytest.raises(SystemExit, match="one.md: no `<!-- end -->` on a line below `<!-- results toy: pairs"):
        check(PAGE.replace("old\n<!-- end -->", "old"))
    with pytest.raises(SystemExit, match="two.md: no `<!-- end -->`"):
        check(PAGE, TABLES + "<!-- results toy: costs -->\n")


@pytest.fixture
def pages(tmp_path):
    (tmp_path / "docs").mkdir()
    for file, text in (("RESULTS.md", PAGE), ("docs/results.md", TABLES)):
        (tmp_path / file).write_text(text)
    return [tmp_path / "RESULTS.md", tmp_path / "docs" / "results.md"]


def arguments(pages, *reports):
    return ["make_results", *reports, "--pages", *map(str, pages), "--docs", str(pages[1].parent)]


def test_the_command_stores_numbers_and_figures_and_fills_both_pages(tool, folder, pages, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", arguments(pages, f"toy={folder}"))
    tool.page.main()
    docs = pages[1].parent
    figures = ["seeds", *(f"curves_{name}" for name in tool.blocks.DRAWN)]
    names = sorted(path.name for path in docs.glob("results_toy*"))
    assert names == sorted(["results_toy.json", *(f"results_toy_{figure}.png" for figure in figures)])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in docs.glob("*.png"))
    assert "| `full kl` |" in pages[0].read_text()
    assert "](results_toy_seeds.png)" in pages[1].read_text()  # as seen from docs/
    tool.page.main()
    printed = [f"{page}: {what}" for what in ("filled", "nothing to change") for page in pages]
    assert capsys.readouterr().out.splitlines() == printed


@pytest.mark.parametrize(("argument", "message"), [
    ("toy", "'toy': expected NAME=FOLDER"), ("to-y=x", "expected NAME=FOLDER"),
    ("toy=nowhere", "toy=nowhere: no report.json there"), ("none=nowhere", "no block 'overview' of 'none'"),
])  # fmt: skip
def test_wrong_arguments_are_refused_before_anything_is_written(tool, pages, monkeypatch, argument, message):
    monkeypatch.setattr("sys.argv", arguments(pages, argument))
    with pytest.raises(SystemExit, match=message):
        tool.page.main()
    assert [path.name for path in pages[1].parent.iterdir()] == ["results.md"]
    assert [page.read_text() for page in pages] == [PAGE, TABLES]


def test_the_comparison_of_a_report_is_found_beside_it(tool, folder, tmp_path):
    (folder.parent / "comparison.json").write_text('{"mlflow_run_id": "abc"}')
    assert tool.page.parent_of(folder) == "abc"
    with pytest.raises(SystemExit, match="comparison.json: not found; --uri needs"):
        tool.page.parent_of(tmp_path)


@pytest.mark.parametrize(("report", "message"), [
    ({"metrics": {}, "contrasts": "all"}, "no run of it has finished"),
    ({"metrics": {"accuracy": {}}, "contrasts": "best", "seeds": [0, 1]},
     "contrasts=best; the pages show pairs: contrasts=all"),
])  # fmt: skip
def test_a_report_that_the_pages_cannot_show_is_refused(tool, tmp_path, report, message):
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit, match=message):
        tool.page.take("toy", tmp_path, tmp_path, None)


COMMITTED = {name: (ROOT / name).read_text() for name in ("RESULTS.md", "docs/results.md")}
TITLES = {"accuracy": "accuracy", "reverse KL": "reverse_kl", "forward KL": "forward_kl",
          "student's entropy": "student_entropy"}  # fmt: skip


@pytest.fixture(scope="module")
def committed(tool):
    return tool.page.stored_numbers(ROOT / "docs")


def test_the_committed_pages_are_what_their_numbers_give(tool, committed):
    tool.page.check_markers({Path(page): text for page, text in COMMITTED.items()}, committed)
    for page, text in COMMITTED.items():
        assert tool.page.fill(ROOT / page, text, committed, ROOT / "docs") == text, "run python -m tools.make_results"
    assert len(COMMITTED["RESULTS.md"].encode()) <= 15_000
    assert all((ROOT / "docs" / f"results_{name}.json").stat().st_size < 100_000 for name in committed)


def test_no_stored_number_names_a_folder_of_the_machine(committed):
    settings = [value for results in committed.values() for value in results.report.made.values()]
    assert [value for value in settings if re.search(r"(^| )/", value)] == []


def test_the_rates_compared_are_the_best_of_those_that_were_tried(tool, committed):
    chosen = tool.blocks.best_rates(committed["rates_tiny"], "accuracy")
    compared, tried = (load_comparison([ROOT / f"conf/compare/{name}_tiny.yaml"]) for name in ("results", "rates"))
    assert chosen.keys() == compared.variants.keys()
    for objective, words in compared.variants.items():
        assert words[-1] == f"optim.lr={chosen[objective]}"
        assert [tried.variants[f"{objective} lr={rate}"] for rate in ("2.5e-4", "7e-4", "2e-3")] == [
            [*words[:-1], f"optim.lr={rate}"] for rate in ("2.5e-4", "7e-4", "2e-3")
        ]
    assert tried.base == compared.base
    assert tried.overrides == compared.overrides
    assert not {*tried.seeds} & {*compared.seeds}


def test_the_rates_are_those_of_the_prose(tool, committed):
    chosen = tool.blocks.best_rates(committed["rates_tiny"], "accuracy")
    reached = {row.variant: row.mean for row in committed["rates_tiny"].report.metrics["accuracy"].rows}
    assert {objective for objective, rate in chosen.items() if rate == "2e-3"} == {
        "full reverse", "full forward", "full jsd"
    }  # fmt: skip
    assert sum(rate != "7e-4" for rate in chosen.values()) == 8
    for objective in ("sequence", "centred_rb", "topk_truncated"):
        assert max(reached[f"{objective} lr={rate}"] for rate in ("7e-4", "2e-3")) < 0.01
    assert reached["token lr=7e-4"] - reached["token lr=2.5e-4"] < 0.02
    assert reached["k3_loss lr=2e-3"] < committed["tiny"].report.untrained["accuracy"]


def test_the_numbers_of_the_recommendations_are_those_that_are_stored(committed):
    table = COMMITTED["RESULTS.md"].partition("## Which estimator")[2].partition("Leave alone")[0]
    said = re.findall(rf"(\w+)[^.|:]*, ({'|'.join(TITLES)}): ((?:`[^`]+` [\d.]+\d(?:, )?)+)", table)
    told = [
        (where, title, *one) for where, title, listed in said for one in re.findall(r"`([^`]+)` ([\d.]+\d)", listed)
    ]
    assert len(told) == len(re.findall(r"\d\.\d", table)) >= 15
    for where, title, variant, number in told:
        rows = committed[where.lower()].report.metrics[TITLES[title]].rows
        assert number == f"{next(row.mean for row in rows if row.variant == variant):.3g}", (where, title, variant)


def test_the_intervals_in_the_prose_are_those_of_the_tables():
    rows = [line for line in COMMITTED["docs/results.md"].splitlines() if line.startswith("|")]
    for page, count in (("RESULTS.md", 5), ("docs/results.md", 6)):
        prose = "\n".join(line for line in COMMITTED[page].splitlines() if not line.startswith("|"))
        intervals = re.findall(r"-?\d\.\d+\s\[-?\d\.\d+, \d\.\d+\]", prose)
        assert len(intervals) == count
        assert [one for one in intervals if not any(f"| {one} |" in row for row in rows)] == []


# What the prose of both pages says: comparison, first, second -> verdicts on accuracy, reverse KL and forward KL.
CLAIMS = {
    ("tiny", "full jsd", "full reverse"): "better better equal",
    ("tiny", "full jsd", "full forward"): "equal equal worse",
    ("tiny", "full reverse", "token"): "better better better",
    ("tiny", "full reverse", "vopd"): "better better better",
    ("tiny", "full forward", "full reverse"): "better better better",
    ("tiny", "vopd", "token"): "better better better",
    ("tiny", "head_and_tail", "token"): "equal better better",
    ("tiny", "head_and_tail", "vopd"): "worse equal equal",
    ("tiny", "head_and_tail", "teacher_topk"): "better better better",
    ("tiny", "teacher_topk", "token"): "equal worse equal",
    ("tiny", "teacher_topk", "full reverse"): "worse worse worse",
    ("tiny", "k3_loss", "token"): "equal equal equal",
    ("tiny", "k3_loss", "full forward"): "worse worse worse",
    ("tiny", "hybrid gamma=0.5", "token"): "equal equal equal",
    ("tiny", "centred_rb", "token"): "equal equal better",
    ("tiny", "sequence", "token"): "equal equal equal",
    ("tiny", "centred_rb", "sequence"): "better better better",
    ("tiny", "topk_truncated", "teacher_topk"): "collapsed collapsed collapsed",
    ("smollm2", "full reverse", "token"): "collapsed better collapsed",
    ("smollm2", "full forward", "token"): "collapsed better collapsed",
    ("smollm2", "teacher_topk", "token"): "collapsed better collapsed",
    ("smollm2", "teacher_topk", "full reverse"): "equal equal equal",
    ("smollm2", "full forward", "full reverse"): "equal equal better",
    ("smollm2", "sequence", "token"): "collapsed collapsed collapsed",
}


@pytest.mark.parametrize(("pair", "verdicts"), CLAIMS.items(), ids=str)
def test_the_verdicts_in_the_prose_are_those_of_the_analysis(tool, committed, pair, verdicts):
    name, first, second = pair
    words = {"not told apart": "equal", f"`{first}` is better": "better", f"`{second}` is better": "worse"}
    rows = tool.blocks.block(f"pairs {first} vs {second}", committed[name]).splitlines()[2:]
    told = [row.strip("| ").rpartition(" | ")[2] for row in rows]
    assert [words.get(one, "collapsed" if "collapsed" in one else one) for one in told] == verdicts.split()


def test_the_runs_that_collapsed_are_those_of_the_prose(committed):
    found = {(name, yardstick): {row.variant: row.collapsed_runs for row in metric.rows if row.collapsed_runs}
             for name, results in committed.items() if name != "rates_tiny"
             for yardstick, metric in results.report.metrics.items() if metric.better}  # fmt: skip
    every = {"topk_truncated": 5}
    assert found == {("tiny", "accuracy"): every, ("tiny", "reverse_kl"): every, ("tiny", "forward_kl"): every,
                     ("smollm2", "accuracy"): {"token": 1, "sequence": 3},
                     ("smollm2", "reverse_kl"): {"sequence": 2},
                     ("smollm2", "forward_kl"): {"token": 1, "sequence": 2}}  # fmt: skip
