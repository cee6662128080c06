"""Sums over what torch.profiler records: made by hand, nested at random against a count of ticks, and its own."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._C._profiler import RecordScope, _EventType
from torch.autograd import DeviceType

from lit_opd.perf import STEP, break_down, phase


def event(name, start, length, *children, scope=RecordScope.FUNCTION, tag=_EventType.TorchOp):
    """A node of the profiler's tree, in microseconds."""
    return SimpleNamespace(name=name, start_time_ns=start * 1000, duration_time_ns=length * 1000, tag=tag,
                           end_time_ns=(start + length) * 1000, children=children,
                           typed=(tag, SimpleNamespace(scope=scope)))  # fmt: skip


def ranged(name, start, length, *children):
    return event(name, start, length, *children, scope=RecordScope.USER_SCOPE)


def on_device(name, start, length, annotation=False):
    """One of the profiler's flat list, which holds what an accelerator did."""
    return SimpleNamespace(name=lambda: name, start_ns=lambda: start * 1000, duration_ns=lambda: length * 1000,
                           device_type=lambda: DeviceType.CUDA, is_user_annotation=lambda: annotation)  # fmt: skip


def recorded(roots, device=()):
    return SimpleNamespace(experimental_event_tree=lambda: list(roots), events=lambda: list(device))


@st.composite
def nested(draw, start=0, end=60, depth=3):
    """Nodes with whole ends, siblings side by side; every name is unique to its place."""
    nodes, at = [], start
    while depth and at < end and draw(st.booleans()):
        first = draw(st.integers(at, end - 1))
        last = draw(st.integers(first + 1, end))
        nodes.append(event(f"{first}-{last}-{depth}", first, last - first, *draw(nested(first, last, depth - 1))))
        at = last
    return nodes


def flat(nodes):
    return [each for node in nodes for each in (node, *flat(node.children))]


@given(nested(), st.randoms())
def test_own_times_are_what_no_inner_operator_covers(nodes, order):
    """Tick by tick: the innermost operator over a tick is the one of least depth number among those that cover it."""
    everyone = flat(nodes)
    expected = dict.fromkeys((node.name for node in everyone), 0)
    for tick in range(60):
        over = [node.name for node in everyone if node.start_time_ns <= tick * 1000 < node.end_time_ns]
        if over:
            expected[min(over, key=lambda name: int(name.rpartition("-")[2]))] += 1
    found = break_down(recorded(order.sample([*nodes, event(STEP, 0, 60)], len(nodes) + 1)), operators=len(everyone))
    assert {name: round(part.seconds * 1e6) for name, part in found.operators.items()} == expected


# Two steps of 100 and 300 microseconds with 50 between them.
ROOTS = [
    ranged("rollout", 0, 500),  # outside of any step
    ranged("step", 1150, 300,
        ranged("student", 1200, 200,
            ranged("Optimizer.step#AdamW.step", 1210, 190,
                ranged("head", 1210, 50, event("[memory]", 1220, 0, tag=_EventType.Allocation)),
                ranged("head", 1300, 10)))),
    ranged("step", 1000, 100,
        ranged("rollout", 1010, 30,
            event("aten::mm", 1015, 20, event("aten::empty", 1016, 5),
                  event("cudaLaunchKernel", 1022, 5, tag=_EventType.Kineto))),
        ranged("teacher", 1040, 20, ranged("head", 1050, 10))),
    event("aten::mm", 1300, 90),  # of another thread
    event("aten::mm", 1460, 500),  # after the last step
    event("aten::mm", 1110, 20),  # between the steps
]  # fmt: skip
DEVICE = [on_device("gemm", 1290, 80), on_device("gemm", 1120, 20), on_device("student", 1290, 80, annotation=True)]


@pytest.fixture
def results():
    return recorded(ROOTS, DEVICE)


def test_phases_are_exclusive_and_add_up_to_the_step(results):
    found = break_down(results)
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


def test_operators_are_ordered_by_their_own_time_inside_of_steps(results):
    found = break_down(results)
    assert list(found.operators) == ["aten::mm", "gemm", "aten::empty"]
    assert found.operators["aten::mm"].seconds == pytest.approx((15 + 90) / 2e6)
    assert found.operators["aten::mm"].calls == 1
    assert found.operators["gemm"].share == pytest.approx(80 / 400)
    assert list(break_down(results, operators=1).operators) == ["aten::mm"]


def test_one_step_has_nothing_between():
    assert break_down(recorded([ranged("step", 0, 10)])).between_s is None


def test_a_recording_has_the_sums_that_the_profiler_itself_has():
    layer = torch.nn.Linear(30, 40)
    optimizer = torch.optim.AdamW(layer.parameters())
    with torch.profiler.profile() as profiler:
        for _ in range(2):
            with phase(STEP), phase("student"):
                layer(torch.randn(20, 30)).exp().sum().backward()
                optimizer.step()
    found = break_down(profiler.profiler.kineto_results, operators=1000)
    theirs = {each.key: each for each in profiler.key_averages()}
    operators = {name: each for name, each in theirs.items() if not each.is_user_annotation}
    assert found.operators.keys() == operators.keys()
    for name, part in found.operators.items():
        assert part.calls * 2 >= operators[name].count  # theirs takes an operator that calls itself for one call
        assert part.seconds * 2e6 == pytest.approx(operators[name].self_cpu_time_total, rel=1e-3, abs=1)
    assert found.step_s * 2e6 == pytest.approx(theirs[STEP].cpu_time_total, rel=1e-6)
    assert found.phases["student"].seconds * 2e6 == pytest.approx(theirs["student"].cpu_time_total, rel=1e-6)
