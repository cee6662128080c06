"""The grid of a comparison, and every mistake in it."""

import subprocess
import sys
from pathlib import Path

import pytest

from lit_opd.cli import main
from lit_opd.config import load_config
from lit_opd.lab.compare.grid import load_comparison, runs_of
from lit_opd.lab.compare.preflight import check_runs
from lit_opd.measures import table

MISTAKES = [
    ({"base": []}, "base", "at least one, found none"),
    ({"base": ["missing.yaml"]}, "base", "no file 'missing.yaml'"),
    ({"base": "conf.yaml"}, "base", "a list"),
    ({"bases": []}, "bases", "Did you mean 'base'?"),
    ({"tracking": {"url": "x"}}, "tracking.url", "Did you mean 'uri'?"),
    ({"overrides": ["optim.lrr=1"]}, "optim.lrr", "Did you mean 'lr'?"),
    ({"overrides": ["evaluation.measures=[no.py:f]"]}, "variants.token: evaluation.measures", "no file 'no.py'"),
    ({"overrides": ["seed=3"]}, "overrides: seed", "Set seeds."),
    ({"overrides": ["tracking={uri: x}"]}, "overrides: tracking", "Set tracking.uri of the comparison."),
    ({"variants": None}, "variants", "at least one"),
    ({"variants": "token"}, "variants", "a mapping"),
    ({"variants": ["token", "hybrid", "token"]}, "variants", "'token' twice"),
    ({"variants": ["tokn"]}, "variants.tokn: estimator.name", "Did you mean 'token'?"),
    ({"variants": {"a": "optim.lr=1"}}, "variants.a", "a list of overrides"),
    ({"variants": {"a": [{"optim": 1}]}}, "variants.a", "a list of overrides"),
    ({"variants": {"a": ["optim.lrr=1"]}}, "variants.a: optim.lrr", "Did you mean 'lr'?"),
    ({"variants": {"a": ["optim.lr"]}}, "variants.a: optim.lr", "key=value"),
    ({"variants": {"a": ["optim.lr=0"]}}, "variants.a: optim.lr", "above 0"),
    ({"variants": {"a": ["trainer.max_step=9"]}}, "variants.a: trainer.max_step", "Did you mean 'max_steps'?"),
    ({"variants": {"a": ["output_dir=x"]}}, "variants.a: output_dir", "Set output_dir of the comparison."),
    ({"variants": {"a b": [], "a/b": ["optim.lr=1"]}}, "variants", "written to 'a-b'"),
    ({"variants": {"//": []}}, "variants", "a letter or a digit"),
    ({"variants": {"a\nb": []}}, "variants", "labels on one line, without backticks, found 'a\\nb'. Rename it."),
    ({"variants": {"a`b": []}}, "variants", "labels on one line, without backticks"),
    ({"variants": ["token", {"full": ["optim.lr=1"]}]}, "variants", "names of estimators in a list"),
    ({"variants": ["token", None]}, "variants", "names of estimators in a list, found None"),
    ({"variants": {1: [], "1": ["optim.lr=1"]}}, "--config", "Conflicting integer and string keys"),
    ({"variants": {"a": ["optim.lr=${optim.warmup}"]}}, "variants.a[0]", "write \\${...} where something else"),
    ({"variants": {"a": ["optim.lr=0.5"], "b": ["optim.lr=5e-1"]}}, "variants", "'a' and 'b', which are the same"),
    ({"variants": {"a": ["data.batch_size=2"]}}, "variants.a: data.batch_size", "4 as in the base"),
    ({"variants": {"a": ["evaluation.seed=1"]}}, "variants.a: evaluation.seed", "may_differ"),
    ({"variants": {"a": ["trainer.max_steps=7"]}}, "variants.a: trainer.max_steps", "found 7"),
    ({"variants": {"a": ["rollout.max_new_tokens=5"]}}, "variants.a: evaluation.max_new_tokens", "found 5"),
    # Escaped, as it is the run's seed and not a key of the comparison.
    ({"overrides": ["data.kwargs.x=\\${seed}"], "seeds": [0, 1]}, "variants.token: data.kwargs.x", "found 1 (seed 1)"),
    ({"seeds": []}, "seeds", "e.g. seeds: [0, 1, 2]"),
    ({"seeds": [0, 1, 0]}, "seeds", "0 twice"),
    ({"seeds": ["first"]}, "seeds[0]", "a value of type int"),
    ({"parallel": 0}, "parallel", "at least 1"),
    ({"parallel": "many"}, "parallel", "a value of type int"),
    ({"may_differ": ["optim.lr"]}, "may_differ", "variants may change every other key"),
    ({"tracking": {"uri": "mlruns"}}, "tracking.uri", "sqlite:///"),
    ({"output_dir": "compare.yaml/out"}, "output_dir", "is a file"),
]


@pytest.mark.parametrize(("keys", "key", "text"), MISTAKES, ids=lambda value: str(value)[:50])
def test_a_mistake_is_told_in_one_line_before_anything_happens(
    workspace, write_comparison, capsys, monkeypatch, keys, key, text
):
    file = write_comparison(workspace, **keys)
    monkeypatch.setattr("mlflow.tracking.MlflowClient.create_run", lambda *_, **__: pytest.fail("MLflow was told"))
    before = sorted(workspace.folder.rglob("*"))
    assert main(["compare", "--config", str(file)]) == 2
    printed = capsys.readouterr()
    (line,) = [line for line in printed.err.splitlines() if not line.startswith("warning: ")]
    assert line.startswith(f"error: {key}: expected "), line
    assert text in line
    assert line.endswith((".", "?", "]"))
    assert sorted(workspace.folder.rglob("*")) == before


