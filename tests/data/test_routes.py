"""Which teacher a row is for, and every way to say it wrong."""

import pytest

from lit_opd.data.routes import read_routes
from lit_opd.errors import UserError

TEACHERS = ["a", "b"]


def test_names_and_weights_become_one_weight_a_teacher():
    rows = [{"t": "b"}, {"t": {"a": 0.25, "b": 0.75}}, {"t": {"a": 1, "b": None}}, {"t": {"b": 1.0}}]
    assert read_routes(rows, "t", TEACHERS) == [[0.0, 1.0], [0.25, 0.75], [1.0, 0.0], [0.0, 1.0]]
    assert read_routes(rows, None, []) is None


def test_a_function_of_the_row_chooses(tmp_path):
    (tmp_path / "routes.py").write_text("def route(row):\n    return {'a': row['x'], 'b': 1 - row['x']}\n")
    assert read_routes([{"x": 0.5}, {"x": 1}], f"{tmp_path}/routes.py:route", TEACHERS) == [[0.5, 0.5], [1.0, 0.0]]
    with pytest.raises(UserError, match=r"data\.teacher_column: expected .*route to run, found KeyError: 'x'"):
        read_routes([{"y": 1}], f"{tmp_path}/routes.py:route", TEACHERS)


@pytest.mark.parametrize(("value", "message"), [
    ("c", r"one of the teachers a, b, found 'c' in row 1"),
    ({"a": 0.5, "d": 0.5}, r"one of the teachers a, b, found 'd' in row 1"),
    (None, r"the name of a teacher, or a mapping of names to weights, found None in row 1"),
    (3, r"the name of a teacher, or a mapping .*, found 3 in row 1"),
    ({"a": -0.5, "b": 1.5}, r"weights of at least 0, found a: -0\.5 in row 1"),
    ({"a": "x", "b": 1.0}, r"weights of at least 0, found a: 'x' in row 1"),
    ({"a": float("nan"), "b": 1.0}, r"weights of at least 0, found a: nan in row 1"),
    ({"a": 0.5, "b": 0.25}, r"weights that add up to 1, found 0\.75 in row 1"),
    ({}, r"weights that add up to 1, found 0 in row 1"),
])  # fmt: skip
def test_a_row_that_chooses_no_teacher_is_refused(value, message):
    with pytest.raises(UserError, match=rf"data\.teacher_column: expected {message}"):
        read_routes([{"t": "a"}, {"t": value}], "t", TEACHERS)


@pytest.mark.parametrize(("column", "teachers", "message"), [
    ("t", [], "null where there is one teacher, found 't'"),
    (None, TEACHERS, "a column or a function that names a row's teacher: a, b, found null"),
    ("u", TEACHERS, r"a column of the rows \(t\), found 'u'"),
])  # fmt: skip
def test_a_column_that_does_not_fit_is_refused(column, teachers, message):
    with pytest.raises(UserError, match=rf"data\.teacher_column: expected {message}"):
        read_routes([{"t": "a"}], column, teachers)
