"""Sums over a trace: made by hand, and nested at random against a count of ticks."""

import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_opd.perf import Span, break_down, own_times, read_trace


@st.composite
def nested(draw, start=0, end=60, depth=3):
    """Spans with whole ends, properly nested, siblings side by side; every name is unique to its place."""
    spans, at = [], start
    while depth and at < end and draw(st.booleans()):
        first = draw(st.integers(at, end - 1))
        last = draw(st.integers(first + 1, end))
        spans.append(Span(f"{first}-{last}-{depth}", first, last))
        spans += draw(nested(start=first, end=last, depth=depth - 1))
        at = last
    return spans


@given(nested(), st.randoms())
def test_own_times_are_what_no_inner_span_covers(spans, order):
    """Tick by tick: the innermost span over a tick is the one of least depth number among those that cover it."""
    expected = dict.fromkeys(spans, 0)
    for tick in range(60):
        over = [span for span in spans if span.start <= tick < span.end]
        if over:
            expected[min(over, key=lambda span: int(span.name.rpartition("-")[2]))] += 1
    shuffled = order.sample(spans, len(spans))
    # Of spans with the same ends the trace does not say which is the outer one: their times are compared together.
    assert _by_ends((span, own) for span, _, own in own_times(shuffled)) == _by_ends(expected.items())


def _by_ends(times):
    found = {}
    for span, own in times:
        found[span.start, span.end] = found.get((span.start, span.end), 0) + own
    return found


def event(name, start, length, kind="user_annotation", thread=1):
    return {"ph": "X", "cat": kind, "name": name, "pid": 7, "tid": thread, "ts": start, "dur": length,
            "args": {"External id": 3}}  # fmt: skip


# Two steps of 100 and 300 microseconds with 50 between them.
EVENTS = [
    event("rollout", 0, 500),  # outside of any step
    event("step", 1000, 100),
    event("rollout", 1010, 30),
    event("aten::mm", 1015, 20, "cpu_op"),
    event("aten::empty", 1016, 5, "cpu_op"),
    event("teacher", 1040, 20),
    event("head", 1050, 10),
    event("step", 1150, 300),
    event("student", 1200, 200),
    event("Optimizer.step#AdamW.step", 1210, 100),
    event("head", 1210, 50),
    event("head", 1300, 10),
    event("aten::mm", 1300, 90, "cpu_op", thread=2),
    event("gemm", 1290, 80, "kernel", thread=3),
    event("aten::mm", 1460, 500, "cpu_op"),  # after the last step
    {"ph": "M", "name": "process_name", "ts": 0, "pid": 7, "tid": 0, "args": {"name": "python"}},
]


@pytest.fixture
def spans():
    return read_trace(io.StringIO(json.dumps({"deviceProperties": [{"id": 0}], "traceEvents": EVENTS})))


def test_phases_are_exclusive_and_add_up_to_the_step(spans):
    found = break_down(spans)
    assert (found.steps, found.step_s, found.between_s) == (2, pytest.approx(200e-6), pytest.approx(50e-6))
    own = {name: part.seconds * 2e6 for name, part in found.phases.items()}
    assert own == pytest.approx(
        {"rollout": 30, "teacher": 10, "teacher/head": 10, "student": 140, "student/head": 60, "other": 150}
    )
    assert list(own) == ["rollout", "teacher", "teacher/head", "student", "student/head", "other"]
    assert sum(part.share for part in found.phases.values()) == pytest.approx(1)
    assert {name: part.calls for name, part in found.phases.items()} == {
        "rollout": 0.5, "teacher": 0.5, "teacher/head": 0.5, "student": 0.5, "student/head": 1, "other": 1,
    }  # fmt: skip


def test_operators_are_ordered_by_their_own_time_inside_of_steps(spans):
    found = break_down(spans)
    assert list(found.operators) == ["aten::mm", "gemm", "aten::empty"]
    assert found.operators["aten::mm"].seconds == pytest.approx((15 + 90) / 2e6)
    assert found.operators["aten::mm"].calls == 1
    assert found.operators["gemm"].share == pytest.approx(80 / 400)
    assert list(break_down(spans, operators=1).operators) == ["aten::mm"]


def test_one_step_has_nothing_between():
    assert break_down([Span("step", 0, 10, "user_annotation")]).between_s is None
