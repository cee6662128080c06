"""A user's own yardstick, from one file: averaged, drawn and ranked like the built-in ones."""

import math

import pytest

from lit_opd.errors import UserError
from lit_opd.measures import describe, register_measure
from lit_opd.measures.custom import load_measures

FILE = """
from lit_opd.measures import register_measure

@register_measure("total_variation", title="total variation", unit="probability", better="lower")
def total_variation(student_logps_cV, teacher_logps_cV, ids_c):
    return (student_logps_cV.exp() - teacher_logps_cV.exp()).abs().sum(-1) / 2

@register_measure("own_nll")
def own_nll(student_logps_cV, teacher_logps_cV, ids_c):
    return -teacher_logps_cV.gather(-1, ids_c[:, None])[:, 0]

@register_measure("summed_up")
def summed_up(student_logps_cV, teacher_logps_cV, ids_c):
    return student_logps_cV.sum()

def plain(student_logps_cV, teacher_logps_cV, ids_c):
    return ids_c
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_users_yardstick_goes_where_the_built_in_ones_go(file, make_model, make_module, make_trainer, make_data):
    names = [f"{file}:total_variation", f"{file}:own_nll"]
    module = make_module(make_model(1), make_model(2), evaluation={"measures": names, "num_completions": 2})
    trainer = make_trainer(limit_val_batches=1.0)
    trainer.validate(module, make_data(), verbose=False)
    found = module.results["val"]
    assert 0 < found["total_variation"].low < found["total_variation"].mean < 1
    assert found["own_nll"] == pytest.approx(found["teacher_nll"], rel=1e-5)
    for name in ("val/total_variation", "val_interval/total_variation_low", "position/total_variation_q1"):
        assert math.isfinite(trainer.callback_metrics[name])
    kept = module.evaluation.per_prompt
    assert len(kept.sums["total_variation"]) == len(kept.numbers) == 5
    assert describe("total_variation").axis == "total variation (probability)"
    with module.judging_teacher():
        trainer.validate(module, make_data(), verbose=False)
    assert module.results["teacher"]["total_variation"].mean == pytest.approx(0, abs=1e-6)


def test_a_function_that_gives_no_value_a_token_is_refused(file, make_model, make_module, make_trainer, make_data):
    module = make_module(make_model(1), make_model(2), evaluation={"measures": [f"{file}:summed_up"]})
    with pytest.raises(UserError, match=r"evaluation.measures: expected a tensor of shape \[\d+\] from 'summed_up'"):
        make_trainer(limit_val_batches=1.0).validate(module, make_data(), verbose=False)


def test_what_is_not_registered_or_not_there_is_refused(file):
    with pytest.raises(UserError, match=r"a registered measure.*register_measure\(NAME\)"):
        load_measures([f"{file}:plain"])
    with pytest.raises(UserError, match="evaluation.measures"):
        load_measures([f"{file}:nothing"])


def test_names_that_are_taken_and_directions_that_are_none_are_refused(file):
    load_measures([f"{file}:own_nll"])
    for name in ("reverse_kl", "train/loss", "my/own"):
        with pytest.raises(UserError, match="a new name"):
            register_measure(name)
    with pytest.raises(UserError, match="another file has registered"):
        register_measure("own_nll")(lambda student, teacher, ids: ids)
    with pytest.raises(UserError, match="better"):
        register_measure("upwards", better="up")
