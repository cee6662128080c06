"""The diagnosis agrees with the oracle, and finds each way to fail in an estimator built to fail that way."""

import pytest
import torch

from lit_opd.estimators import build
from lit_opd.estimators.contract import BoundEstimator, EstimatorSpec
from lit_opd.estimators.needs import read_needs
from lit_opd.estimators.oracle import TARGETS, TabularPair, expected_gradient, pair_for, trace_variance, verify
from lit_opd.functional.returns import leave_one_out_mean, return_to_go
from lit_opd.types import Estimate

FLAGS = ("dead", "silent", "action_independent", "ignores_teacher", "whitened")


def log_ratio(tokens):
    return (tokens.student_logps_BT - tokens.teacher_logps_BT).detach()


def score(tokens, advantage):
    return Estimate(advantage * tokens.student_logps_BT, log_ratio(tokens))


def log_ratio_as_loss(tokens):
    return Estimate(tokens.student_logps_BT - tokens.teacher_logps_BT, log_ratio(tokens))


def kl_as_reward(tokens):
    return score(tokens, tokens.kl_BT)


def siblings_return(tokens):
    """Credit of the other completion only: not constant, but independent of the sampled token all the same."""
    return score(tokens, leave_one_out_mean(torch.where(tokens.mask_BT, log_ratio(tokens), 0.0), tokens.groups_B))


def reward_only(tokens):
    return score(tokens, -tokens.rewards_B[:, None])


def no_gradient(tokens):
    return score(tokens, torch.zeros_like(tokens.student_logps_BT))


def clipped(tokens):
    return score(tokens, log_ratio(tokens).clamp(-0.5, 0.5))


def _whiten(values, mask):
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(mask, values, 0.0).sum(-1, keepdim=True) / count
    deviation = (torch.where(mask, values - mean, 0.0).square().sum(-1, keepdim=True) / count).sqrt()
    return torch.where(mask, values - mean, 0.0) / (deviation + 1e-8)


def whitened_over_a_completion(tokens):
    return score(tokens, _whiten(log_ratio(tokens), tokens.mask_BT))


def whitened_excess(tokens):
    return score(tokens, _whiten(log_ratio(tokens) - tokens.kl_BT, tokens.mask_BT))


def whitened_over_a_group(tokens):
    sums_B = torch.where(tokens.mask_BT, log_ratio(tokens), 0.0).sum(1)
    _, group_B, sizes_G = tokens.groups_B.unique(return_inverse=True, return_counts=True)

    def mean(values_B):
        return (torch.zeros(len(sizes_G)).double().index_add(0, group_B, values_B) / sizes_G)[group_B]

    centred_B = sums_B - mean(sums_B)
    return score(tokens, (centred_B / (mean(centred_B.square()).sqrt() + 1e-8))[:, None])


def undiscounted(tokens):
    return score(tokens, return_to_go(torch.where(tokens.mask_BT, log_ratio(tokens), 0.0), 1.0))


def made(fn, needs="token", family="sequence"):
    return BoundEstimator(EstimatorSpec(fn.__name__, fn, family=family, needs=read_needs("needs", needs)), {})


CASES = [
    (made(log_ratio_as_loss), {"dead", "action_independent", "ignores_teacher"}),
    (made(log_ratio_as_loss, "token+groups"), {"dead", "action_independent", "ignores_teacher"}),
    (made(kl_as_reward, "token+kl"), {"dead", "action_independent"}),
    (made(siblings_return, "token+groups"), {"dead"}),
    (made(reward_only, "token+rewards"), {"ignores_teacher"}),
    (made(no_gradient), {"silent", "ignores_teacher"}),
    (made(whitened_over_a_completion), {"whitened"}),
    (made(whitened_excess, "token+kl"), {"whitened"}),
    (made(whitened_over_a_group, "token+groups"), {"whitened"}),
    (made(clipped), set()),
    (made(undiscounted), set()),
    (build("token"), set()),
    (build("teacher_topk", k=2), set()),
    (build("full_vocab"), set()),
    (build("tvd"), set()),  # its gradient does not grow with the log-ratios, but every position is for itself
]


