"""Bias and variance from samples, against the exact ones."""

import pytest
import torch

from lit_opd.estimators import build
from lit_opd.estimators.oracle import TabularPair, expected_gradient, trace_variance, trajectory_gradients
from lit_opd.functional.tradeoff import gradient_sketch, squared_bias_and_variance

GAMMAS = (0.0, 0.5, 1.0)


def test_both_are_right_on_average():
    """The expectation over all ordered triples of completions, exactly, for several discounts."""
    pair = TabularPair.random(2, 2, seed=3)
    estimators = [build("hybrid", gamma=gamma) for gamma in GAMMAS]
    probs_S, _ = trajectory_gradients(pair, estimators[0])
    gradients_MSG = torch.stack([trajectory_gradients(pair, estimator)[1] for estimator in estimators])
    bias, variance = torch.zeros(2, 3, dtype=torch.float64)
    for triple in torch.cartesian_prod(*[torch.arange(len(probs_S))] * 3):
        found = squared_bias_and_variance(gradients_MSG[:, triple], unbiased=2)
        bias += probs_S[triple].prod() * found[0]
        variance += probs_S[triple].prod() * found[1]
    exact = [expected_gradient(pair, estimator) for estimator in estimators]
    expected_bias = torch.stack([(gradient - exact[2]).square().sum() for gradient in exact])
    expected_variance = torch.tensor([trace_variance(pair, e) / 3 for e in estimators], dtype=torch.float64)
    torch.testing.assert_close(bias, expected_bias, rtol=0, atol=1e-14)
    torch.testing.assert_close(variance, expected_variance, rtol=0, atol=1e-14)
    assert expected_bias[0] > 1e-4


def test_one_sample_says_nothing():
    with pytest.raises(ValueError, match="at least 2 samples, found 1"):
        squared_bias_and_variance(torch.ones(2, 1, 3), unbiased=0)


def test_sketches_keep_inner_products_on_average():
    """Against the head's true gradient by autograd, over many random projections."""
    generator = torch.Generator().manual_seed(0)
    hidden_NH = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    weight_VH = torch.randn(5, 4, generator=generator, dtype=torch.float64).requires_grad_()
    ids_N = torch.tensor([1, 4, 0])
    logps = (hidden_NH @ weight_VH.T).log_softmax(-1)
    true = [torch.autograd.grad(logps[n, ids_N[n]], weight_VH, retain_graph=True)[0] for n in range(3)]
    errors_NV = torch.eye(5, dtype=torch.float64)[ids_N] - logps.detach().exp()
    products = torch.zeros(3, 3, dtype=torch.float64)
    rounds, size = 4000, 4
    for _ in range(rounds):
        signs = [torch.randint(2, (n, size), generator=generator).double().mul(2).sub(1) / size**0.5 for n in (5, 4)]
        features = gradient_sketch(hidden_NH, errors_NV @ signs[0], signs[1])
        products += features @ features.T / rounds
    expected = torch.stack([torch.stack([(a * b).sum() for b in true]) for a in true])
    torch.testing.assert_close(products, expected, rtol=0, atol=0.1 * expected.diagonal().max())
