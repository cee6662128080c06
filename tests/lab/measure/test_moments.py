"""Estimates of moments against sums written out, and their intervals against the exact oracle."""

import math

import pytest
import torch

from lit_opd import estimators
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, trajectory_gradients
from lit_opd.estimators.oracle import trace_variance as exact_trace_variance
from lit_opd.lab.measure.moments import ITSELF, UNKNOWN, compare, inner_product, trace_variance
from lit_opd.lab.measure.result import with_ends
from lit_opd.measures.intervals import Interval


def normal(units, coordinates, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + torch.randn(units, coordinates, generator=generator, dtype=torch.float64)


def without(values, unit):
    return torch.cat([values[:unit], values[unit + 1 :]])


def test_an_inner_product_is_the_mean_over_pairs_of_different_units():
    a, b = normal(6, 4, 0), normal(6, 4, 1)

    def written_out(a, b):
        pairs = [float(a[i] @ b[j]) for i in range(len(a)) for j in range(len(a)) if i != j]
        return sum(pairs) / len(pairs)

    found = inner_product(a, b)
    assert found.value.item() == pytest.approx(written_out(a, b), abs=1e-12)
    for unit in range(6):
        expected = written_out(without(a, unit), without(b, unit))
        assert found.without_n[unit].item() == pytest.approx(expected, abs=1e-12)


def test_a_trace_variance_is_the_trace_of_the_sample_covariance():
    a = normal(7, 3, 2)
    found = trace_variance(a)
    assert found.value.item() == pytest.approx(torch.cov(a.T).trace().item(), abs=1e-12)
    for unit in range(7):
        assert found.without_n[unit].item() == pytest.approx(torch.cov(without(a, unit).T).trace().item(), abs=1e-12)


def test_an_estimator_against_itself_has_no_bias_and_its_own_direction():
    a = normal(12, 5, 3, shift=2.0)
    found = compare(a, a)
    assert found.relative_bias == (0.0, 0.0, 0.0)
    assert found.cosine == pytest.approx((1.0, 1.0, 1.0))


def test_noise_is_not_counted_as_signal_or_as_bias():
    """Where naive norms of means would say 1 / n of the variance."""
    target = torch.ones(200, 50, dtype=torch.float64)
    found = compare(target + 5 * normal(200, 50, 4), target)
    assert found.squared_bias.low <= 0 <= found.squared_bias.high
    assert abs(found.squared_bias.mean) < 0.05 < 25 / 200


def test_against_a_target_that_is_all_noise_nothing_is_said():
    found = compare(normal(20, 30, 5), normal(20, 30, 6))
    assert all(map(math.isnan, (*found.squared_bias, *found.cosine, *found.relative_bias)))


def test_a_target_itself_has_no_bias_however_little_is_known_of_it():
    noise = normal(20, 30, 5)
    assert compare(noise, noise.clone()) == ITSELF
    assert [with_ends(one) for one in (ITSELF.relative_bias, ITSELF.cosine, UNKNOWN.cosine)] == ["0.00", "1.00", "?"]
    assert with_ends(Interval(0.5, 0.25, 0.75)) == "0.50 [0.25, 0.75]"


def test_a_direction_that_cannot_be_told_has_no_cosine_but_a_bias():
    found = compare(normal(20, 30, 5), 1 + 0.1 * normal(20, 30, 6))
    assert all(map(math.isnan, found.cosine))
    assert found.relative_bias.low < 1 < found.relative_bias.high


def test_too_few_units_are_refused():
    with pytest.raises(ValueError, match="at least 4 units, found 3"):
        compare(normal(3, 2, 0), normal(3, 2, 1))


REPETITIONS, UNITS, COMPLETIONS = 200, 64, 16


@pytest.fixture(scope="module")
def truth():
    """Exact gradients of every completion of a tabular pair, and what is true of their expectations."""
    pair = TabularPair.random(3, 3, seed=2, scale=0.7)
    names = ("token", "sequence", "vopd", "k3_loss", "rao_blackwell_return")
    chosen = {name: estimators.build(name) for name in names}
    targets = {
        "local": (estimators.build("full_vocab", divergence="reverse_kl"), exact_gradient(pair, "reverse_kl")),
        "sequence": (estimators.build("rao_blackwell_return"), exact_gradient(pair, "sequence_reverse_kl")),
    }
    return pair, chosen, targets


@pytest.mark.slow
@pytest.mark.parametrize("name", ["token", "sequence", "vopd", "k3_loss", "rao_blackwell_return"])
def test_intervals_cover_the_truth(truth, name):
    """Of 200 repetitions at the 95 % level at least 93 % must, for every number that the microscope reports."""
    pair, chosen, targets = truth
    probs_S, own_SG = trajectory_gradients(pair, chosen[name])
    exact = expected_gradient(pair, chosen[name])
    variance = exact_trace_variance(pair, chosen[name]) / COMPLETIONS
    facts = {"variance": variance, "signal": float(exact @ exact) / variance}
    target_SG = {}
    for key, (estimator, gradient) in targets.items():
        target_SG[key] = trajectory_gradients(pair, estimator)[1]
        facts[f"bias {key}"] = float((exact - gradient).square().sum() / gradient.square().sum())
        facts[f"cosine {key}"] = float(exact @ gradient / (exact.norm() * gradient.norm()))
    covered = dict.fromkeys(facts, 0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(REPETITIONS):
        drawn = torch.multinomial(probs_S, UNITS * COMPLETIONS, replacement=True, generator=generator)
        drawn_nc = drawn.view(UNITS, COMPLETIONS)
        own_nG = own_SG[drawn_nc].mean(1)
        noise = trace_variance(own_nG)
        found = {"variance": noise.positive(), "signal": inner_product(own_nG, own_nG).map(torch.div, noise).positive()}
        for key, gradients_SG in target_SG.items():
            moments = compare(own_nG, gradients_SG[drawn_nc].mean(1))
            found |= {f"bias {key}": moments.squared_bias, f"cosine {key}": moments.cosine}
        for fact, interval in found.items():
            covered[fact] += interval.low - 1e-9 <= facts[fact] <= interval.high + 1e-9
    assert {fact: count for fact, count in covered.items() if count < 0.93 * REPETITIONS} == {}
