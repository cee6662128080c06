"""The command on the pair that comes with the package, and what it refuses."""

import json
import math
import os
import signal
from collections import Counter
from dataclasses import replace

import pytest
import torch
from mlflow.tracking import MlflowClient

from lit_opd import estimators, load_config
from lit_opd.cli import main
from lit_opd.config import TeacherConfig
from lit_opd.errors import LintWarning, UserError
from lit_opd.lab.measure import experiment, measure
from lit_opd.lab.measure.choice import chosen_estimators
from lit_opd.lab.measure.moments import UNKNOWN, compare, inner_product
from lit_opd.lab.measure.show import print_measurement, record
from lit_opd.lab.measure.units import unit_gradient

SMALL = ("measure.units=12", "measure.prompts_per_unit=2", "rollout.num_completions=2", "data.train_size=60",
         "data.validation_size=8",
         "measure.estimators=[full_vocab,token,{name: hybrid, kwargs: {gamma: 0.5}}]")  # fmt: skip


@pytest.mark.slow
def test_the_command_prints_records_and_writes_its_numbers(workspace):
    done = workspace.run("measure", *workspace.arguments("measure", *SMALL, "--json", "new/found.json")[1:])
    assert done.returncode == 0, done.stderr
    found = json.loads((workspace.folder / "new/found.json").read_text(), parse_constant=pytest.fail)
    full, token, hybrid = found["estimators"]
    assert full["bias_sequence"] is None, "so few units cannot tell the target from zero"
    assert [full["label"], token["label"], hybrid["label"]] == ["full_vocab", "token", "hybrid gamma=0.5"]
    assert full["trace_variance"] < token["trace_variance"] < hybrid["trace_variance"]
    assert token["trace_variance_low"] < token["trace_variance"] < token["trace_variance_high"]
    assert all(row["seconds"] > 0 and row["memory_mb"] > 0 and 0 < row["top_share"] < 1 for row in found["estimators"])
    assert (found["units"], found["prompts_per_unit"], found["completions"]) == (12, 2, 2)
    assert "hybrid gamma=0.5" in done.stdout
    client = MlflowClient(workspace.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "tests"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.metrics["measure/token/signal_to_noise"] == pytest.approx(token["signal_to_noise"])
    assert {"measure.png", "measure.json", "measure_table.json"} <= {
        f.path for f in client.list_artifacts(run.info.run_id)
    }


def configured(workspace, *words):
    _, *arguments = workspace.arguments("measure", *words)
    files = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--config"]
    return load_config(files, [word for word in arguments if "=" in word])  # the last of a key counts


@pytest.mark.slow
def test_the_same_seed_finds_the_same(workspace):
    config = configured(workspace, *SMALL)
    first, second = (measure(config).as_json()["estimators"] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name, value in one.items():
            if name not in ("seconds", "memory_mb"):
                assert other[name] == value


@pytest.fixture
def interrupt_at(monkeypatch):
    """Presses Ctrl-C at the n-th gradient that is taken, in the middle of a unit."""

    def at(call):
        taken = []

        def interrupted(*arguments):
            taken.append(None)
            if len(taken) == call:
                os.kill(os.getpid(), signal.SIGINT)
            return unit_gradient(*arguments)

        monkeypatch.setattr(experiment, "unit_gradient", interrupted)

    return at


# Four gradients a unit, of three estimators and one target more, and of the first unit four again for the memory.
def test_ctrl_c_leaves_what_whole_units_tell_and_a_run_marked_killed(workspace, interrupt_at, capsys):
    whole = measure(configured(workspace, *SMALL, "measure.units=5")).as_json()
    interrupt_at(4 * 6 + 2)
    assert main(workspace.arguments("measure", *SMALL, "--json", "part.json")) == 130
    part = json.loads((workspace.folder / "part.json").read_text())
    assert (part["units"], part["units_asked"]) == (5, 12)
    for one, other in zip(part["estimators"], whole["estimators"], strict=True):
        assert one["trace_variance"] == other["trace_variance"]
    assert "Interrupted: 5 of 12 units were measured." in capsys.readouterr().out
    (run,) = workspace.runs
    assert run.info.status == "KILLED"
    assert "measure/token/trace_variance" in run.data.metrics


def test_ctrl_c_before_there_are_units_enough_leaves_nothing(workspace, interrupt_at):
    interrupt_at(4 * 4 + 1)
    assert main(workspace.arguments("measure", *SMALL)) == 130
    assert workspace.runs == []


def test_a_chosen_estimator_that_is_a_target_is_looked_at_once_and_held_against_itself(workspace, monkeypatch):
    looked_at, equal = [], []

    def spy(distiller, *rest):
        estimator = distiller.estimator
        looked_at.append((estimator.spec.name, estimator.keywords.get("divergence")))
        return unit_gradient(distiller, *rest)

    def spy_on_pairs(own_nP, target_nP):
        equal.append(torch.equal(own_nP, target_nP))
        return compare(own_nP, target_nP)

    monkeypatch.setattr(experiment, "unit_gradient", spy)
    monkeypatch.setattr(experiment, "compare", spy_on_pairs)
    chosen = "measure.estimators=[{name: full_vocab, kwargs: {divergence: jsd}}, {name: full_vocab, label: whole}]"
    jsd, whole = measure(configured(workspace, *SMALL, chosen, "measure.units=4")).rows
    # Each of four units, and the first once more for the memory.
    assert Counter(looked_at) == {
        ("full_vocab", "reverse_kl"): 5, ("full_vocab", "jsd"): 5, ("exact_local_return", None): 5,
    }  # fmt: skip
    assert [jsd.label, whole.label] == ["full_vocab divergence=jsd", "whole"]
    assert equal == [False, False, True, False], "of each row, against the local and the sequence's target"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("measure.estimators=[3]",), "measure.estimators: expected names, or mappings with `name`, found 3."),
        (("measure.estimators=[{name: token, kwarg: {}}]",), "measure.estimators.kwarg: expected a known key"),
        (
            ("measure.estimators=[tokn]",),
            "measure.estimators: expected a registered estimator or file.py:function, found",
        ),
        (("measure.estimators=[{name: tokn}]",), "found 'tokn'. Did you mean 'token'?"),
        (
            ("measure.estimators=[{name: teacher_topk, kwargs: {kk: 3}}]",),
            "measure.estimators.kwargs.kk: expected a keyword of teacher_topk, found an unknown one.",
        ),
        (("measure.estimators=[token,token]",), "expected labels that differ, found 'token' twice."),
        (("measure.estimators=[outcome]", "data.verifier=null"), "data.verifier: expected one: 'outcome' learns"),
        (("measure.estimators=[leave_one_out]", "rollout.num_completions=1"), "rollout.num_completions: expected at"),
        (
            ("measure.estimators=[token, {name: teacher_topk, kwargs: {k: 999}}]",),
            "expected supports of at most the vocabulary",
        ),
        (("measure.parameters=nothing",), "measure.parameters: expected a pattern that trainable parameters match"),
        (("measure.prompts_per_unit=20", "measure.units=4"), "measure.units: expected at most the units of"),
        (("rollout.student_share=0.5",), "rollout.student_share: expected 1"),
        (("rollout.student_from=5",), "rollout.student_from: expected 0"),
        (("rollout.temperature=0",), "rollout.temperature: expected above 0 for 'token', which learns from what"),
    ],
)
def test_what_cannot_work_is_refused(workspace, words, message):
    config = configured(workspace, *SMALL, "measure.estimators=[token]", "evaluation.pass_at=[1]", *words)
    with pytest.raises(UserError) as caught:
        measure(config)
    assert message in str(caught.value)


