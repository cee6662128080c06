"""Two processes make the weights that one makes."""

import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch

# What each scenario trains; prompts of uneven lengths, so that ranks differ in tokens and in micro-batches.
SCRIPT = """
import sys
import torch
import lightning as L
import wide_norm
from lightning.pytorch.loggers.logger import DummyLogger
from lit_opd import DistillationModule, PromptDataModule
from lit_opd.callbacks import StepDiagnostics, TeacherGradients

PROMPTS = ["1+2=", "7=", "12-9+3=", "5+5=", "80-1=", "4=", "3333+4444="]
SCENARIOS = {
    # Seven prompts on two ranks are four and three; the budget cuts the ranks into different numbers of micro-batches.
    "uneven": dict(estimator="full_vocab", batch=7, budget=30, aggregation="token_mean", updates=1),
    "mixed": dict(estimator="mix", batch=7, budget=30, aggregation="sequence_mean", updates=1,
                  kwargs={"terms": {"sequence": 0.5, "teacher_topk": {"weight": 1.0, "k": 4}}}),
    "whole": dict(estimator="token", batch=6, budget=10_000, aggregation="sequence_sum", updates=1),
    "updates": dict(estimator="hybrid", batch=7, budget=60, aggregation="token_mean", updates=2),
    # One rank has one row and two updates to take part in.
    "idle": dict(estimator="full_vocab", batch=3, budget=30, aggregation="token_mean", updates=2, completions=1),
    # Of each batch one row at most is for the second teacher, and one for both: a rank may have none of either.
    "routed": dict(estimator="teacher_topk", batch=3, budget=60, aggregation="token_mean", updates=1,
                   kwargs={"k": 4}, routes={"7=": "b", "4=": {"a": 0.25, "b": 0.75}}),
    # Completions of a prompt stay on one rank and in one micro-batch; one rank has one prompt for two updates.
    "groups": dict(estimator="leave_one_out", batch=3, budget=50, aggregation="token_mean", updates=2, completions=3),
}


class Kept(DummyLogger):
    diagnosed, pulled = None, ()

    def log_metrics(self, metrics, step=None):
        if "advantage/mean" in metrics:
            self.diagnosed = dict(metrics)
        if any("gradient_share" in name for name in metrics):
            self.pulled += (dict(metrics),)


def run(student, teacher, devices, name):
    s = SCENARIOS[name]
    several = {"teachers": {"a": {"path": teacher, "dtype": "float64"}, "b": {"path": student, "dtype": "float64"}}}
    teaching = several if "routes" in s else {"teacher": teacher}
    rows = [{"prompt": p, "teacher": s.get("routes", {}).get(p, "a")} for p in PROMPTS] if "routes" in s else PROMPTS
    module = DistillationModule(
        student, estimator=s["estimator"], **teaching, estimator_kwargs=s.get("kwargs"), aggregation=s["aggregation"],
        masked_tokens=["7"], rollout={"max_new_tokens": 6, "num_completions": s.get("completions", 2)},
        optim={"name": "SGD", "lr": 0.05, "clip_norm": 0.5, "micro_batch_tokens": s["budget"],
               "updates_per_rollout": s["updates"]},
        lint={"allow": ["stale_updates"]},
    )
    data = PromptDataModule(train_rows=rows, validation_rows=rows, batch_size=s["batch"],
                            teacher_column="teacher" if "routes" in s else None,
                            tokenizer=module.tokenizer, verifier=lambda text, row: float(len(text) > 3))
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=Kept(),
        callbacks=[StepDiagnostics(every_n_steps=1), *([TeacherGradients(every_n_steps=1)] if "routes" in s else [])],
        precision="64-true", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    logged = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("perf/")}
    return {"weights": module.model.state_dict(), "logged": logged, "results": module.results["val"],
            "per_prompt": tuple(module.evaluation.per_prompt), "diagnosed": trainer.logger.diagnosed,
            "pulled": trainer.logger.pulled}


if __name__ == "__main__":
    student, teacher, out = sys.argv[1:]
    results = {name: run(student, teacher, 2, name) for name in SCENARIOS}
    torch.save(results, f"{out}.{torch.distributed.get_rank()}")
"""


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory, make_model, save_model, warm_python):
    """Results of every scenario with one process and with two (of either rank)."""
    folder = tmp_path_factory.mktemp("distributed")
    script, out = folder / "script.py", folder / "out"
    script.write_text(SCRIPT)
    paths = [save_model(make_model(seed, hidden_size=8, intermediate_size=8)) for seed in (1, 2)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [warm_python, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}",
               str(script), *paths, str(out)]  # fmt: skip
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),  # these tests, and this package
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    namespace = {"__name__": "scenarios"}
    exec(compile(SCRIPT, "scenarios", "exec"), namespace)  # noqa: S102
    one = {name: namespace["run"](*paths, 1, name) for name in namespace["SCENARIOS"]}
    return one, [torch.load(f"{out}.{rank}", weights_only=False) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uneven", "mixed", "whole", "updates", "idle", "routed", "groups"])
def test_two_processes_give_the_weights_of_one(one_and_two, name):
    one, two = one_and_two
    for rank in two:
        for key, weight in one[name]["weights"].items():
            torch.testing.assert_close(rank[name]["weights"][key], weight, rtol=0, atol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["uneven", "mixed", "whole", "updates", "idle", "routed", "groups"])
def test_two_processes_log_the_numbers_of_one(one_and_two, name):
    """Also the yardsticks, whose states are summed over processes, and what is kept of every prompt, in order."""
    one, two = one_and_two
    for rank in two:
        assert rank[name]["logged"] == pytest.approx(one[name]["logged"], rel=1e-5, abs=1e-6)
        assert rank[name]["diagnosed"] == pytest.approx(one[name]["diagnosed"], rel=1e-5, abs=1e-6)
        for metric, interval in one[name]["results"].items():
            assert rank[name]["results"][metric] == pytest.approx(interval, rel=1e-6, abs=1e-8)
        numbers, *tables = one[name]["per_prompt"]
        assert rank[name]["per_prompt"][0] == numbers == list(range(7))
        for found, expected in zip(rank[name]["per_prompt"][1:], tables, strict=True):
            for metric, values in expected.items():
                assert found[metric] == pytest.approx(values, rel=1e-6, abs=1e-8)


@pytest.mark.slow
def test_two_processes_see_each_teachers_part_of_the_gradient_as_one_does(one_and_two):
    one, two = one_and_two
    expected = one["routed"]["pulled"]
    assert len(expected) == 4
    assert any("gradient_cosine/a/b" in step for step in expected)
    for rank in two:
        for found, step in zip(rank["routed"]["pulled"], expected, strict=True):
            assert found == pytest.approx(step, rel=1e-6, abs=1e-9)


@pytest.mark.slow
def test_a_process_without_rows_of_an_update_does_not_stop_the_others(one_and_two):
    _, two = one_and_two
    for key, weight in two[0]["idle"]["weights"].items():
        assert torch.equal(two[1]["idle"]["weights"][key], weight)
