"""Weightings and selections, each against a loop over plain numbers."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd import estimators
from lit_opd.errors import UserError
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient
from lit_opd.estimators.selection import keep_top
from lit_opd.types import TokenBatch

VOCABULARY = 5
KEYWORDS = {
    "prefix_opd": [{"horizon": 1}, {"horizon": 3}, {"horizon": 1, "grow_to": 6}],
    "position_decay": [{"half_life": 1.5}, {}],
    "iw_opd": [{"gamma": 2.0}, {}],
    "entropy_weighted": [{}],
    "entropy_top": [{}, {"share": 0.5}, {"share": 1.0}],
    "tip": [{}, {"share": 0.3}],
    "paced": [{}, {"pass_reward": 0.5}],
}
every_weighting = pytest.mark.parametrize(
    ("name", "keywords"), [(n, k) for n, all_k in KEYWORDS.items() for k in all_k], ids=str
)
seeds = st.integers(0, 2**32 - 1)


def random_batch(seed, rows=None, length=None, coarse=False):
    """Random models and tokens; masks have holes, and some rows count nothing. Coarse values have ties."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = rows or 1 + seed % 4, length or 1 + seed % 7
    student_BTV, teacher_BTV = torch.randn(2, rows, length, VOCABULARY, generator=generator).double().log_softmax(-1)
    ids_BT1 = torch.randint(VOCABULARY, (rows, length, 1), generator=generator)
    entropy_BT, kl_BT = (
        -(student_BTV.exp() * student_BTV).sum(-1),
        (student_BTV.exp() * (student_BTV - teacher_BTV)).sum(-1),
    )
    if coarse:
        entropy_BT, kl_BT = entropy_BT.round(), kl_BT.round()
    mask_BT = torch.rand(rows, length, generator=generator) > 0.3
    mask_BT[torch.rand(rows, generator=generator) < 0.1] = False
    student_BT, teacher_BT = (x.gather(-1, ids_BT1).squeeze(-1) for x in (student_BTV, teacher_BTV))
    return TokenBatch(
        student_BT, teacher_BT, student_BT, mask_BT, completion_ids_BT=ids_BT1.squeeze(-1),
        student_full_logps_BTV=student_BTV, teacher_full_logps_BTV=teacher_BTV, kl_BT=kl_BT,
        student_entropy_BT=entropy_BT, teacher_entropy_BT=-(teacher_BTV.exp() * teacher_BTV).sum(-1),
        rewards_B=torch.randint(3, (rows,), generator=generator).double() / 2,
        groups_B=torch.randint(2, (rows,), generator=generator) + 7,
        progress=float(torch.rand((), generator=generator, dtype=torch.float64)),
    )  # fmt: skip


def weights(name, tokens, **keywords):
    (term,) = estimators.build(name, **keywords).terms
    return term.factors(tokens)


def by_loop(name, tokens, keywords):
    """The same weights from nested lists, a row at a time."""
    found = []
    for row, mask in enumerate(tokens.mask_BT.tolist()):
        places = [t for t, counts in enumerate(mask) if counts]
        values = LOOPS[name](tokens, row, places, **keywords) if places else []
        line = [0.0] * len(mask)
        for place, value in zip(places, values, strict=True):
            line[place] = value
        found.append(line)
    return torch.tensor(found, dtype=torch.float64)


def prefix_loop(tokens, row, places, horizon, grow_to=None):
    reach = horizon if grow_to is None else math.floor(horizon + tokens.progress * (grow_to - horizon))
    return [1.0 if number < reach else 0.0 for number, _ in enumerate(places)]


def decay_loop(tokens, row, places, half_life=256.0):
    return [0.5 ** (number / half_life) for number, _ in enumerate(places)]


def iw_loop(tokens, row, places, gamma=0.5):
    sizes = [abs(float(tokens.student_logps_BT[row, t] - tokens.teacher_logps_BT[row, t])) for t in places]
    return [1 + gamma * (1 - sum(sizes[:number]) / sum(sizes)) for number in range(len(sizes))]