PAIR = "measure.estimators=[full_vocab,token]"


@pytest.fixture
def looked_at(monkeypatch):
    """What is known of the student at every gradient that is taken, and which estimator took it."""
    seen = []

    def spy(distiller, parameters, rollout):
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        seen.append((distiller.estimator.spec.name, {p.dtype for p in parameters}, autocast))
        return unit_gradient(distiller, parameters, rollout)

    monkeypatch.setattr(experiment, "unit_gradient", spy)
    return seen


@pytest.mark.parametrize("word", ["top_p=0.9", "top_k=4", "min_p=0.1", "temperature=0.7", "min_new_tokens=2"])
def test_under_another_law_the_sequences_target_is_not_known(workspace, looked_at, capsys, monkeypatch, word):
    equal = []
    monkeypatch.setattr(experiment, "compare", lambda own, target: equal.append(own.equal(target)) or UNKNOWN)
    found = measure(configured(workspace, *SMALL, PAIR, "measure.units=4", f"rollout.{word}"))
    assert {name for name, *_ in looked_at} == {"full_vocab", "token"}
    assert not found.on_policy
    full, token = found.rows
    assert equal == [True, False], "each row against the local target alone"
    assert all(math.isnan(value) for row in (full, token) for value in row.against["sequence"].squared_bias)
    assert all(math.isnan(value) for row in (full, token) for value in row.against["sequence"].cosine)
    written = found.as_json()
    assert (written["on_policy"], written["estimators"][0]["bias_sequence"]) == (False, None)
    print_measurement(found)
    assert "`local` is at the sampler's prefixes, and `sequence` is not known" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "told"), [(64, True), (10**9, False)])
