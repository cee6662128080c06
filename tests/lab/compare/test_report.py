"""The report of made-up runs whose truth is known."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from lit_opd.errors import UserError
from lit_opd.lab.compare import dots
from lit_opd.lab.compare.analysis import Analysis, Contrast, Row
from lit_opd.lab.compare.cells import amount, interval, numbers, probability
from lit_opd.lab.compare.collect import Point, RunResult
from lit_opd.lab.compare.curves import draw_curves
from lit_opd.lab.compare.digest import LeftOut, make_report, to_json, value_at, values_at
from lit_opd.lab.compare.document import overview, to_html, to_markdown, to_summary, write_report
from lit_opd.measures.drawing import png

PROMPTS = tuple(f"{i:04x}" for i in range(40))
LEVELS = {"token": 0.40, "full reverse_kl": 0.30, "hybrid gamma=0.5": 0.302, "slow": 0.25}
SECONDS = {"token": 1.0, "full reverse_kl": 1.5, "hybrid gamma=0.5": 2.0, "slow": 6.0}


def run(variant, seed, steps=40, **changes):
    """A run whose reverse KL falls to the level of its variant, its seed and its prompts."""
    rng = np.random.default_rng([seed, list(LEVELS).index(variant)])
    hardness = np.random.default_rng(0).random(len(PROMPTS))
    final = LEVELS[variant] + hardness + 0.01 * rng.standard_normal(len(PROMPTS)) + 0.01 * seed
    right = (hardness + 0.3 * rng.random(len(PROMPTS)) < 1 - LEVELS[variant]).astype(float)
    places = np.arange(0, steps + 1, 10)
    points = [Point(int(s), 100.0 * s, SECONDS[variant] * s, float(final.mean() + np.exp(-s / 10))) for s in places]
    given = {
        "variant": variant, "seed": seed, "status": "FINISHED", "run_id": f"{variant[:2]}{seed}", "prompts": PROMPTS,
        "per_prompt": {"length": [9.0] * 40, "accuracy": right.tolist(), "reverse_kl": final.tolist()},
        "curves": {"reverse_kl": points},
        "cost": {"steps": steps, "tokens": 100.0 * steps, "seconds": SECONDS[variant] * steps, "peak_memory_mb": 512.0},
    }  # fmt: skip
    return RunResult(**(given | changes))


def all_runs(seeds=(1, 2, 3)):
    return [run(variant, seed) for variant in LEVELS for seed in seeds]


@pytest.fixture(scope="module")
def report():
    return make_report(all_runs())


@pytest.fixture(scope="module")
def written(report):
    return to_markdown(report)


@pytest.fixture(scope="module")
def page(written):
    return to_html(*written)


def text_of(report):
    return to_markdown(report)[0]


def verdicts(report, yardstick):
    return {row.variant: row.verdict for row in report.metrics[yardstick].rows}


def test_the_verdicts_are_the_truth_and_no_more(report):
    assert verdicts(report, "reverse_kl") == {
        "slow": "best", "full reverse_kl": "worse", "hybrid gamma=0.5": "worse", "token": "worse",
    }  # fmt: skip
    found = report.metrics["reverse_kl"]
    assert [(one.a, one.b) for one in found.contrasts] == [(row.variant, "slow") for row in found.rows[1:]]
    worst = found.contrasts[-1]
    means = {v: np.log([np.mean(run(v, s).per_prompt["reverse_kl"]) for s in (1, 2, 3)]).mean() for v in LEVELS}
    assert worst.difference == pytest.approx(means["token"] - means["slow"])
    assert worst.low < worst.difference < worst.high
    middle = make_report(all_runs(), contrasts="hybrid gamma=0.5").metrics["reverse_kl"].contrasts
    assert {one.a: one.verdict for one in middle} == {"slow": "better", "full reverse_kl": "equal", "token": "worse"}


def test_a_baseline_that_nobody_has_is_refused():
    with pytest.raises(UserError, match="contrasts: expected best, all, or a baseline out of 'token', found 'x'"):
        make_report([run("token", 1)], contrasts="x")


def test_yardsticks_with_a_direction_come_first(report, written):
    assert list(report.metrics) == ["reverse_kl", "accuracy", "length"]
    assert re.findall(r"^## (.*)$", written[0], re.MULTILINE) == ["How it was made"]
    folded = re.findall(r"^<details><summary>(.*)</summary>$", written[0], re.MULTILINE)
    assert folded == ["Reverse KL", "Accuracy", "Length", "How to read this"]
    assert [line.partition(":")[0] for line in to_summary(report.metrics).splitlines()] == ["reverse_kl", "accuracy"]


def test_the_first_table_answers(report):
    """Variants by yardsticks with their costs, the best marked, the untrained student beside them."""
    told, rows, legend = overview(report).split("\n\n")
    assert told == "Reverse KL: `slow` is best and is told from each of the others."
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows.splitlines()]
    assert header[1:] == [
        "reverse KL, lower is better",
        "accuracy, higher is better",
        "sampled tokens",
        "seconds",
        "peak MB",
    ]
    cells = {line[0]: line for line in lines}
    assert cells["`slow`"][1].endswith("★")
    assert cells["`slow`"][3:] == ["4,000", "240", "512"]
    assert cells["`token`"][1][-1] == "]"
    assert cells["*untrained student*"][1] == f"{report.untrained['reverse_kl']:.3g}"
    assert "not told from the best" in legend


def test_a_teacher_that_was_measured_has_a_row():
    runs = [replace(one, teacher={"accuracy": 0.992}) for one in all_runs(seeds=(1, 2))]
    assert "| *teacher* |  | 0.992 |" in overview(make_report(runs))


def test_quality_at_equal_cost_is_read_off_the_curves(report):
    found = {equal.cost: equal for equal in report.equal_costs}
    # The quickest variant spends 40 seconds, so that is what all have spent.
    assert {cost: equal.budget for cost, equal in found.items()} == {"step": 40, "tokens": 4000.0, "seconds": 40.0}
    for variant in LEVELS:
        points = [run(variant, seed).curves["reverse_kl"] for seed in (1, 2, 3)]
        by_hand = [np.interp(40.0 / SECONDS[variant], [p.step for p in ps], [p.value for p in ps]) for ps in points]
        assert found["seconds"].values[variant] == pytest.approx(np.mean(by_hand))
    # The best at equal steps is the worst at equal seconds.
    assert min(found["step"].values, key=found["step"].values.get) == "slow"
    assert max(found["seconds"].values, key=found["seconds"].values.get) == "slow"


def test_curves_are_never_extrapolated():
    points = [Point(10, 100.0, 5.0, 1.0), Point(20, 200.0, 9.0, 0.5)]
    assert value_at(points, "tokens", 150) == pytest.approx(0.75)
    assert value_at(points, "seconds", 9) == 0.5
    assert value_at(points, "seconds", 9.1) is None
    assert value_at(points, "step", 9) is None
    assert value_at([], "step", 9) is None
    assert value_at([Point(0, 0.0, 0.0, float("nan")), points[0]], "step", 5) is None
    assert values_at("jsd", {"a": {1: points}, "b": {1: points[:1]}}, "tokens").budget == 100
    assert values_at("jsd", {}, "tokens") is None


def test_costs_are_means_over_runs(report):
    cost = next(cost for cost in report.costs if cost.variant == "slow")
    assert (cost.steps, cost.tokens, cost.seconds, cost.peak_memory_mb) == (40, 4000, 240, 512)


def test_runs_that_did_not_finish_are_named_and_left_out():
    runs = [r for r in all_runs() if (r.variant, r.seed) != ("slow", 3)]
    runs += [
        run("slow", 3, status="FAILED", cost={"steps": 7.0}),
        run("token", 4, status="KILLED", per_prompt={}, cost={}),
    ]
    nan = replace(runs[0], per_prompt=runs[0].per_prompt | {"accuracy": [float("nan")] + [1.0] * 39})
    report = make_report([nan, *runs[1:]])
    assert LeftOut("slow", 3, "FAILED", "sl3", "failed after 7 steps") in report.left_out
    assert LeftOut("token", 4, "KILLED", "to4", "killed") in report.left_out
    assert LeftOut("slow", 4, "MISSING", "", "no run") in report.left_out
    assert {len(row.by_seed) for row in report.metrics["reverse_kl"].rows} == {2, 3}
    assert next(row for row in report.metrics["accuracy"].rows if row.variant == "token").by_seed.keys() == {2, 3}
    text = text_of(report)
    assert "| `slow` | 3 | FAILED | failed after 7 steps | sl3 |" in text
    assert "not finite for every prompt, so left out of accuracy" in text


def test_nothing_finished_is_said():
    report = make_report([run("token", 1, status="KILLED", per_prompt={}, curves={})])
    assert report.metrics == {}
    assert "No run has finished" in text_of(report)
    assert "KILLED" in to_html(*to_markdown(report))
    assert "No run has finished" in text_of(make_report([]))


def test_one_variant_is_not_compared():
    report = make_report([run("token", seed) for seed in (1, 2)])
    assert "`token` alone has finished runs: nothing is compared." in text_of(report)


def test_one_seed_says_nothing_about_others():
    report = make_report([r for r in all_runs(seeds=(1,))])
    assert all("says nothing of other seeds" in found.notes[-1] for found in report.metrics.values())
    assert "says nothing of other seeds" in text_of(report)


def test_a_variant_under_two_names_is_equal():
    runs = [run("token", seed) for seed in (1, 2, 3)]
    report = make_report(runs + [replace(r, variant="again", run_id=r.run_id + "x") for r in runs])
    assert verdicts(report, "reverse_kl") == verdicts(report, "accuracy") == {"token": "best", "again": "equal"}
    assert report.metrics["reverse_kl"].contrasts[0].p == 1
    assert "`token` has the best mean" in text_of(report)


def test_a_run_that_diverged_has_collapsed():
    runs = all_runs()
    broken = [replace(one, per_prompt=one.per_prompt | {"reverse_kl": [float("nan")] * 40}) if one.variant == "token"
              else one for one in runs]  # fmt: skip
    report = make_report(broken)
    assert verdicts(report, "reverse_kl")["token"] == "collapsed"
    assert "`token` | not finite ✗ |" in text_of(report)
    assert json.dumps(to_json(report), allow_nan=False)


def test_a_kl_of_zero_is_compared_as_it_is():
    runs = [replace(one, per_prompt={"reverse_kl": [0.0] * 40}) if one.variant == "slow" else one for one in all_runs()]
    found = make_report(runs).metrics["reverse_kl"]
    assert found.scale == "raw"
    assert "has no logarithm" in found.notes[-1]


def test_other_prompts_are_refused():
    other = replace(run("slow", 1), prompts=(*PROMPTS[:-1], "ffff"))
    with pytest.raises(UserError) as error:
        make_report([run("token", 1), other])
    assert str(error.value) == (
        "runs: expected the 40 validation prompts of run to1 ('token', seed 1), in their order, in all, found 40 in "
        "run sl1 ('slow', seed 1), 39 of them the same. Compare runs of one validation set: leave the others out, or "
        "train them again with the same data."
    )
    shuffled = replace(run("slow", 1), prompts=PROMPTS[::-1])
    with pytest.raises(UserError, match="in their order"):
        make_report([run("token", 1), shuffled])
    # What did not finish is not compared.
    assert make_report([run("token", 1), replace(other, status="KILLED")]).left_out


def test_a_run_with_values_of_too_few_prompts_is_refused():
    short = replace(run("slow", 1), per_prompt={"reverse_kl": [1.0] * 39})
    with pytest.raises(UserError, match="a value of reverse_kl for each of 40 prompts, found 39 in run sl1"):
        make_report([run("token", 1), short])


def test_a_variant_and_seed_that_finished_twice_is_refused():
    with pytest.raises(UserError, match="two of 'token' with seed 1: to1 and again. Leave one of them out"):
        make_report([run("token", 1), run("token", 1, run_id="again")])
    # A run that was started again after a failure is no second one.
    retried = make_report([run("token", 1, status="FAILED", run_id="first"), run("token", 1)])
    assert [left.run_id for left in retried.left_out] == ["first"]


def test_seeds_of_one_variant_that_were_configured_differently_are_refused():
    runs = [run("token", 1, settings={"optim.lr": "0.1", "teacher.path": "good"}),
            run("token", 2, settings={"optim.lr": "0.1", "teacher.path": "bad"})]  # fmt: skip
    with pytest.raises(UserError) as error:
        make_report(runs)
    assert str(error.value) == (
        "runs: expected one teacher.path for all seeds of 'token', found 'good' in run to1 ('token', seed 1) and 'bad' "
        "in run to2 ('token', seed 2). Make one of them anew, or give it another tag `variant` in MLflow."
    )
    # What did not finish is not compared.
    assert make_report([runs[0], replace(runs[1], status="KILLED")]).differing == []


def test_the_report_says_in_what_the_variants_differ():
    runs = [run("token", 1, settings={"estimator.name": "token", "optim.lr": "0.1", "data.path": "x"}),
            run("slow", 1, settings={"estimator.name": "sequence", "data.path": "x"})]  # fmt: skip
    report = make_report(runs)
    assert report.differing == ["estimator.name", "optim.lr"]
    assert "| variants differ in | `estimator.name`, `optim.lr` |" in text_of(report)
    assert "nothing that is recorded" in text_of(make_report(all_runs(seeds=(1,))))


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are made, beside their PNGs."""
    from lit_opd.lab.compare import curves

    figures, png = [], curves.png
    monkeypatch.setattr(curves, "png", lambda figure: figures.append(figure) or png(figure))
    return figures


