"""What the oracle gives an estimator to see, and how it samples: other samplers, pairs of completions, rewards."""

import math
from dataclasses import replace

import pytest
import torch
from references import log_ratio, made, score_function

from lit_opd.estimators import build
from lit_opd.estimators.oracle import (
    TabularPair,
    exact_gradient,
    samples,
    second_moment,
    trace_variance,
    trajectory_gradients,
    verify,
)
from lit_opd.types import Estimate


@pytest.fixture(params=[False, True], ids=["fixed-length", "with-stop-token"])
def pair(request):
    return TabularPair.random(3, 3, seed=5, stop=request.param)


def seen(pair, needs):
    """The batch that an estimator with these needs is given."""
    caught = []

    def spy(tokens):
        caught.append(tokens)
        return score_function(tokens)

    trajectory_gradients(pair, made(spy, needs, "sequence"))
    return caught[0]


def test_without_another_sampler_it_is_the_student(pair):
    alone, tempered = seen(pair, "token"), seen(pair.with_sampler(0.7), "token")
    assert torch.equal(alone.sampler_logps_BT, alone.student_logps_BT)
    assert not torch.equal(tempered.sampler_logps_BT, tempered.student_logps_BT)


def test_sampler_moves_local_targets_and_leaves_the_sequence_one(pair):
    tempered = pair.with_sampler(0.7)
    for target in ("sequence_reverse_kl", "outcome"):
        assert torch.equal(exact_gradient(pair, target), exact_gradient(tempered, target))
    assert (exact_gradient(pair, "reverse_kl") - exact_gradient(tempered, "reverse_kl")).norm() > 1e-2


def test_importance_weights_repair_what_another_sampler_spoils(pair):
    def weighted(tokens):
        ratio = (tokens.student_logps_BT.detach() - tokens.sampler_logps_BT).exp()
        return Estimate(ratio * score_function(tokens).loss_BT, log_ratio(tokens))

    tempered = pair.with_sampler(0.7)
    assert verify(made(weighted), tempered, "reverse_kl").is_unbiased
    assert verify(build("full_vocab"), tempered, "reverse_kl").is_unbiased  # its prefixes are the sampler's as well
    assert verify(made(score_function), tempered, "reverse_kl").relative_bias > 1e-2
    assert verify(made(score_function), pair, "reverse_kl").is_unbiased


def test_pairs_leave_what_is_not_coupled_as_it_is(pair):
    """Expectation and variance a completion are those of single completions, though all pairs of them are written."""
    alone, paired = made(score_function), made(score_function, "token+groups", "sequence")
    (probs_B, gradients_BG), (probs_S, gradients_SG) = (trajectory_gradients(pair, e) for e in (alone, paired))
    assert len(probs_S) == len(probs_B) ** 2
    assert probs_S.sum().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(probs_S @ gradients_SG, probs_B @ gradients_BG, rtol=0, atol=1e-13)
    assert trace_variance(pair, paired) == pytest.approx(trace_variance(pair, alone), rel=1e-12)
    assert second_moment(pair, paired) < second_moment(pair, alone)  # of the mean of two


def test_larger_groups_leave_what_is_not_coupled_as_it_is(monkeypatch):
    pair, alone = TabularPair.random(3, 1, seed=5), made(score_function)
    monkeypatch.setattr(samples, "_GROUP", 3)
    three = made(score_function, "token+groups", "sequence")
    assert len(trajectory_gradients(pair, three)[0]) == 27
    assert trace_variance(pair, three) == pytest.approx(trace_variance(pair, alone), rel=1e-12)


def test_completions_of_a_pair_see_each_other_and_no_others():
    """A baseline from the other completion, by hand on one softmax: every pair, and both of its gradients."""
    pair = TabularPair.random(4, 1, seed=7)
    p, q = (logits[0].softmax(-1) for logits in (pair.student_logits_CV, pair.teacher_logits_CV))
    d, scores = (p / q).log(), torch.eye(4) - p

    def coupled(tokens):
        values_B = log_ratio(tokens)[:, 0]
        same_BB = tokens.groups_B[:, None] == tokens.groups_B
        others_B = (same_BB * values_B).sum(1) - values_B
        return Estimate((values_B - others_B)[:, None] * tokens.student_logps_BT, log_ratio(tokens))

    probs_S, gradients_SG = trajectory_gradients(pair, made(coupled, "token+groups", "sequence"))
    pairs = [(one, other) for one in range(4) for other in range(4)]
    by_hand = torch.stack([((d[a] - d[b]) * scores[a] + (d[b] - d[a]) * scores[b]) / 2 for a, b in pairs])
    torch.testing.assert_close(gradients_SG, by_hand, rtol=0, atol=1e-14)
    torch.testing.assert_close(probs_S, torch.stack([p[a] * p[b] for a, b in pairs]), rtol=0, atol=1e-15)


def test_only_what_is_needed_is_given(pair):
    tokens = seen(pair, "token")
    for name in ("kl_BT", "rewards_B", "groups_B", "reference_logps_BT", "student_entropy_BT", "teacher_entropy_BT"):
        assert getattr(tokens, name) is None, name
    assert tokens.student_full_logps_BTV is None
    assert tokens.support_ids_BTK is None


def test_kl_and_entropies_are_those_of_each_context(pair):
    tokens = seen(pair, "token+kl+entropy")
    contexts_BT = pair.completions()[2]
    for row, position in ((0, 0), (3, 1), (-1, 2)):
        context = contexts_BT[row, position]
        p, q = (logits[context].softmax(-1).tolist() for logits in (pair.student_logits_CV, pair.teacher_logits_CV))
        kl = sum(x * (math.log(x) - math.log(y)) for x, y in zip(p, q, strict=True))
        assert tokens.kl_BT[row, position] == pytest.approx(kl, abs=1e-14)
        for entropy_BT, law in ((tokens.student_entropy_BT, p), (tokens.teacher_entropy_BT, q)):
            assert entropy_BT[row, position] == pytest.approx(-sum(x * math.log(x) for x in law), abs=1e-14)
    assert not tokens.kl_BT.requires_grad
    assert not tokens.student_entropy_BT.requires_grad


def test_reference_is_a_third_model(pair):
    tokens, reference_CV = seen(pair, "token+reference"), pair.reference_logits_CV.log_softmax(-1)
    ids_BT, _, contexts_BT = pair.completions()
    assert torch.equal(tokens.reference_logps_BT, reference_CV[contexts_BT, ids_BT])
    for other in (pair.student_logits_CV, pair.teacher_logits_CV):
        assert (other.log_softmax(-1) - reference_CV).abs().max() > 0.1
    assert torch.equal(pair.with_equal_models().reference_logits_CV, pair.reference_logits_CV)


def test_reward_is_the_completions_own(pair):
    """Reward times the score function of the whole completion is the gradient of the expected reward (REINFORCE)."""

    def reinforce(tokens):
        return Estimate(-tokens.rewards_B[:, None] * tokens.student_logps_BT, tokens.teacher_logps_BT)

    def rewards_shifted(tokens):
        return reinforce(replace(tokens, rewards_B=tokens.rewards_B.roll(1)))

    assert torch.equal(seen(pair, "token+rewards").rewards_B, pair.rewards())
    assert verify(made(reinforce, "token+rewards", "sequence"), pair, "outcome").is_unbiased
    assert not verify(made(rewards_shifted, "token+rewards", "sequence"), pair, "outcome").is_unbiased