def test_that_intervals_leave_out_a_sketchs_error_is_told_where_there_is_one(workspace, capsys, size, told):
    found = measure(configured(workspace, *SMALL, PAIR, "measure.units=4", f"measure.sketch={size}"))
    print_measurement(found)
    out = capsys.readouterr().out
    assert ("the sketch's own error is not in them" in out) == told
    assert found.on_policy
    assert "is not known" not in out


@pytest.mark.parametrize(
    ("precision", "weights", "autocast"),
    [
        ("32-true", torch.float32, None),
        ("bf16-mixed", torch.float32, torch.bfloat16),
        ("bf16-true", torch.bfloat16, None),
    ],
)
def test_gradients_are_taken_in_the_arithmetic_of_training(workspace, looked_at, precision, weights, autocast):
    found = measure(configured(workspace, *SMALL, PAIR, "measure.units=4", f"trainer.precision={precision}"))
    assert {(tuple(dtypes), inside) for _, dtypes, inside in looked_at} == {((weights,), autocast)}
    assert all(math.isfinite(row.trace_variance.mean) for row in found.rows)


def test_a_reference_and_rewards_are_there_for_who_asks(workspace):
    asking = "measure.estimators=[token,exopd,outcome]"
    rows = measure(configured(workspace, *SMALL, asking, "measure.units=4")).rows
    assert [row.label for row in rows] == ["token", "exopd", "outcome"]
    assert all(math.isfinite(row.trace_variance.mean) for row in rows)


def test_greedy_sampling_leaves_those_that_do_not_learn_from_samples(workspace):
    greedy = chosen_estimators(configured(workspace, "rollout.temperature=0"))
    whole = chosen_estimators(configured(workspace))
    assert {label for label, e in whole.items() if not any(t.estimator.spec.on_policy for t in e.terms)} == set(greedy)
    assert 0 < len(greedy) < len(whole)


def test_without_a_choice_all_that_the_configuration_allows_is_looked_at(workspace):
    alone = chosen_estimators(configured(workspace, "rollout.num_completions=1", "evaluation.pass_at=[1]"))
    together = chosen_estimators(configured(workspace))
    assert {"leave_one_out", "centred_rao_blackwell_return"} == set(together) - set(alone)


