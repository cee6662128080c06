"""The table of measures: whatever is logged has a row, and rows have an order."""

import pytest

from lit_opd.measures.table import MEASURES, YARDSTICKS, Measure, describe, in_order, look_up


def test_everything_that_a_run_logs_has_a_row(make_model, make_module, make_trainer, make_data):
    from lightning.pytorch.loggers.logger import DummyLogger

    from lit_opd.callbacks import StepDiagnostics, StepSpeed

    class Kept(DummyLogger):
        names = set()

        def log_metrics(self, metrics, step=None):
            self.names |= metrics.keys()

    logger = Kept()
    settings = {
        "optim": {"name": "AdamW", "lr": 1e-3, "clip_norm": 1.0},
        "evaluation": {"pass_at": [1, 2], "num_completions": 2},
    }
    module = make_module(make_model(1), make_model(2), "teacher_topk", estimator_kwargs={"k": 4}, **settings)
    trainer = make_trainer(
        3, callbacks=[StepDiagnostics(1), StepSpeed()], limit_val_batches=1.0, logger=logger, log_every_n_steps=1
    )
    trainer.fit(module, make_data())
    names = {name for name in logger.names if name != "epoch"}
    assert {"train/loss", "val/pass_at_2", "val_interval/jsd_low", "gradient/noise_scale", "cost/tokens"} <= names
    assert [name for name in sorted(names) if look_up(name) is None] == []
    untold = MEASURES.keys() - names - {name.partition("/")[2].removesuffix("_q1") for name in names}
    assert untold <= {"cost/median_step_s", "cost/median_tokens_per_s", "cost/peak_memory_mb", "train/clipped_frac",
                      "train/aligned_frac",
                      "stop/log_ratio", "verifier_error_frac", "rollout/verifier_error_frac",
                      *(name for name in MEASURES if name.startswith("train_position/"))}  # fmt: skip


def test_the_words_of_a_name_say_which_part_it_is():
    assert describe("val/reverse_kl") == MEASURES["reverse_kl"]
    assert describe("val_interval/jsd_high").title == "Jensen-Shannon divergence, upper end of its interval"
    assert describe("train_position/student_nll_q4").title.endswith("likelihood, quarter 4 of the positions")
    assert describe("teacher/pass_at_8").axis == "pass@8 (share of prompts)"
    assert describe("my_own") == Measure("my own", "", None)
    assert [describe(name).label for name in ("jsd", "length")] == ["JSD", "length"]


@pytest.mark.parametrize("name", YARDSTICKS)
def test_yardsticks_are_values_of_tokens(name):
    assert MEASURES[name].of == "token"


def test_what_has_a_direction_comes_first_in_the_order_of_the_table():
    names = ["zeta", "length", "pass_at_4", "accuracy", "student_entropy", "reverse_kl"]
    assert in_order([*names, *names]) == ["reverse_kl", "accuracy", "pass_at_4", "student_entropy", "length", "zeta"]
