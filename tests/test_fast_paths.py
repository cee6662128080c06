"""A fast path is taken only where it proves itself."""

import time

import pytest
import torch

from lit_opd.errors import UserError
from lit_opd.fast_paths import prove

CPU = torch.device("cpu")
ONES = torch.ones(4)


def plain():
    time.sleep(0.002)
    return [ONES * 2, ONES]


def same():
    return [ONES + ONES, ONES]


def slow():
    time.sleep(0.02)
    return same()


def other_gradient():
    return [ONES * 2, ONES * 1.1]


def nan():
    return [ONES * 2, ONES * torch.nan]


def broken():
    raise RuntimeError("no kernel image\nis available")


def judge(fast, **keywords):
    return prove("doubling", plain, fast, 1e-3, CPU, **keywords)


def test_what_computes_the_same_in_less_time_is_taken_and_says_its_numbers():
    verdict = judge(same)
    assert verdict.taken
    assert verdict.off == 0
    assert verdict.fast_s < verdict.plain_s
    assert "ms against" in str(verdict)


@pytest.mark.parametrize(("off", "taken"), [(0.9e-3, True), (1.1e-3, False)])
def test_the_bound_is_where_it_stands(off, taken):
    assert judge(lambda: [ONES * 2, ONES * (1 + off)]).taken == taken


FAULTS = {"slower": (slow, "ms against"), "off": (other_gradient, "off by 0.1"), "nan": (nan, "off by nan"),
          "fails": (broken, "on a probe, RuntimeError: no kernel image")}  # fmt: skip


@pytest.mark.parametrize(("fast", "reason"), FAULTS.values(), ids=FAULTS)
def test_what_differs_fails_or_is_slower_is_left(fast, reason):
    verdict = judge(fast)
    assert not verdict.taken
    assert reason in str(verdict)
    assert "\n" not in str(verdict)


@pytest.mark.parametrize("fast", [other_gradient, nan, broken])
def test_fast_has_no_way_back(fast):
    with pytest.raises(UserError, match="optim.paths.*doubling.*Set optim.paths=auto"):
        judge(fast, choice="fast")


def test_a_plain_path_that_cannot_run_the_probe_ends_no_run():
    verdict = prove("doubling", broken, same, 1e-3, CPU)
    assert str(verdict) == "doubling: the plain path (on a probe, RuntimeError: no kernel image)"


def test_fast_does_not_ask_for_the_time():
    assert judge(slow, choice="fast").taken


def test_under_deterministic_algorithms_seconds_do_not_decide():
    torch.use_deterministic_algorithms(True)
    try:
        assert judge(slow).taken
        assert not judge(other_gradient).taken
    finally:
        torch.use_deterministic_algorithms(False)


def test_plain_and_what_cannot_run_here_are_not_tried():
    assert judge(broken, choice="plain").reason == "optim.paths=plain"
    assert judge(broken, unfit="it needs CUDA").reason == "it needs CUDA"
    with pytest.raises(UserError, match="it needs CUDA"):
        judge(same, choice="fast", unfit="it needs CUDA")