def curves_of(name, *values):
    points = [Point(step, float(step), float(step), value) for step, value in zip((0, 10, 20), values, strict=False)]
    return make_report([run(variant, 1, curves={name: points}) for variant in ("token", "slow")])


@pytest.mark.parametrize("values", [(float("inf"), 0.5, 0.4), (0.6, 0.5, float("nan"))])
def test_a_point_that_is_not_finite_is_left_out_of_the_picture(drawn, values):
    report = curves_of("reverse_kl", *values)
    assert draw_curves(report.curves, report.variants, "reverse_kl").startswith(b"\x89PNG")
    lines = [line.get_ydata() for line in drawn[0].axes[0].lines]
    assert [len(line) for line in lines] == [2, 2]
    assert np.isfinite(lines).all()
    assert "Learning curves" in text_of(report)
    assert "Learning curves" not in text_of(curves_of("reverse_kl", float("nan")))


@pytest.mark.parametrize(("name", "scale"), [("accuracy", "linear"), ("pass_at_2", "linear"), ("jsd", "log")])
def test_only_what_is_no_share_has_a_logarithmic_axis(drawn, name, scale):
    report = curves_of(name, 0.001, 0.5)
    draw_curves(report.curves, report.variants, name)
    assert drawn[0].axes[0].get_yscale() == scale


