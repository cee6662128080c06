"""Named mixtures, and what a mix refuses."""

import math

import pytest
import torch

from lit_opd import estimators
from lit_opd.errors import UserError
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, trace_variance

PAIR = TabularPair.random(5, 3, seed=11, stop=True)
TIGHT = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_minillm_is_the_length_normalised_return_and_the_exact_single_step(weight):
    expected = expected_gradient(PAIR, estimators.build("length_normalised"))
    expected = expected + weight * exact_gradient(PAIR, "reverse_kl")
    found = expected_gradient(PAIR, estimators.build("minillm", single_step_weight=weight))
    torch.testing.assert_close(found, expected, **TIGHT)


def test_minillm_is_that_mix():
    named, spelt = estimators.build("minillm"), estimators.build("mix", terms={"length_normalised": 1, "full_vocab": 1})
    assert [(t.weight, t.estimator.spec.name) for t in named.terms] == [(1.0, "length_normalised"), (1.0, "full_vocab")]
    torch.testing.assert_close(expected_gradient(PAIR, named), expected_gradient(PAIR, spelt), **TIGHT)
    assert named.needs == {"token", "full"}


def test_on_one_token_minillm_counts_the_single_step_twice():
    pair = TabularPair.random(5, 1, seed=3)
    found = expected_gradient(pair, estimators.build("minillm"))
    torch.testing.assert_close(found, 2 * exact_gradient(pair, "reverse_kl"), **TIGHT)


def test_the_exact_single_step_adds_no_noise_of_its_own_action():
    """Per unit of signal: on one token, half of the credit is exact."""
    pair = TabularPair.random(5, 1, seed=3)
    noisy = trace_variance(pair, estimators.build("mix", terms={"length_normalised": 2.0}))
    assert trace_variance(pair, estimators.build("minillm")) < 0.5 * noisy


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [("minillm", {"single_step_weight": -1.0}, "single_step_weight must be at least 0, found -1.0"),
     ("minillm", {"single_step_weight": math.nan}, "single_step_weight must be at least 0, found nan"),
     ("mix", {"terms": {}}, "terms must map estimator names to weights, found {}"),
     ("mix", {"terms": {"token": 1.0, "sequence": -1.0}}, "the weights of a mix must have a positive sum"),
     ("mix", {"terms": {"token": 1.0, "full_vocab": {"divergence": "forward_kl"}}},
      "term 'full_vocab' needs a number as its weight, found None"),
     ("mix", {"terms": {"token": True}}, "term 'token' needs a number as its weight, found True"),
     ("mix", {"terms": {"token": 1.0, "minillm": 1.0}}, "a mix cannot hold a mix, found 'minillm'")],
)  # fmt: skip
def test_keywords_that_cannot_work_are_refused_before_any_model_loads(name, keywords, message):
    with pytest.raises(UserError, match=message):
        estimators.build(name, **keywords)
