"""Trust regions: what is inside, what becomes of what is outside, and which tokens are kept."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_opd.errors import UserError
from lit_opd.estimators import build
from lit_opd.estimators.oracle import TabularPair, second_moment, trajectory_gradients, verify
from lit_opd.types import TokenBatch

MASK = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = -2 * torch.rand(MASK.shape, generator=generator, dtype=torch.float64)
    teacher = student + torch.randn(MASK.shape, generator=generator, dtype=torch.float64)
    support = -3 * torch.rand(2, *MASK.shape, 3, generator=generator, dtype=torch.float64) - 1
    return TokenBatch(
        student.requires_grad_(), teacher, student.detach(), MASK,
        student_entropy_BT=torch.rand(MASK.shape, generator=generator, dtype=torch.float64),
        support_mask_BTK=torch.rand(*MASK.shape, 3, generator=generator) > 0.3,
        student_support_logps_BTK=support[0].requires_grad_(), teacher_support_logps_BTK=support[1],
    )  # fmt: skip


def gradients(name, tokens, **keywords):
    loss = torch.where(tokens.mask_BT, build(name, **keywords)(tokens).loss_BT, 0.0).sum()
    leaves = (tokens.student_logps_BT, tokens.student_support_logps_BTK)
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def by_hand(tokens, credit):
    expected = torch.zeros_like(tokens.teacher_logps_BT)
    for b, t in tokens.mask_BT.nonzero().tolist():
        expected[b, t] = credit(b, t, tokens.student_logps_BT[b, t].item() - tokens.teacher_logps_BT[b, t].item())
    return expected


@pytest.mark.parametrize("trust", [0.0, 0.3])
@pytest.mark.parametrize(("outlier", "outside"), [("mask", lambda trust: 0.0), ("clip", lambda trust: trust)])
def test_tropd_is_token_inside_and_masked_or_clipped_outside(trust, outlier, outside):
    tokens = batch()
    found, _ = gradients("tropd", tokens, trust=trust, outlier=outlier)
    expected = by_hand(tokens, lambda b, t, d: d if d <= trust else outside(trust))
    assert 2 < (tokens.student_logps_BT - tokens.teacher_logps_BT > trust)[MASK].sum() < MASK.sum()
    torch.testing.assert_close(found, expected, **EXACT)


def test_the_region_has_one_side():
    """A token that the teacher finds far more probable is no outlier."""
    tokens = TokenBatch(torch.tensor([[-9.0, -0.1]]), torch.tensor([[-0.1, -9.0]]), torch.zeros(1, 2), MASK[:1, :2])
    loss = build("tropd", trust=1.0)(tokens).loss_BT
    torch.testing.assert_close(loss, torch.tensor([[-8.9 * -9.0, 0.0]]))


def test_negative_log_ratios_have_a_light_tail_whatever_the_teacher():
    for seed in range(20):
        student, teacher = TabularPair.random(6, 1, seed=seed, scale=3.0).student_logits_CV[0], torch.randn(6).double()
        p, d = student.softmax(0), student.log_softmax(0) - teacher.log_softmax(0)
        for x in (0.5, 1.0, 3.0):
            assert p[d < -x].sum() <= math.exp(-x)


def test_tropd_forward_is_the_score_inside_and_the_forward_sum_over_the_support_outside():
    tokens, trust = batch(), 0.3
    sampled, support = gradients("tropd_forward", tokens, trust=trust, k=3)
    torch.testing.assert_close(sampled, by_hand(tokens, lambda b, t, d: d if d <= trust else 0.0), **EXACT)
    expected = torch.zeros_like(support)
    for b, t in MASK.nonzero().tolist():
        if tokens.student_logps_BT[b, t] - tokens.teacher_logps_BT[b, t] > trust:
            for k in tokens.support_mask_BTK[b, t].nonzero().flatten().tolist():
                expected[b, t, k] = -math.exp(tokens.teacher_support_logps_BTK[b, t, k])
    assert expected.any()
    torch.testing.assert_close(support, expected, **EXACT)


def test_tropd_forward_with_no_outlier_is_token_and_with_the_whole_vocabulary_is_the_forward_kl():
    pair = TabularPair.random(4, 2, seed=3)
    (_, found), (_, expected) = (
        trajectory_gradients(pair, e) for e in (build("tropd_forward", trust=50.0, k=2), build("token"))
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    tokens = batch()
    outliers = TokenBatch(**(vars(tokens) | {"teacher_logps_BT": tokens.teacher_logps_BT - 50}))
    value = build("tropd_forward", trust=1.0, k=3)(outliers).loss_BT
    q, log_p = tokens.teacher_support_logps_BTK, tokens.student_support_logps_BTK
    forward = torch.where(tokens.support_mask_BTK, q.exp() * (q - log_p), 0.0).sum(-1)
    torch.testing.assert_close(value[MASK], forward[MASK], **EXACT)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("seed", [0, 1])
def test_reopold_floors_the_reward_and_keeps_the_most_uncertain_tokens(share, seed):
    tokens, floor = batch(seed), math.log(0.3 / 0.7)
    kept = []
    for b in range(len(MASK)):
        counted = MASK[b].nonzero().flatten().tolist()
        ranked = sorted(counted, key=lambda t, b=b: -tokens.student_entropy_BT[b, t].item())
        kept.append(ranked[: math.ceil(share * len(counted))])
    found, _ = gradients("reopold", tokens, mixture=0.3, entropy_share=share)
    expected = by_hand(tokens, lambda b, t, d: -max(-d, floor) if t in kept[b] else 0.0)
    torch.testing.assert_close(found, expected, **EXACT)


@settings(deadline=None, max_examples=60)
@given(length=st.integers(1, 400), masked=st.integers(0, 40), percent=st.integers(1, 100), seed=st.integers(0, 99))
@example(length=50, masked=0, percent=30, seed=0)
@example(length=25, masked=3, percent=60, seed=0)
def test_the_number_of_kept_tokens_is_the_share_of_counted_ones_rounded_up(length, masked, percent, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.randperm(length + masked, generator=generator) < length)[None]
    student = torch.full((1, length + masked), -1.0, dtype=torch.float64, requires_grad=True)
    entropy = torch.randint(3, mask.shape, generator=generator).double()  # with many ties
    tokens = TokenBatch(student, student.detach() + 0.5, student.detach(), mask, student_entropy_BT=entropy)
    loss = build("reopold", mixture=0.3, entropy_share=percent / 100)(tokens).loss_BT
    (found,) = torch.autograd.grad(torch.where(mask, loss, 0.0).sum(), student)
    kept = found != 0
    assert kept.sum() == -(-length * percent // 100)
    assert not kept[~mask].any()
    if kept.sum() < length:
        assert entropy[kept].min() >= entropy[mask & ~kept].max()


def test_reopold_with_all_tokens_is_tropd_that_clips():
    tokens = batch()
    found, _ = gradients("reopold", tokens, mixture=0.3)
    expected, _ = gradients("tropd", tokens, trust=math.log(0.7 / 0.3), outlier="clip")
    torch.testing.assert_close(found, expected, **EXACT)


def test_masked_entropies_choose_nothing():
    tokens = batch()
    garbage = torch.where(MASK, tokens.student_entropy_BT, 1e6)
    spoilt = TokenBatch(**(vars(tokens) | {"student_entropy_BT": garbage}))
    for share in (0.5, 1.0):
        found, expected = (gradients("reopold", b, mixture=0.3, entropy_share=share)[0] for b in (spoilt, tokens))
        assert torch.equal(found, expected)


def test_wider_regions_have_less_bias_where_outliers_are_clipped():
    pair = TabularPair.random(4, 2, seed=3)
    clip = [build("tropd", trust=trust, outlier="clip") for trust in (0.25, 0.5, 1.0)]
    relaxed = [build("reopold", mixture=mixture) for mixture in (0.5, 0.3, 0.2)]
    for narrow_to_wide in (clip, relaxed):
        biases = [verify(estimator, pair).relative_bias for estimator in narrow_to_wide]
        assert sorted(biases, reverse=True) == biases
        assert biases[-1] > 1e-3


CASES = [("tropd", {"trust": 0.5}), ("tropd", {"trust": 0.5, "outlier": "clip"}), ("reopold", {"mixture": 0.5}),
         ("reopold", {"mixture": 0.2, "entropy_share": 0.5}), ("tropd_forward", {"trust": 0.0, "k": 2})]  # fmt: skip


@pytest.mark.parametrize(("name", "keywords"), CASES)
def test_no_sample_has_a_gradient_where_student_equals_teacher(name, keywords):
    equal = TabularPair.random(4, 3, seed=3, stop=True).with_equal_models()
    assert second_moment(equal, build(name, **keywords)) == 0


@pytest.mark.parametrize(("name", "keywords"), CASES)
def test_extreme_log_ratios_are_finite_in_fp32(name, keywords):
    student = torch.tensor([[-60.0, -1e-6, -60.0, -1e-6]], requires_grad=True)
    support = torch.tensor([-60.0, -1e-6]).expand(1, 4, 2).clone().requires_grad_()
    tokens = TokenBatch(
        student, student.detach().flip(1), student.detach(), torch.ones(1, 4, dtype=torch.bool),
        student_entropy_BT=torch.rand(1, 4), support_mask_BTK=torch.ones(1, 4, 2, dtype=torch.bool),
        student_support_logps_BTK=support, teacher_support_logps_BTK=support.detach().flip(2),
    )  # fmt: skip
    assert build(name, **keywords)(tokens).loss_BT.isfinite().all()
    assert all(found.isfinite().all() for found in gradients(name, tokens, **keywords))


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [
        ("tropd", {"trust": -0.1}, "trust must be finite and not negative"),
        ("tropd", {"trust": math.inf}, "trust must be finite and not negative"),
        ("tropd", {"trust": math.nan}, "trust must be finite and not negative"),
        ("tropd", {"trust": 1.0, "outlier": "forward"}, "outlier must be one of mask, clip, found 'forward'"),
        ("tropd_forward", {"trust": -1.0}, "trust must be finite and not negative"),
        ("tropd_forward", {"trust": 1.0, "k": 0}, "k must be a whole number of at least 1"),
        ("reopold", {"mixture": 0.0}, r"mixture must lie in \(0, 0.5\]"),
        ("reopold", {"mixture": 0.6}, r"mixture must lie in \(0, 0.5\]"),
        ("reopold", {"mixture": 0.3, "entropy_share": 0.0}, r"entropy_share must lie in \(0, 1\]"),
        ("reopold", {"mixture": 0.3, "entropy_share": 1.1}, r"entropy_share must lie in \(0, 1\]"),
    ],
)
def test_keywords_that_cannot_work_are_refused(name, keywords, message):
    with pytest.raises(UserError, match=message):
        build(name, **keywords)