@pytest.mark.parametrize("most", [0.011, 0.4, 3.0, 5e4])
def test_labels_of_a_logarithmic_axis_do_not_meet(monkeypatch, most):
    figures = []
    monkeypatch.setattr(dots, "png", lambda figure: figures.append(figure) or png(figure))
    names = ("reverse_kl", "forward_kl", "jsd")
    rows = [Row(variant, mean, None, None, "best", {1: mean}, 0) for variant, mean in (("a", 0.01), ("b", most))]
    dots.draw_seeds(dict.fromkeys(names, Analysis("lower", "log", rows, [], [])), ["a", "b"], {})
    for ax in figures[0].axes:
        low, high = sorted(ax.get_xlim())
        labels = [label for label in ax.get_xticklabels() if low <= label.get_position()[0] <= high]
        boxes = sorted((label.get_window_extent().x0, label.get_window_extent().x1) for label in labels)
        assert all(left[1] < right[0] for left, right in pairwise(boxes))
        assert len(boxes) >= 1 + (most > 0.1)


def test_json_comes_back_as_it_went(report):
    plain = to_json(report)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    told = plain["metrics"]["reverse_kl"]
    assert told["variants"]["slow"].keys() >= {"mean", "low", "high", "verdict"}
    assert told["contrasts"][0].keys() == {"a", "b", "difference", "low", "high", "p", "verdict"}
    assert len(plain["curves"]) == 12


