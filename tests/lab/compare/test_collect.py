"""Results from MLflow, against what was logged there; no training."""

import json
import math

import pytest

from lit_opd.cli import main
from lit_opd.errors import UserError
from lit_opd.lab.compare.collect import collect
from lit_opd.lab.compare.digest import make_report
from lit_opd.lab.compare.runs import PARENT

PROMPTS = {"prompts": ["a", "b"], "sums": {"reverse_kl": [3.0, 5.0], "accuracy": [1.0, 0.0]},
           "weights": {"reverse_kl": [2.0, 4.0], "accuracy": [1.0, 0.0]}}  # fmt: skip
SPENT = {3: (35.0, 1.75)}


@pytest.fixture
def record(workspace):
    """Records a run: step -> (tokens, seconds) until then, step -> yardstick."""

    def make(spent=SPENT, curve=None, tags=None, params=None, prompts=PROMPTS, status="FINISHED"):
        client = workspace.client
        known = client.get_experiment_by_name("tests")
        experiment = known.experiment_id if known else client.create_experiment("tests")
        run_id = client.create_run(experiment, tags={"seed": "0"} | (tags or {})).info.run_id
        for name, value in (params or {}).items():
            client.log_param(run_id, name, value)
        for step, costs in (spent or {}).items():
            for name, value in zip(("cost/tokens", "cost/seconds"), costs, strict=True):
                client.log_metric(run_id, name, value, step=step)
        if status == "FINISHED" and spent:
            client.log_metric(run_id, "cost/peak_memory_mb", 99, step=max(spent))
        for step, value in (curve or {}).items():
            client.log_metric(run_id, "val/reverse_kl", value, step=step)
        if prompts is not None:
            client.log_dict(run_id, prompts, "prompts.json")
        client.set_terminated(run_id, status)
        return run_id

    return make


def test_a_result_is_what_the_run_logged(workspace, record):
    spent = {0: (0.0, 0.0), 2: (25.0, 1.5), 3: (35.0, 1.75)}
    run_id = record(spent, {0: 2.0, 2: 1.0, 3: 0.5}, {"variant": "mine", "seed": "7"})
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
    run_id = record({1: (1.0, 1.0), 2: (2.0, 50.0)}, {2: 9.0})
    workspace.client.log_metric(run_id, "cost/seconds", 3.0, step=2, timestamp=10**13)
    workspace.client.log_metric(run_id, "val/reverse_kl", 3.0, step=2, timestamp=10**13)
    (result,) = collect(workspace.client, [run_id])
    assert result.cost["seconds"] == 3.0
    assert [(point.seconds, point.value) for point in result.curves["reverse_kl"]] == [(3.0, 3.0)]


def test_of_a_run_cut_short_the_last_whole_evaluation_is_the_last_point(workspace, record):
    run_id = record({2: (25.0, 1.5)}, {2: 1.0, 3: 0.5}, status="KILLED")
    workspace.client.log_metric(run_id, "cost/tokens", 35.0, step=3)
    workspace.client.log_metric(run_id, "perf/step_s", 1.0, step=4)
    (result,) = collect(workspace.client, [run_id])
    assert [point.step for point in result.curves["reverse_kl"]] == [2]
    assert result.cost == {"steps": 4.0, "tokens": 25.0, "seconds": 1.5}


def test_a_run_that_failed_before_any_evaluation_has_spent_nothing(workspace, record):
    (result,) = collect(workspace.client, [record(None, prompts=None, status="FAILED")])
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


def test_seeds_of_one_variant_are_told_apart_by_what_they_learned_from(workspace, record):
    params = {"estimator.name": "token", "teacher.path": "good", "output_dir": "a", "tracking.uri": "x", "seed": 0}
    tags = {"dataset_sha256": "aa"}
    (result,) = collect(workspace.client, [record(params=params, tags=tags)])
    assert result.settings == {"estimator.name": "token", "teacher.path": "good", "dataset_sha256": "aa"}
    for other in ({"params": params | {"teacher.path": "bad"}, "tags": tags}, {"params": params, "tags": {}}):
        ids = [result.run_id, record(params=other["params"], tags=other["tags"] | {"seed": "1"})]
        key = "teacher.path" if other["tags"] else "dataset_sha256"
        with pytest.raises(UserError, match=f"runs: expected one {key} for all seeds of 'token'"):
            make_report(collect(workspace.client, ids))


def test_a_run_without_a_label_is_named_after_its_estimator_and_its_keywords(workspace, record):
    params = {"estimator.name": "hybrid", "estimator.kwargs.gamma": 0.5}
    (result,) = collect(workspace.client, [record(params=params)])
    assert result.variant == "hybrid gamma=0.5"


def test_a_label_from_mlflow_stays_between_the_backticks_of_a_report_and_on_its_line(workspace, record):
    (result,) = collect(workspace.client, [record(tags={"variant": "a` ![x](y)\n# b"})])
    assert result.variant == "a' ![x](y) # b"


def test_runs_that_cannot_be_compared_are_told(workspace, record):
    one, two = record(params={"estimator.name": "token"}), record(params={"estimator.name": "token"})
    with pytest.raises(UserError, match=rf"--from-runs: .*{one} and {two} are both 'token' with seed 0.*tag `variant`"):
        collect(workspace.client, [one, two])
    with pytest.raises(UserError, match="--from-runs: expected ids of MLflow runs, found '0123'"):
        collect(workspace.client, ["0123"])
    with pytest.raises(UserError, match=r"--from-runs: expected runs with the artifact prompts.json, found none"):
        collect(workspace.client, [record(prompts=None)])
    with pytest.raises(UserError, match=r"--from-runs: expected runs that logged cost/tokens and .*found neither in"):
        collect(workspace.client, [record(None)])


def test_recorded_runs_are_reported_on_without_a_grid_and_nothing_else_is_written(workspace, record, capsys):
    ids = [record(tags={"variant": name}) for name in ("x", "y")]
    before = {run.info.run_id: run for run in workspace.runs}
    words = ["--from-runs", *ids, "output_dir=out", "--json", "numbers/all.json"]
    common = ["compare", f"tracking.uri={workspace.uri}"]
    assert main([*common, *words[:-1], "."]) == 2
    assert "--json: expected a file, found '.', a folder" in capsys.readouterr().err
    assert main([*common, *words]) == 0
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