@pytest.mark.parametrize(("estimator", "flags"), CASES, ids=[estimator.spec.name for estimator, _ in CASES])
def test_flags(estimator, flags):
    found = verify(estimator)
    assert {name for name in FLAGS if getattr(found, name)} == flags


@pytest.mark.parametrize("name", ["token", "sequence", "k3_loss", "full_vocab", "teacher_topk"])
def test_numbers_are_the_oracles(name):
    estimator = build(name, **({"k": 2} if name == "teacher_topk" else {}))
    pair = TabularPair.random(4, 3, seed=21, stop=True)
    found = verify(estimator, pair)
    assert [c.target for c in found.comparisons] == [target for target in TARGETS if target != "outcome"]
    for comparison in found.comparisons:
        verdict = verify(estimator, pair, comparison.target)
        assert comparison.cosine == pytest.approx(verdict.cosine, abs=1e-12)
        assert comparison.relative_bias == pytest.approx(verdict.relative_bias, abs=1e-12)
        # The law of cosines: |a - b|^2 = |a|^2 + |b|^2 - 2 |a| |b| cos, over |b|^2.
        ratio = comparison.norm_ratio
        assert comparison.relative_bias**2 == pytest.approx(ratio**2 + 1 - 2 * ratio * comparison.cosine, abs=1e-9)
    assert found.norm_at_equal == pytest.approx(verdict.norm_at_equal, abs=1e-12)
    assert found.rms_at_equal == pytest.approx(verdict.rms_at_equal, abs=1e-12)
    assert found.relative_variance == trace_variance(pair, estimator) / trace_variance(pair, build("token"))
    assert found.expected_norm == pytest.approx(float(expected_gradient(pair, estimator).norm()))
    assert found.rms >= found.expected_norm


def test_nearest_objective_is_the_one_it_has():
    assert verify(build("token")).nearest.target == "reverse_kl"
    assert verify(build("sequence")).nearest.target == "sequence_reverse_kl"
    assert verify(build("full_vocab", divergence="jsd", teacher_weight=0.2)).nearest.relative_bias < 1e-12
    # With one position two objectives are the same: the first is as good as the other.
    nearest = verify(build("token"), TabularPair.random(4, 1, seed=1)).nearest
    assert (nearest.target, nearest.relative_bias < 1e-12) == ("sequence_reverse_kl", True)


def test_of_parallel_objectives_the_least_biased_is_nearest():
    """With two tokens and one position every gradient lies on one line."""
    pair = TabularPair.random(2, 1, seed=1)
    for name, target in (("k3_loss", "forward_kl"), ("tvd", "tvd"), ("full_vocab", "sequence_reverse_kl")):
        found = verify(build(name), pair)
        assert all(c.cosine == pytest.approx(1) for c in found.comparisons)
        assert found.nearest.target == target


def test_outcome_is_compared_where_rewards_are_read():
    found = verify(made(reward_only, "token+rewards"))
    assert found.nearest.target == "outcome"
    assert found.nearest.relative_bias < 1e-12


def test_direction_of_rounding_errors_is_not_reported():
    found = verify(made(log_ratio_as_loss))
    assert found.expected_norm == 0
    assert found.rms > 0.1
    assert all(c.cosine == 0 and c.norm_ratio == 0 and c.relative_bias == 1 for c in found.comparisons)


def test_what_learns_from_samples():
    assert verify(build("token")).learns_from_samples
    assert verify(build("supervised")).learns_from_samples  # from those of demonstrations
    assert not verify(build("full_vocab")).learns_from_samples
    assert not verify(build("teacher_topk", k=2)).learns_from_samples


def test_tables_are_small_enough_to_write_down():
    for needs in ("support", "support+groups"):
        for k in (2, 5, 16, 64):
            spec = EstimatorSpec("some", lambda tokens, *, k: None, family="sequence", needs=read_needs("needs", needs))
            pair = pair_for(BoundEstimator(spec, {"k": k}))
            samples = len(pair.completions()[0]) ** (2 if "groups" in needs else 1)
            assert pair.student_logits_CV.shape[1] > k
            assert samples * pair.student_logits_CV.numel() < 5e6