def test_json_has_no_numbers_that_are_not_finite():
    broken = run("token", 1, curves={"reverse_kl": [Point(0, 0.0, 0.0, 1.0), Point(1, 1.0, 1.0, float("nan"))]})
    report = make_report([broken, run("slow", 1)])
    plain = to_json(report)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["curves"][0]["points"][1]["value"] is None
    assert text_of(report)


class Page(HTMLParser):
    """Collects addresses and checks that tags are closed in their order."""

    def __init__(self):
        super().__init__()
        self.addresses, self.open, self.counts = [], [], {}

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self.counts[tag] = self.counts.get(tag, 0) + 1
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_from_elsewhere(page):
    parsed = Page()
    parsed.feed(page)
    assert parsed.open == []
    assert parsed.addresses
    assert all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    around = re.sub(r'src="data:[^"]*"', "", page)
    assert "http" not in around
    assert "url(" not in around
    assert "@import" not in around
    assert not {"script", "link", "iframe"} & parsed.counts.keys()
    assert parsed.counts["img"] == 2  # the seeds and the curves
    assert parsed.counts["details"] == 4
    assert "color-scheme: light dark" in page


def test_the_page_says_what_was_found(page):
    text = re.sub(r"<[^>]+>", "", page)
    for expected in ("Comparison", "40 optimizer steps", "slow is best and is told from each of the others",
                     "corrected p", "lower is better", "At equal cost", "Linux"):  # fmt: skip
        assert expected in text


