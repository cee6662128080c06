"""Estimators with a reference model, against loops over plain numbers and against exact gradients."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import PAIRS

from lit_opd import estimators
from lit_opd.errors import UserError
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient
from lit_opd.types import TokenBatch

TIGHT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]


def gradients_to_teacher_and_reference(pair):
    """Exact gradients of the local reverse KL to the teacher, and to the reference in its place."""
    to_reference = replace(pair, teacher_logits_CV=pair.reference_logits_CV)
    return exact_gradient(pair, "reverse_kl"), exact_gradient(to_reference, "reverse_kl")


@pytest.mark.parametrize("extrapolation", [0.0, 0.5, 1.0, 1.25, 3.0])
def test_exopd_follows_the_teacher_more_than_once_and_the_reference_less_than_not_at_all(pair, extrapolation):
    teacher, reference = gradients_to_teacher_and_reference(pair)
    found = expected_gradient(pair, estimators.build("exopd", extrapolation=extrapolation))
    torch.testing.assert_close(found, extrapolation * teacher + (1 - extrapolation) * reference, **TIGHT)


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_stable_opd_is_the_sum_of_two_reverse_kls(pair, weight):
    teacher, reference = gradients_to_teacher_and_reference(pair)
    found = expected_gradient(pair, estimators.build("stable_opd", reference_weight=weight))
    torch.testing.assert_close(found, teacher + weight * reference, **TIGHT)


@pytest.mark.parametrize("extrapolation", [0.0, 0.5, 1.25, 2.0])
def test_the_optimum_of_exopd_lies_on_the_line_from_reference_through_teacher(pair, extrapolation):
    """In log-probabilities; at 1.25 it is beyond the teacher."""
    reference_CV, teacher_CV = (x.log_softmax(-1) for x in (pair.reference_logits_CV, pair.teacher_logits_CV))
    optimum = replace(pair, student_logits_CV=reference_CV + extrapolation * (teacher_CV - reference_CV))
    estimator = estimators.build("exopd", extrapolation=extrapolation)
    assert expected_gradient(optimum, estimator).norm() < 1e-12
    assert expected_gradient(replace(pair, student_logits_CV=teacher_CV), estimator).norm() > 1e-2


def test_exopd_corrects_stale_samples_up_to_its_largest_ratio():
    pair = TabularPair.random(4, 3, seed=5, stop=True).with_sampler(0.7)
    teacher, reference = gradients_to_teacher_and_reference(pair)
    wanted = 1.25 * teacher - 0.25 * reference
    whole = expected_gradient(pair, estimators.build("exopd", max_ratio=1e6))
    torch.testing.assert_close(whole, wanted, **TIGHT)
    cut = expected_gradient(pair, estimators.build("exopd", max_ratio=1.0))
    assert (cut - wanted).norm() > 1e-2 * wanted.norm()


@given(seed=st.integers(0, 2**32 - 1), factor=st.floats(0, 3))
@settings(max_examples=40, deadline=None)
def test_the_credit_of_every_token_is_that_of_a_loop(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    p, q, mu, r = -3 * torch.rand(4, 3, 4, generator=generator, dtype=torch.float64)
    leaf = p.clone().requires_grad_()
    tokens = TokenBatch(leaf, q, mu, torch.ones(3, 4, dtype=torch.bool), reference_logps_BT=r)
    for name, keywords, credit in (
        ("exopd", {"extrapolation": factor, "max_ratio": 2.0},
         lambda p, q, mu, r: min(math.exp(p - mu), 2.0) * ((p - r) - factor * (q - r))),
        ("stable_opd", {"reference_weight": factor}, lambda p, q, mu, r: (p - q) + factor * (p - r)),
    ):  # fmt: skip
        estimate = estimators.build(name, **keywords)(tokens)
        (found,) = torch.autograd.grad(estimate.loss_BT.sum(), leaf)
        expected = [[credit(*numbers) for numbers in zip(*rows, strict=True)]
                    for rows in zip(*(x.tolist() for x in (p, q, mu, r)), strict=True)]  # fmt: skip
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), **TIGHT)
        torch.testing.assert_close(estimate.kl_BT, p - q, **TIGHT)


def test_the_reference_does_not_matter_where_it_has_no_weight():
    pair = PAIRS["fixed-length"]
    token = expected_gradient(pair, estimators.build("token"))
    for name, keywords in (("exopd", {"extrapolation": 1.0}), ("stable_opd", {"reference_weight": 0.0})):
        for seed in range(3):
            found = expected_gradient(replace(pair, seed=seed), estimators.build(name, **keywords))
            torch.testing.assert_close(found, token, **TIGHT)


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [("exopd", {"extrapolation": -0.1}, "extrapolation must be at least 0 and finite, found -0.1"),
     ("exopd", {"extrapolation": math.inf}, "extrapolation must be at least 0 and finite, found inf"),
     ("exopd", {"max_ratio": 0.5}, "max_ratio must be at least 1, found 0.5"),
     ("exopd", {"max_ratio": math.nan}, "max_ratio must be at least 1, found nan"),
     ("stable_opd", {"reference_weight": -1.0}, "reference_weight must be at least 0 and finite, found -1.0"),
     ("stable_opd", {"reference_weight": math.nan}, "reference_weight must be at least 0 and finite, found nan")],
)  # fmt: skip
def test_keywords_that_cannot_work_are_refused_before_any_model_loads(name, keywords, message):
    with pytest.raises(UserError, match=message):
        estimators.build(name, **keywords)