def entropy_loop(tokens, row, places):
    entropies = [float(tokens.student_entropy_BT[row, t]) for t in places]
    mean = sum(entropies) / len(entropies)
    return [entropy / mean if mean else 1.0 for entropy in entropies]


def top_loop(scores, share):
    kept = max(1, round(share * len(scores)))
    best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:kept]
    return [1.0 if i in best else 0.0 for i in range(len(scores))]


def entropy_top_loop(tokens, row, places, share=0.2):
    return top_loop([float(tokens.student_entropy_BT[row, t]) for t in places], share)


def tip_loop(tokens, row, places, share=0.5):
    def scaled(values):
        low, high = min(values), max(values)
        return [(value - low) / (high - low) if high > low else 0.0 for value in values]

    h = scaled([float(tokens.student_entropy_BT[row, t]) for t in places])
    k = scaled([float(tokens.kl_BT[row, t]) for t in places])
    return top_loop([a + b - a * b for a, b in zip(h, k, strict=True)], share)


def paced_loop(tokens, row, places, pass_reward=1.0):
    rewards, groups = tokens.rewards_B.tolist(), tokens.groups_B.tolist()
    group = [reward for reward, g in zip(rewards, groups, strict=True) if g == groups[row]]
    rate = sum(reward >= pass_reward for reward in group) / len(group)
    return [4 * rate * (1 - rate)] * len(places)


LOOPS = {"prefix_opd": prefix_loop, "position_decay": decay_loop, "iw_opd": iw_loop, "entropy_weighted": entropy_loop,
         "entropy_top": entropy_top_loop, "tip": tip_loop, "paced": paced_loop}  # fmt: skip


@every_weighting
@given(seed=seeds, coarse=st.booleans())
@settings(max_examples=40, deadline=None)
def test_weights_are_those_of_a_loop_over_the_counted_tokens(name, keywords, seed, coarse):
    tokens = random_batch(seed, coarse=coarse)
    found = weights(name, tokens, **keywords)
    torch.testing.assert_close(found, by_loop(name, tokens, keywords), rtol=0, atol=1e-12)


@every_weighting
@given(seed=seeds, garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -50.0]))
@settings(max_examples=20, deadline=None)
def test_what_stands_at_masked_positions_changes_no_weight(name, keywords, seed, garbage):
    tokens = random_batch(seed)
    spoilt = {field: torch.where(tokens.mask_BT, getattr(tokens, field), garbage)
              for field in ("student_logps_BT", "teacher_logps_BT", "sampler_logps_BT", "kl_BT", "student_entropy_BT",
                            "teacher_entropy_BT")}  # fmt: skip
    assert torch.equal(weights(name, replace(tokens, **spoilt), **keywords), weights(name, tokens, **keywords))


@every_weighting
def test_weights_are_finite_detached_and_zero_where_masked(name, keywords):
    tokens = random_batch(3, rows=4, length=6)
    tokens = replace(tokens, student_logps_BT=tokens.student_logps_BT.requires_grad_())
    found = weights(name, tokens, **keywords)
    assert found.isfinite().all()
    assert not found.requires_grad
    assert (found[~tokens.mask_BT] == 0).all()


@every_weighting
def test_a_row_has_the_same_weights_alone_and_beside_others(name, keywords):
    """Rows of one prompt stay together."""
    tokens = replace(random_batch(5, rows=4, length=6), groups_B=torch.tensor([1, 2, 1, 3]))
    whole = weights(name, tokens, **keywords)
    for rows in ([0, 2], [1], [3]):
        values = {field: getattr(tokens, field)[rows] for field in vars(tokens)
                  if isinstance(getattr(tokens, field), torch.Tensor)}  # fmt: skip
        assert torch.equal(weights(name, replace(tokens, **values), **keywords), whole[rows])


