"""Weights of several teachers that move while training goes on."""

from types import SimpleNamespace

import pytest
import torch

from lit_opd.data import schedule as schedules
from lit_opd.data.schedule import check_run, read_schedule, scheduled
from lit_opd.errors import UserError

TEACHERS = ["a", "b", "c"]
MOVING = {"a": [1, 0], "b": [0, 1]}


def test_factors_move_in_a_straight_line_and_rows_keep_the_sum_1(make_batch):
    routes_BM = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    batch = make_batch(("7=", "5+5=", "1+2="))._replace(routes_BM=routes_BM)
    found = {p: scheduled(batch, read_schedule(MOVING, TEACHERS), p).routes_BM.tolist() for p in (0.0, 0.25, 1.0)}
    assert found[0.0] == [[1, 0, 0], [0.5, 0, 0.5], [0, 0, 1]]
    # 0.25 x 0.75 against 0.75 x 0.25, and 0.5 x 0.75 against 0.5 x 1.
    assert found[0.25][0] == [0.5, 0.5, 0.0]
    assert found[0.25][1] == pytest.approx([3 / 7, 0, 4 / 7])
    assert found[1.0] == [[0, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert batch.routes_BM is routes_BM
    assert scheduled(batch, read_schedule({}, TEACHERS), 0.5) is batch


@pytest.mark.parametrize(("given", "message"), [
    ({"d": [1, 0]}, "teachers_schedule: expected one of the teachers a, b, c, found 'd'"),
    ({"a": 1}, r"teachers_schedule\.a: expected \[FACTOR, FACTOR\], .* found 1\."),
    ({"a": [1, 0, 1]}, r"teachers_schedule\.a: expected \[FACTOR, FACTOR\], .* found \[1, 0, 1\]"),
    ({"a": [1, "x"]}, r"teachers_schedule\.a\[1\]: expected a value of type float, found 'x'"),
    ({"a": [-1, 1]}, r"teachers_schedule\.a\[0\]: expected a value at least 0, found -1"),
])  # fmt: skip
def test_a_schedule_that_cannot_be_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        read_schedule(given, TEACHERS)


def test_a_schedule_without_teachers_is_refused():
    with pytest.raises(UserError, match="teachers_schedule: expected several teachers, found 'a'"):
        read_schedule({"a": [1, 0]}, [])


@pytest.mark.parametrize(("routes", "message"), [
    ([[1.0, 0.0, 0.0]], "found 0 at its end for all those of {'prompt': '7='"),
    ([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], "found 0 before training for all those of {'prompt': '5"),
    ([[0.5, 0.5, 0.0], [0.25, 0.0, 0.75]], None),
])  # fmt: skip
def test_a_row_that_would_be_without_a_teacher_is_refused(routes, message, make_data):
    prompts = ("7=", "5+5=")[: len(routes)]
    rows = [{"prompt": p, "t": dict(zip(TEACHERS, r, strict=True))} for p, r in zip(prompts, routes, strict=True)]
    data = make_data(rows, teacher_column="t", teachers=TEACHERS)
    trainer = SimpleNamespace(datamodule=data, max_steps=3, max_epochs=None)
    if message is None:
        check_run(read_schedule(MOVING, TEACHERS), trainer, "fit")
        return
    with pytest.raises(UserError, match=f"{schedules.KEY}: expected a factor above 0 .* {message}"):
        check_run(read_schedule(MOVING, TEACHERS), trainer, "fit")


def test_a_schedule_needs_an_end(make_trainer):
    endless = make_trainer(-1, max_epochs=-1)
    with pytest.raises(UserError, match=r"trainer\.max_steps: expected a number of steps, over which teachers_sch"):
        check_run(read_schedule(MOVING, TEACHERS), endless, "fit")
    check_run(read_schedule(MOVING, TEACHERS), endless, "validate")
    check_run({}, endless, "fit")
