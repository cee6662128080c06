"""The map of estimators on a Markov chain, against enumeration of every completion."""

import math
from pathlib import Path

import pytest
import torch

from lit_opd.estimators import build
from lit_opd.estimators.oracle import Completions, sample_gradients

FOLDER = Path(__file__).parents[2] / "tools" / "theory"


@pytest.fixture(scope="module")
def markov():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import markov

        yield markov


@pytest.fixture(scope="module")
def everything(markov):
    """A chain of 3 tokens and 3 positions, all its completions and their probabilities."""
    pair = markov.make_chain(markov.Settings(vocabulary=3, horizon=3, seed=4))
    ids_BT = torch.cartesian_prod(*[torch.arange(3)] * 3)
    contexts_BT = torch.cat([torch.zeros(27, 1, dtype=torch.long), ids_BT[:, :-1] + 1], dim=1)
    rows = Completions(ids_BT, torch.ones(27, 3, dtype=torch.bool), contexts_BT, torch.zeros(27, dtype=torch.float64))
    probs_B = pair.student_logits_CV.log_softmax(-1)[contexts_BT, ids_BT].sum(1).exp()
    return pair, rows, probs_B


def test_exact_gradients_are_those_of_all_completions(markov, everything):
    pair, rows, probs_B = everything
    exact = markov.exact_gradients(pair)
    for target, name in {"reverse_kl": "full_vocab", "sequence_reverse_kl": "sequence"}.items():
        gradients_BG = sample_gradients(pair, build(name), rows, torch.arange(27)[:, None])
        torch.testing.assert_close(probs_B @ gradients_BG, exact[target], rtol=0, atol=1e-14)
    assert (exact["reverse_kl"] - exact["sequence_reverse_kl"]).norm() > 1e-3


def test_samples_follow_the_chain(markov, everything):
    pair, _, probs_B = everything
    completions = markov.sample(pair, 20_000, torch.Generator().manual_seed(0))
    numbers = completions.ids_BT @ torch.tensor([9, 3, 1])
    found = torch.bincount(numbers, minlength=27) / 20_000
    assert ((found - probs_B).abs() < 4 * (probs_B / 20_000).sqrt() + 1e-4).all()
    assert torch.equal(completions.contexts_BT[:, 1:], completions.ids_BT[:, :-1] + 1)


def test_variance_is_counted_per_completion(markov, everything):
    """An estimator that compares nothing has the same variance however completions are grouped."""
    pair, rows, probs_B = everything
    gradients_BG = sample_gradients(pair, build("token"), rows, torch.arange(27)[:, None])
    exact = float(probs_B @ (gradients_BG - probs_B @ gradients_BG).square().sum(1))
    settings = {"vocabulary": 3, "horizon": 3, "seed": 4}
    for group in (1, 4):
        found = markov.measure_one(markov.Settings(**settings, group=group, groups=8000 // group), "token")
        assert found["trace_variance"] == pytest.approx(exact, rel=0.05)
        assert found["standard_error_reverse_kl"] == pytest.approx(
            math.sqrt(found["trace_variance"] / 8000) / float(markov.exact_gradients(pair)["reverse_kl"].norm())
        )


def test_bias_has_the_sampling_error_taken_off(markov):
    settings = markov.Settings(vocabulary=10, horizon=6, group=4, groups=250)
    unbiased = markov.measure_one(settings, "full_vocab")
    assert unbiased["bias_reverse_kl"] < 2 * unbiased["standard_error_reverse_kl"]
    assert markov.measure_one(settings, "k3_loss")["bias_reverse_kl"] > 0.1