def test_a_contrast_is_shown_as_a_ratio_on_a_log_scale(report):
    row = next(line for line in text_of(report).splitlines() if line.startswith("| `token` | `slow` | "))
    ratio, low, high = map(float, re.findall(r"[-\d.]+", row.split(" | ")[2]))
    contrast = report.metrics["reverse_kl"].contrasts[-1]
    found = np.exp([contrast.difference, contrast.low, contrast.high])
    assert (ratio, low, high) == pytest.approx(tuple(found), abs=1e-2)


def test_names_are_text_not_tags():
    runs = [replace(r, variant=f"<script>a|b & ${r.variant}$ _ ![x](http://x)") for r in all_runs(seeds=(1, 2))]
    runs = [replace(r, settings={"<b>key</b>": r.variant}) for r in runs]
    text, pictures = to_markdown(make_report(runs))
    page = to_html(text, pictures)
    assert "<script>" not in page
    assert "<b>" not in page
    assert "<code>&lt;script&gt;a|b &amp; $token$ _ ![x](http://x)</code>" in page
    assert page.count("<img") == len(pictures)
    assert r"| `<script>a\|b & $token$ _ ![x](http://x)` |" in text


def test_more_variants_than_colours_are_drawn():
    runs = [replace(run("token", seed), variant=f"_variant number {i}") for i in range(12) for seed in (1, 2)]
    assert "variant number 11" in to_html(*to_markdown(make_report(runs)))


def test_files_are_written_and_markdown_names_its_figures(report, tmp_path):
    folder = tmp_path / "new" / "report"
    write_report(report, folder)
    assert sorted(path.name for path in folder.rglob("*.png")) == ["curves_reverse_kl.png", "seeds.png"]
    assert "](figures/curves_reverse_kl.png)" in (folder / "report.md").read_text()
    assert json.loads((folder / "report.json").read_text()) == to_json(report)
    assert all(path.stat().st_size for path in folder.rglob("*.*"))


def test_tables_have_as_many_cells_as_their_header(written):
    tables = [block.splitlines() for block in written[0].split("\n\n") if block.startswith("|")]
    assert len(tables) == 8
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)


def test_numbers_have_as_many_digits_as_are_known():
    def mean(value, low, high):
        return Row("token", value, low, high, "best", {})

    assert interval(mean(0.12345, 0.1001, 0.1468)) == "0.123 [0.100, 0.147]"
    assert interval(mean(1234.5, 1000.2, 1468.9)) == "1234 [1000, 1469]"
    assert interval(mean(-0.00001, -0.1, 0.1)) == "0.00 [-0.10, 0.10]"
    assert interval(mean(0.5, None, None)) == "0.5"
    assert interval(mean(0.0, 0.0, 0.0)) == "0 [0, 0]"
    assert interval(mean(-0.0, -0.0, -0.0)) == "0 [0, 0]"
    assert interval(mean(1.7695, 0.0434, 72.16)) == "1.77 [0.043, 72]"
    assert interval(mean(14.149, 0.4513, 438.2)) == "14.1 [0.45, 440]"
    assert interval(mean(None, None, None)) == "not finite"
    assert numbers(Contrast("a", "b", np.log(2), np.log(1.5), 800.0, 0.1, "equal"), True).startswith("2 [1.5, ")
    assert probability(0.00001) == "<0.001"
    assert probability(0.0316) == "0.032"
    assert amount(12345.6) == "12,346"
    assert amount(0.4821) == "0.482"
    assert amount(None) == ""