def test_a_label_that_stands_twice_in_the_file_is_refused(workspace, capsys):
    (workspace.folder / "twice.yaml").write_text("variants:\n  a: []\n  a: [optim.lr=1]\n")
    assert main(["compare", "--config", "twice.yaml"]) == 2
    assert "found duplicate key" in capsys.readouterr().err


def test_a_mistake_is_reported_without_importing_torch(workspace, write_comparison):
    file = write_comparison(workspace, seeds=[])
    script = ("import sys; from lit_opd.cli import main\n"
              f"assert main(['compare', '--config', {str(file)!r}]) == 2\n"
              "assert 'torch' not in sys.modules")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_runs_are_the_base_with_the_variant_the_seed_and_a_place_of_their_own(make_comparison, write_comparison):
    variants = {
        "token": ["estimator.name=token"],
        "hybrid gamma=0.5": ["estimator.name=hybrid", "estimator.kwargs.gamma=0.5"],
    }
    comparison, runs = make_comparison(variants=variants, seeds=[3, 1])
    assert [(run.variant, run.seed) for run in runs] == [
        ("token", 3), ("hybrid gamma=0.5", 3), ("token", 1), ("hybrid gamma=0.5", 1),
    ]  # fmt: skip
    assert len({run.folder for run in runs}) == 4
    for run in runs:
        assert run.folder.is_relative_to(comparison.output_dir)
        own = [f"seed={run.seed}", f"output_dir={run.folder}", f"tracking.uri={comparison.tracking.uri}",
               "tracking.experiment=tests", f"tracking.run_name='{run.variant} · seed {run.seed}'",
               f"tracking.tags.variant='{run.variant}'"]  # fmt: skip
        expected = load_config(comparison.base, [*comparison.overrides, *variants[run.variant], *own])
        assert run.config == expected


def test_names_of_estimators_are_variants_for_short(make_comparison):
    short, runs = make_comparison(variants=["token", "sequence"])
    long, same = make_comparison(variants={name: [f"estimator.name={name}"] for name in ("token", "sequence")})
    assert short == long
    assert runs == same


def test_overrides_on_the_command_line_are_of_the_comparison(workspace, write_comparison):
    file = write_comparison(workspace)
    comparison = load_comparison([file], ["seeds=[5,6]", "parallel=2", "tracking.experiment=other"])
    assert (comparison.seeds, comparison.parallel, comparison.tracking.experiment) == ([5, 6], 2, "other")


@pytest.mark.parametrize(("words", "may_differ"), [
    (["data.batch_size=2"], ["data.batch_size"]), (["data.batch_size=2"], ["data"]),
    (["trainer.max_steps=7"], ["trainer.max_steps"]), (["rollout.max_new_tokens=5"], ["evaluation.max_new_tokens"]),
])  # fmt: skip
def test_what_may_differ_may(make_comparison, words, may_differ):
    comparison, runs = make_comparison(variants={"a": [], "b": words}, may_differ=may_differ)
    assert runs[0].config != runs[1].config
    check_runs(runs, comparison.may_differ)


def test_a_variant_may_shorten_completions_where_the_evaluation_s_length_is_said(make_comparison):
    _, runs = make_comparison(variants={"a": ["rollout.max_new_tokens=5"]},
                              overrides=["evaluation.max_new_tokens=8", "data.validation_size=6"])  # fmt: skip
    assert (runs[0].config.rollout.max_new_tokens, runs[0].config.evaluation.max_new_tokens) == (5, 8)


RANDOM_ROWS = """
import random

def rows(size, **_):
    return [{"prompt": f"{random.SystemRandom().randrange(10**6)}+1=", "answer": "1"} for _ in range(size)]
"""


def test_other_validation_prompts_are_found_where_the_configuration_is_the_same(workspace, write_comparison, capsys):
    (workspace.folder / "mine.py").write_text(RANDOM_ROWS)
    file = write_comparison(workspace, overrides=["data.path=mine.py:rows", "trainer.max_steps=2", "data.train_size=24",
                                                  "data.validation_size=6", "data.batch_size=4"])  # fmt: skip
    assert main(["compare", "--config", str(file)]) == 2
    assert "variants.full_vocab: expected the validation prompts of 'token'" in capsys.readouterr().err


def test_a_folder_with_another_run_is_refused_and_one_with_the_same_is_not(workspace, write_comparison, capsys):
    from lit_opd.config import to_yaml

    file = write_comparison(workspace)
    runs = runs_of(load_comparison([file]))
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "config.yaml").write_text(to_yaml(runs[0].config))
    check_runs(runs)
    file = write_comparison(workspace, variants={"token": ["estimator.name=token", "optim.lr=0.5"]})
    assert main(["compare", "--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert "output_dir: expected a new folder" in error
    assert "optim.lr 0.001 instead of 0.5" in error


YARDSTICK = """
from lit_opd.measures import register_measure

@register_measure("gap", title="gap between models", better="lower")
def gap(student_logps_cV, teacher_logps_cV, ids_c):
    return (student_logps_cV - teacher_logps_cV).abs().mean(-1)
"""


def test_a_yardstick_of_a_user_has_its_title_and_direction_in_this_process(workspace, make_comparison):
    (workspace.folder / "mine.py").write_text(YARDSTICK)
    _, runs = make_comparison(overrides=["evaluation.measures=[mine.py:gap]", "data.validation_size=6"])
    check_runs(runs)
    assert (table.describe("gap").title, table.describe("gap").better) == ("gap between models", "lower")


def test_the_shipped_comparison_loads_and_its_runs_pass_all_checks(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[3])
    comparison = load_comparison(["conf/compare/quickstart.yaml"])
    runs = runs_of(comparison)
    assert len(runs) == 6
    check_runs(runs, comparison.may_differ)