def test_noise_is_that_of_one_prompt_and_the_largest_tokens_are_one_in_a_hundred():
    """A unit is a mean over its prompts: the variance of one is as many times that of the unit."""
    generator = torch.Generator().manual_seed(0)
    gradients_nP = 1 + torch.randn(8, 5, generator=generator)
    seen = experiment._Seen([*gradients_nP], [torch.arange(1.0, 101.0)], [1.0, 3.0, 2.0])
    row = experiment._row("x", estimators.build("token"), seen, {"local": gradients_nP.double()}, prompts=4)
    assert row.trace_variance.mean == pytest.approx(4 * torch.cov(gradients_nP.T).trace().item(), rel=1e-5)
    signal = inner_product(gradients_nP.double(), gradients_nP.double()).value.item()
    assert row.signal_to_noise.mean == pytest.approx(signal / row.trace_variance.mean, rel=1e-5)
    assert row.top_share == pytest.approx(100 / 5050)
    assert row.seconds == 2.0


FEW = ("measure.units=4", "measure.prompts_per_unit=4", "rollout.max_new_tokens=8", "data.train_size=20",
       "data.validation_size=4", "measure.estimators=[full_vocab,token,teacher_topk]")  # fmt: skip


def with_teachers(workspace, route):
    """A configuration with two teachers, b of which is surer, and the route of every row."""
    file = workspace.folder / f"{abs(hash(route))}.py"
    file.write_text(f"def route(row):\n    return {route}\n")
    config = configured(workspace, *FEW)
    several = {"a": config.teacher, "b": replace(config.teacher, temperature=0.5)}
    data = replace(config.data, teacher_column=f"{file}:route")
    return replace(config, teacher=TeacherConfig(), teachers=several, data=data)


def numbers(measurement):
    timed = ("seconds", "memory_mb")
    return [{k: v for k, v in row.items() if k not in timed} for row in measurement.as_json()["estimators"]]


def test_rows_of_one_of_several_teachers_are_measured_as_with_that_teacher(workspace):
    config = with_teachers(workspace, "'b'")
    measured = measure(config)
    found = numbers(measured)
    assert found == numbers(measure(configured(workspace, *FEW, "teacher.temperature=0.5")))
    assert found != numbers(measure(configured(workspace, *FEW)))
    assert measured.models["teacher"] == "a: local, b: local"
    run = record(config, measured).rpartition("/")[2]
    assert MlflowClient(workspace.uri).get_run(run).data.tags["teacher"] == "a: local, b: local"


def test_a_schedule_is_measured_with_the_weights_that_training_begins_with(workspace):
    config = with_teachers(workspace, "{'a': 0.5, 'b': 0.5}")
    moving = replace(config, teachers_schedule={"a": [0, 1], "b": [1, 1]})
    assert numbers(measure(moving)) == numbers(measure(with_teachers(workspace, "'b'")))


def test_what_a_product_of_teachers_has_no_meaning_for_is_left_out_and_told(workspace):
    config = replace(with_teachers(workspace, "'b'"), teachers_combined="product")
    with pytest.raises(UserError, match="teachers_combined: expected an unbiased estimator"):
        chosen_estimators(config)
    config = replace(config, measure=replace(config.measure, estimators=[]))
    with pytest.warns(LintWarning, match=r"measure\.estimators: left out, .*: .*k3_loss"):
        chosen = chosen_estimators(config)
    assert "token" in chosen
    assert "k3_loss" not in chosen


def test_the_student_as_teacher_is_measured_as_its_own_folder_would_be(workspace):
    """With a hint, so that the two differ by the prompt alone."""
    config = configured(workspace, *FEW)
    hint = {"prompt": "{answer} {prompt}"}
    found = numbers(measure(replace(config, teacher=TeacherConfig(kind="student", **hint))))
    folder = TeacherConfig(path=config.student.path, dtype=config.student.dtype, **hint)
    for one, other in zip(found, numbers(measure(replace(config, teacher=folder))), strict=True):
        assert one["trace_variance"] == pytest.approx(other["trace_variance"], rel=1e-4)
        assert one["top_share"] == pytest.approx(other["top_share"], rel=1e-4)
        assert one["trace_variance"] > 0
