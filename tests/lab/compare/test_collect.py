"""Results from MLflow, against what was logged there; no training."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_opd.cli import main
from lit_opd.errors import UserError
from lit_opd.lab.compare.collect import collect, total_until
from lit_opd.lab.compare.runs import PARENT

PROMPTS = {"prompts": ["a", "b"], "sums": {"reverse_kl": [3.0, 5.0], "accuracy": [1.0, 0.0]},
           "weights": {"reverse_kl": [2.0, 4.0], "accuracy": [1.0, 0.0]}}  # fmt: skip


@pytest.fixture
def record(workspace):
    """Records a run: step -> (seconds, tokens a second), step -> yardstick."""

    def make(steps=None, curve=None, tags=None, params=None, prompts=PROMPTS, status="FINISHED"):
        client = workspace.client
        known = client.get_experiment_by_name("tests")
        experiment = known.experiment_id if known else client.create_experiment("tests")
        run_id = client.create_run(experiment, tags={"seed": "0"} | (tags or {})).info.run_id
        for name, value in (params or {}).items():
            client.log_param(run_id, name, value)
        for number, (step, (seconds, speed)) in enumerate((steps or {}).items()):
            client.log_metric(run_id, "perf/step_s", seconds, step=step, timestamp=number)
            client.log_metric(run_id, "perf/tokens_per_s", speed, step=step, timestamp=number)
            client.log_metric(run_id, "perf/peak_memory_mb", 100 - step, step=step, timestamp=number)
        for step, value in (curve or {}).items():
            client.log_metric(run_id, "val/reverse_kl", value, step=step)
        if prompts is not None:
            client.log_dict(run_id, prompts, "prompts.json")
        client.set_terminated(run_id, status)
        return run_id

    return make


def test_a_result_is_what_the_run_logged(workspace, record):
    steps = {1: (1.0, 10.0), 2: (0.5, 30.0), 3: (0.25, 40.0)}
    run_id = record(steps, {0: 2.0, 2: 1.0, 3: 0.5}, {"variant": "mine", "seed": "7"})
    (result,) = collect(workspace.client, [run_id])
    assert (result.variant, result.seed, result.status, result.run_id) == ("mine", 7, "FINISHED", run_id)
    assert result.prompts == ("a", "b")
    assert result.per_prompt["reverse_kl"] == [1.5, 1.25]
    assert result.per_prompt["accuracy"][0] == 1.0
    assert math.isnan(result.per_prompt["accuracy"][1]), "nothing was counted"
    points = [(p.step, p.tokens, p.seconds, p.value) for p in result.curves["reverse_kl"]]
    assert points == [(0, 0.0, 0.0, 2.0), (2, 25.0, 1.5, 1.0), (3, 35.0, 1.75, 0.5)]
    assert result.cost == {"steps": 3.0, "tokens": 35.0, "seconds": 1.75, "peak_memory_mb": 99.0}


def test_a_step_that_a_resumed_run_logged_again_counts_once_as_it_was_last(workspace, record):
    run_id = record({1: (1.0, 1.0), 2: (50.0, 1.0)}, {2: 9.0})
    workspace.client.log_metric(run_id, "perf/step_s", 2.0, step=2, timestamp=10)
    workspace.client.log_metric(run_id, "val/reverse_kl", 3.0, step=2, timestamp=10**13)
    (result,) = collect(workspace.client, [run_id])
    assert result.cost["seconds"] == 3.0
    assert [point.value for point in result.curves["reverse_kl"]] == [3.0]


def test_several_updates_a_rollout_do_not_count_the_rollout_several_times(workspace, record):
    run_id = record({2: (1.0, 10.0), 4: (3.0, 10.0)}, {4: 1.0}, params={"optim.updates_per_rollout": 2})
    (result,) = collect(workspace.client, [run_id])
    assert (result.cost["seconds"], result.cost["tokens"]) == (4.0, 40.0)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(0, 40))
def test_where_every_step_was_logged_the_total_is_the_sum(values, step):
    rates = dict(enumerate(values, start=1))
    beyond = max(0, step - len(values)) * values[-1]
    assert total_until(rates, step) == sum(values[:step]) + beyond


@given(st.integers(1, 7), st.integers(1, 60), st.integers(0, 80))
def test_where_every_nth_was_logged_a_steady_cost_is_counted_right(every, length, step):
    rates = dict.fromkeys(range(every, length + every, every), 3.0)
    assert total_until(rates, step) == 3.0 * step


def test_without_any_step_there_is_no_cost(workspace, record):
    assert total_until({}, 5) == 0
    (result,) = collect(workspace.client, [record(prompts=None, status="FAILED")])
    assert (result.status, result.prompts, result.per_prompt, result.curves) == ("FAILED", (), {}, {})
    assert result.cost == {"steps": 0.0, "tokens": 0.0, "seconds": 0.0}


def test_a_comparison_stands_for_its_runs_each_as_it_was_last(workspace, record):
    parent = record(prompts=None, status="RUNNING")
    lost = record(prompts=None, tags={PARENT: parent, "variant": "x"}, status="RUNNING")
    other = record(tags={PARENT: parent, "variant": "x", "seed": "1"})
    again = record(tags={PARENT: parent, "variant": "x"})
    record(tags={PARENT: "another", "variant": "x"})
    found = collect(workspace.client, [parent])
    assert {(r.variant, r.seed): r.run_id for r in found} == {("x", 0): again, ("x", 1): other}
    assert lost not in [r.run_id for r in found]


def test_a_run_without_a_label_is_named_after_its_estimator_and_its_keywords(workspace, record):
    params = {"estimator.name": "hybrid", "estimator.kwargs.gamma": 0.5}
    (result,) = collect(workspace.client, [record(params=params)])
    assert result.variant == "hybrid gamma=0.5"


def test_runs_that_cannot_be_compared_are_told(workspace, record):
    one, two = record(params={"estimator.name": "token"}), record(params={"estimator.name": "token"})
    with pytest.raises(UserError, match=rf"--from-runs: .*{one} and {two} are both 'token' with seed 0.*tag `variant`"):
        collect(workspace.client, [one, two])
    with pytest.raises(UserError, match="--from-runs: expected ids of MLflow runs, found '0123'"):
        collect(workspace.client, ["0123"])
    with pytest.raises(UserError, match=r"--from-runs: expected runs with the artifact prompts.json, found none"):
        collect(workspace.client, [record(prompts=None)])


def test_recorded_runs_are_reported_on_without_a_grid_and_nothing_else_is_written(workspace, record):
    ids = [record(tags={"variant": name}) for name in ("x", "y")]
    before = {run.info.run_id: run for run in workspace.runs}
    words = ["--from-runs", *ids, "output_dir=out", "--json", "numbers/all.json"]
    assert main(["compare", f"tracking.uri={workspace.uri}", *words]) == 0
    numbers = json.loads((workspace.folder / "numbers" / "all.json").read_text())
    assert numbers["variants"] == ["x", "y"]
    assert numbers == json.loads((workspace.folder / "out" / "report" / "report.json").read_text())
    assert sorted(path.name for path in (workspace.folder / "out").iterdir()) == ["report"]
    assert [run.info.run_id in before for run in workspace.runs] == [True, True]


def test_no_ids_at_all_start_no_run(workspace, write_comparison, capsys):
    file = write_comparison(workspace)
    assert main(["compare", "--config", str(file), "--from-runs", "output_dir=out"]) == 2
    assert capsys.readouterr().err == "error: --from-runs: expected ids of MLflow runs, found none. Name them.\n"
    assert workspace.runs == []
