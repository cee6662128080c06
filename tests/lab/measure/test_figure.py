"""What the picture of a measurement shows, and says that it does not."""

import math

import pytest
from matplotlib.markers import CARETRIGHTBASE

from lit_opd.lab.measure.figure import _compose, draw
from lit_opd.lab.measure.moments import Moments
from lit_opd.lab.measure.result import Measurement, Row
from lit_opd.measures.intervals import Interval

UNKNOWN = Interval(math.nan, math.nan, math.nan)
BIAS = Interval(0.5, 0.25, 0.75)


def row(label, signal=(0.01, 0.005, 0.02), local=BIAS, sequence=BIAS):
    against = {key: Moments(bias, BIAS) for key, bias in (("local", local), ("sequence", sequence))}
    return Row(label, label, "token", None, against, BIAS, Interval(*signal), 0.1, 1.0, 1.0)


def compose(*rows, **keywords):
    return _compose(rows, **keywords)


def carets(axis):
    return [line for line in axis.lines if line.get_marker() == CARETRIGHTBASE]


def texts(figure):
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_what_cannot_be_drawn_is_named():
    figure = compose(row("seen"), row("mute", signal=(0.0, -0.01, 0.01)), row("too noisy", signal=(-0.1, -0.2, 0.1)))
    assert figure.get_supxlabel() == "not drawn, cannot be told from zero: mute, too noisy"
    assert legend(figure) == ["seen"]
    assert texts(figure) == []


def test_where_all_are_drawn_nothing_is_said():
    figure = compose(row("one"), row("two"))
    assert (figure.get_supxlabel(), legend(figure)) == ("", ["one", "two"])


def test_an_empty_panel_says_why():
    assert texts(compose(row("one", sequence=UNKNOWN), row("two", sequence=UNKNOWN))) == [
        "the sequence reverse KL's gradient\ncannot be told from zero: measure more units"
    ]
    figure = compose(row("one", signal=(0.0, -0.1, 0.1)))
    assert texts(figure) == ["no estimator's gradient\ncan be told from zero: measure more units"] * 2
    assert figure.get_supxlabel() == ""
    assert texts(compose(row("one", sequence=UNKNOWN), on_policy=False)) == [
        "the student's own law did not sample:\nthe sequence reverse KL's gradient is not known"
    ]


def test_noise_without_an_upper_end_is_an_arrow_and_with_one_a_cap():
    left, _ = compose(row("bounded", signal=(1e-7, 1e-8, 2e-7)), row("open end", signal=(0.01, -0.1, 0.02))).axes
    (caret,) = carets(left)
    assert caret.get_xdata()[0] == pytest.approx(3e8), "beyond all that has an end"
    ends = [x for line in left.lines for x in line.get_xdata()]
    assert max(x for x in ends if x != caret.get_xdata()[0]) == pytest.approx(1e8), "also past a million"


def test_no_two_of_many_look_alike():
    left, _ = compose(*(row(f"estimator {number}") for number in range(30))).axes
    lines = [container.lines[0] for container in left.containers]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == len(lines) == 30


def test_the_picture_is_written(tmp_path):
    rows = [row("one"), row("two", signal=(0.01, -0.1, 0.02)), row("three", signal=(0.0, -0.1, 0.1))]
    draw(Measurement(rows, 8, 8, 2, 2, 100, 10, 10, {}), tmp_path / "measure.png")
    assert (tmp_path / "measure.png").read_bytes().startswith(b"\x89PNG")