@every_weighting
def test_one_token_and_no_token_completions(name, keywords):
    tokens = replace(random_batch(1, rows=3, length=4), groups_B=torch.tensor([0, 0, 0]),
                     rewards_B=torch.tensor([1.0, 0.0, 0.0]).double())  # fmt: skip
    tokens = replace(tokens, mask_BT=torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool))
    found = weights(name, tokens, **keywords)
    expected = {"iw_opd": 1 + keywords.get("gamma", 0.5), "paced": 4 * 2 / 9}.get(name, 1.0)
    torch.testing.assert_close(found, expected * tokens.mask_BT.double(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("base", ["token", "sequence", {"name": "full_vocab", "divergence": "forward_kl"},
                                  {"name": "full_vocab", "divergence": "jsd", "teacher_weight": 0.1}, "minillm"],
                         ids=str)  # fmt: skip
@every_weighting
def test_any_base_is_weighted_token_by_token(name, keywords, base):
    tokens = random_batch(8, rows=3, length=6)
    found = estimators.build(name, base=base, **keywords)(tokens)
    plain = dict(base) if isinstance(base, dict) else {"name": base}
    expected = estimators.build(plain.pop("name"), **plain)(tokens)
    weighted_BT = weights(name, tokens, **keywords) * expected.loss_BT
    torch.testing.assert_close(found.loss_BT, weighted_BT, rtol=0, atol=1e-12)
    assert torch.equal(found.kl_BT, expected.kl_BT)


@every_weighting
def test_a_mix_holds_weighted_terms_beside_others(name, keywords):
    tokens = random_batch(9, rows=3, length=6)
    terms = {
        name: {"weight": 0.5, "base": {"name": "full_vocab", "divergence": "forward_kl"}, **keywords},
        "token": 2.0,
    }
    found = estimators.build("mix", terms=terms)(tokens).loss_BT
    forward = estimators.build("full_vocab", divergence="forward_kl")(tokens).loss_BT
    expected = 0.5 * weights(name, tokens, **keywords) * forward + 2 * estimators.build("token")(tokens).loss_BT
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def rows_of_the_local_gradient(pair, factors):
    """The exact local gradient, with the rows of contexts of each length scaled."""
    scales = [factor for length, factor in enumerate(factors) for _ in range(VOCABULARY**length)]
    shape = pair.student_logits_CV.shape
    return (
        torch.tensor(scales, dtype=torch.float64)[:, None] * exact_gradient(pair, "reverse_kl").view(shape)
    ).flatten()


@pytest.mark.parametrize(
    ("name", "keywords", "factors"),
    [("prefix_opd", {"horizon": 1}, [1, 0, 0]), ("prefix_opd", {"horizon": 2}, [1, 1, 0]),
     ("prefix_opd", {"horizon": 1, "grow_to": 3}, [1, 1, 0]), ("position_decay", {"half_life": 1.0}, [1, 0.5, 0.25]),
     ("position_decay", {"half_life": 2.0}, [1, 0.5**0.5, 0.5])],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("base", ["token", "full_vocab"])
def test_positional_weights_scale_the_exact_gradient_of_their_positions(name, keywords, factors, base):
    pair = TabularPair.random(VOCABULARY, 3, seed=4, stop=True)
    found = expected_gradient(pair, estimators.build(name, base=base, **keywords))
    torch.testing.assert_close(found, rows_of_the_local_gradient(pair, factors), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("progress", "reach"), [(0.0, 2), (0.24, 2), (0.25, 3), (0.5, 4), (1.0, 6)])
def test_a_prefix_grows_with_training(progress, reach):
    tokens = replace(random_batch(0, rows=1, length=8), progress=progress, mask_BT=torch.ones(1, 8, dtype=torch.bool))
    assert weights("prefix_opd", tokens, horizon=2, grow_to=6).tolist() == [[1.0] * reach + [0.0] * (8 - reach)]


def test_where_nothing_tells_tokens_apart_they_weigh_the_same():
    tokens = random_batch(2, rows=2, length=5)
    tokens = replace(tokens, teacher_logps_BT=tokens.student_logps_BT, student_entropy_BT=torch.zeros(2, 5).double())
    assert torch.equal(weights("iw_opd", tokens), 1.5 * tokens.mask_BT.double())
    assert torch.equal(weights("entropy_weighted", tokens), tokens.mask_BT.double())


def test_entropy_weights_have_mean_one_over_each_completion():
    tokens = replace(
        random_batch(6, rows=4, length=7), mask_BT=torch.tensor([[1, 0, 1, 1, 1, 0, 0]] * 4, dtype=torch.bool)
    )
    means = weights("entropy_weighted", tokens).sum(1) / tokens.mask_BT.sum(1)
    torch.testing.assert_close(means, torch.ones(4).double(), rtol=0, atol=1e-12)


def test_tip_keeps_the_confident_mistakes_that_entropy_and_the_product_with_it_miss():
    """Position 0: no entropy and the largest KL. Position 1: the largest entropy. The others: little of both."""
    entropy, kl = torch.tensor([[0.0, 2.0, 0.5, 0.6]]).double(), torch.tensor([[5.0, 0.1, 0.2, 0.3]]).double()
    tokens = replace(random_batch(0, rows=1, length=4), mask_BT=torch.ones(1, 4, dtype=torch.bool),
                     student_entropy_BT=entropy, kl_BT=kl)  # fmt: skip
    assert weights("tip", tokens).tolist() == [[1, 1, 0, 0]]
    assert weights("entropy_top", tokens, share=0.5).tolist() == [[0, 1, 0, 1]]
    assert keep_top(entropy * kl, tokens.mask_BT, 0.5).tolist() == [[False, True, False, True]]


def test_of_equal_scores_the_earlier_are_kept():
    mask_BT = torch.arange(100)[None] >= 10  # so many that a sort that is not stable would mix them
    assert keep_top(torch.ones(1, 100), mask_BT, 0.4).nonzero()[:, 1].tolist() == list(range(10, 46))


def test_the_kept_share_is_a_round_number_of_tokens_and_at_least_one():
    for length, share in itertools.product(range(1, 40), (0.01, 0.1, 0.2, 0.5, 0.7, 1.0)):
        kept = keep_top(torch.rand(1, length), torch.ones(1, length, dtype=torch.bool), share)
        assert kept.sum() == max(1, round(share * length))


def test_weights_of_bf16_values_are_fp32():
    tokens = random_batch(7, rows=2, length=4)
    low = {field: getattr(tokens, field).bfloat16() for field in
           ("student_logps_BT", "teacher_logps_BT", "kl_BT", "student_entropy_BT", "rewards_B")}  # fmt: skip
    for name, (keywords, *_) in KEYWORDS.items():
        assert weights(name, replace(tokens, **low), **keywords).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "keywords", "message"),
    [("prefix_opd", {"horizon": 0}, "horizon must be a whole number of at least 1, found 0"),
     ("prefix_opd", {"horizon": True}, "horizon must be a whole number of at least 1, found True"),
     ("prefix_opd", {"horizon": 2.5}, "horizon must be a whole number of at least 1, found 2.5"),
     ("prefix_opd", {"horizon": 2, "grow_to": 0}, "grow_to must be a whole number of at least 1, found 0"),
     ("prefix_opd", {"horizon": 8, "grow_to": 4}, r"grow_to must be at least horizon \(8\), found 4"),
     ("position_decay", {"half_life": 0.0}, "half_life must be positive, found 0.0"),
     ("position_decay", {"half_life": math.nan}, "half_life must be positive, found nan"),
     ("iw_opd", {"gamma": -0.1}, "gamma must be at least 0 and finite, found -0.1"),
     ("iw_opd", {"gamma": math.inf}, "gamma must be at least 0 and finite, found inf"),
     ("entropy_top", {"share": 0.0}, r"share must lie in \(0, 1\], found 0.0"),
     ("entropy_top", {"share": 1.5}, r"share must lie in \(0, 1\], found 1.5"),
     ("tip", {"share": math.nan}, r"share must lie in \(0, 1\], found nan"),
     ("paced", {"pass_reward": math.inf}, "pass_reward must be finite, found inf"),
     ("iw_opd", {"base": "tip"}, "base must not be weighted itself, found 'tip'")],
)  # fmt: skip
def test_keywords_that_cannot_work_are_refused_before_any_model_loads(name, keywords, message):
    with pytest.raises(UserError, match=message):
        estimators.build(name, **keywords)
