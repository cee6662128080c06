"""Results that were made elsewhere, by the command."""

import json

import pytest

from lit_opd.cli import main
from lit_opd.lab.compare.analysis import Rules, analyse

LINES = [
    f"{metric},{variant},{seed},{prompt},{value + 0.01 * seed + 0.02 * prompt}"
    for metric, values in {"accuracy": {"a": 0.7, "b": 0.4}, "mine": {"a": 5.0, "b": 9.0}}.items()
    for variant, value in values.items()
    for seed in (3, 7)
    for prompt in range(4)
]
HEADER = "metric,variant,seed,prompt,value"


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(lines, header=HEADER):
        (tmp_path / "t.csv").write_text("\n".join([header, *lines]) + "\n")

    return write


def run(*words):
    return main(["compare", "--from-table", "t.csv", "--json", "o.json", *words])


def test_each_metric_is_analysed_by_itself(table, tmp_path, capsys):
    table([line for line in LINES if line.startswith("accuracy")])
    assert run() == 0
    told = json.loads((tmp_path / "o.json").read_text())["metrics"]
    assert list(told) == ["accuracy"]
    assert told["accuracy"]["variants"]["a"]["verdict"] == "best"
    assert told["accuracy"]["variants"]["b"]["by_seed"].keys() == {"3", "7"}
    assert "accuracy: `a` is best" in capsys.readouterr().out
    values = {
        v: {s: [x + 0.01 * s + 0.02 * p for p in range(4)] for s in (3, 7)} for v, x in {"a": 0.7, "b": 0.4}.items()
    }
    expected = analyse(values, Rules("higher", least=0.0, most=1.0)).contrasts[0]
    (found,) = told["accuracy"]["contrasts"]
    assert found.keys() == {"a", "b", "difference", "low", "high", "p", "verdict"}
    assert found["p"] == pytest.approx(expected.p)
    assert found["difference"] == pytest.approx(-0.3)


def test_direction_scale_and_baseline_can_be_given(table, tmp_path):
    table([line.replace("nothing", "") for line in LINES])
    assert run("--better", "lower", "--scale", "log", "contrasts=b") == 0
    told = json.loads((tmp_path / "o.json").read_text())["metrics"]
    assert told["mine"]["scale"] == "log"
    assert told["mine"]["variants"]["a"]["verdict"] == "best"
    assert told["accuracy"]["variants"]["b"]["verdict"] == "best"
    assert {one["b"] for one in told["mine"]["contrasts"]} == {"b"}


def test_prompts_are_optional_and_what_diverged_is_nan(table, tmp_path):
    table(["reverse_kl,a,0,0.1", "reverse_kl,a,1,0.12", "reverse_kl,b,0,nan", "reverse_kl,b,1,inf"],
          "metric,variant,seed,value")  # fmt: skip
    assert run() == 0
    told = json.loads((tmp_path / "o.json").read_text())["metrics"]["reverse_kl"]["variants"]
    assert told["b"] == {"mean": None, "low": None, "high": None, "verdict": "collapsed",
                         "by_seed": {"0": None, "1": None}, "collapsed_runs": 2}  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "header", "words", "message"),
    [
        ([], HEADER, (), "--from-table: expected a line of results, found none in t.csv"),
        (["x"], "metric,value", (), "the columns metric, variant, seed, value, found metric, value. Add variant, seed"),
        (["accuracy,a,0,,x"], HEADER, (), "expected numbers, found 'x' in line 2. Write a number, or nan"),
        (["accuracy,,0,,1"], HEADER, (), "expected a variant in every line, found none in line 2"),
        (["accuracy,a,0,,1"] * 2, HEADER, (), "one value of each .*, found a second one in line 3: accuracy, a, 0"),
        (["mine,a,0,,1"], HEADER, (), "metrics whose good direction is known, found 'mine'. Set --better lower"),
        (["jsd,a,0,,0"], HEADER, (), "values of 'jsd' above 0 on a log scale, .*set --scale raw"),
        (["jsd,a,0,1,1", "jsd,a,1,2,1"], HEADER, (), "prompts in all runs of 'jsd', found prompt '1' in some"),
        (["jsd,a,0,,1"], HEADER, ("contrasts=c",), "contrasts: expected best, all, or .* out of 'a', found 'c'"),
        (["jsd,a,0,,1"], HEADER, ("--better", "up"), "--better: expected lower or higher, found 'up'"),
        (["jsd,a,0,,1"], HEADER, ("--scale", "ln"), "--scale: expected raw or log, found 'ln'"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_compared_is_refused(lines, header, words, message, table, capsys):
    import re

    table(lines, header)
    assert run(*words) == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert told.count("\n") == 1


def test_a_file_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run() == 2
    assert "--from-table: expected a CSV file, found t.csv" in capsys.readouterr().err
