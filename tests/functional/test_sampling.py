"""The sampling law against the warpers of transformers; the draw against NumPy and against the law itself."""

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lit_opd.functional import draw, law_logps, sample_tokens
from lit_opd.types import SamplingLaw

fast = settings(max_examples=50, deadline=None)
IMPOSSIBLE = -torch.inf
ALMOST_ONE = 1 - 2**-53
seeds = st.integers(0, 2**32 - 1)
laws = st.builds(
    SamplingLaw,
    temperature=st.floats(0.2, 3),
    # Nearer to 1 the nucleus ends among tokens below float64 rounding, where the two need not agree.
    top_p=st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
    top_k=st.integers(0, 40),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 0.5)),
)
either_law = pytest.mark.parametrize(
    "law", [SamplingLaw(), SamplingLaw(temperature=0.7, top_p=0.9, top_k=12)], ids=["plain", "truncated"]
)


def logits(seed, rows=4, vocabulary=30):
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def warped(scores, law):
    """The law as transformers applies it: temperature, top-k, top-p, min-p."""
    warpers = [TemperatureLogitsWarper(law.temperature)] if law.temperature != 1 else []
    warpers += [TopKLogitsWarper(law.top_k)] if law.top_k else []
    warpers += [TopPLogitsWarper(law.top_p)] if law.top_p < 1 else []
    warpers += [MinPLogitsWarper(law.min_p)] if law.min_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores.log_softmax(-1)


@fast
@given(seeds, laws)
def test_the_law_is_that_of_transformers(seed, law):
    found = law_logps(logits(seed), law)
    torch.testing.assert_close(found, warped(logits(seed), law), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(4).double(), rtol=0, atol=1e-12)


def test_ties():
    """Top-k keeps every token tied with the k-th, as transformers does; top-p keeps only as many as it needs."""
    tied = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    assert (law_logps(tied, SamplingLaw(top_k=2)) > IMPOSSIBLE).sum() == 4
    assert (warped(tied, SamplingLaw(top_k=2)) > IMPOSSIBLE).sum() == 4
    assert (law_logps(tied, SamplingLaw(top_p=0.4)) > IMPOSSIBLE).sum() == 2
    assert (warped(tied, SamplingLaw(top_p=0.4)) > IMPOSSIBLE).sum() == 2


@pytest.mark.parametrize("law", [SamplingLaw(top_k=1), SamplingLaw(top_p=1e-9), SamplingLaw(temperature=0.0)])
def test_one_token_always_remains(law):
    found = law_logps(logits(0), law)
    assert ((found > IMPOSSIBLE).sum(-1) == 1).all()
    assert torch.equal(found.argmax(-1), logits(0).argmax(-1))
    assert (found.amax(-1) == 0).all()


def test_without_truncation_it_is_the_softmax():
    assert torch.equal(law_logps(logits(1), SamplingLaw()), logits(1).log_softmax(-1))
    assert torch.equal(law_logps(logits(1), SamplingLaw(top_k=30)), logits(1).log_softmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forbidden_tokens_have_no_mass_and_the_rest_sums_to_one(temperature):
    scores = logits(2)
    forbidden = scores.argmax(-1).unique()
    found = law_logps(scores, SamplingLaw(temperature=temperature, top_k=5), forbidden)
    assert torch.isneginf(found[:, forbidden]).all()
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(4).double())
    assert torch.equal(scores, logits(2)), "the logits were changed in place"


def test_the_law_is_computed_in_fp32():
    low = logits(3).bfloat16()
    law = SamplingLaw(temperature=0.7, top_p=0.9)
    assert law_logps(low, law).dtype == torch.float32
    assert torch.equal(law_logps(low, law), law_logps(low.float(), law))


@fast
@given(seeds, laws)
def test_draw_inverts_the_cumulative_distribution(seed, law):
    logps = law_logps(logits(seed, rows=16), law)
    uniforms = torch.rand(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cdf = np.cumsum(logps.exp().numpy(), axis=1)
    expected = [np.searchsorted(row, u * row[-1], side="right") for row, u in zip(cdf, uniforms.numpy(), strict=True)]
    assert draw(logps, uniforms).tolist() == expected


@either_law
def test_draws_follow_the_law(law):
    logps = law_logps(logits(4, rows=1, vocabulary=20), law)
    uniforms = torch.rand(20_000, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    counts = torch.bincount(draw(logps.expand(20_000, -1), uniforms), minlength=20).numpy()
    possible = (logps[0] > IMPOSSIBLE).numpy()
    expected = 20_000 * logps[0].exp().numpy()
    assert counts[~possible].sum() == 0
    assert scipy.stats.chisquare(counts[possible], expected[possible]).pvalue > 1e-3


@fast
@given(seeds, st.sampled_from([torch.float32, torch.float64]))
def test_impossible_tokens_are_never_drawn(seed, dtype):
    """Not by the smallest and largest uniform, nor by one that hits a step exactly or was rounded up to 1."""
    scores = logits(seed, rows=8, vocabulary=50).to(dtype)
    scores[:, [0, 1, 20, 21, 48, 49]] = IMPOSSIBLE
    logps = scores.log_softmax(-1)
    cdf = logps.exp().double().cumsum(-1)
    steps = (cdf / cdf[:, -1:]).clamp(max=ALMOST_ONE)
    ends = torch.tensor([0.0, 2**-53, ALMOST_ONE, 1.0], dtype=torch.float64).expand(8, -1)
    for uniforms in torch.cat([ends, steps], dim=1).T:
        chosen = draw(logps, uniforms)
        assert (logps.gather(1, chosen[:, None]) > IMPOSSIBLE).all()


def test_the_ends_of_the_unit_interval_are_the_first_and_last_possible_tokens():
    logps = torch.tensor([[IMPOSSIBLE, 0.25, 0.5, 0.25, IMPOSSIBLE]]).log_softmax(-1).expand(2, -1)
    assert draw(logps, torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64)).tolist() == [1, 3]


def test_what_rounding_left_of_the_total_does_not_matter():
    logps = logits(9, rows=16).log_softmax(-1)
    uniforms = torch.linspace(0, ALMOST_ONE, 16, dtype=torch.float64)
    for slip in (-0.1, 0.1):
        assert torch.equal(draw(logps + slip, uniforms), draw(logps, uniforms))


def test_a_greedy_law_draws_the_largest_whatever_the_uniform():
    greedy = law_logps(logits(6), SamplingLaw(temperature=0.0))
    for uniform in (0.0, 0.5, ALMOST_ONE):
        assert torch.equal(draw(greedy, torch.full((4,), uniform, dtype=torch.float64)), logits(6).argmax(-1))


@either_law
def test_rows_do_not_depend_on_their_batch_mates(law):
    scores = logits(7, rows=9, vocabulary=1003).float()
    uniforms = torch.rand(9, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    together = draw(law_logps(scores, law), uniforms)
    alone = [draw(law_logps(scores[i : i + 1], law), uniforms[i : i + 1]).item() for i in range(9)]
    assert together.tolist() == alone


@either_law
@pytest.mark.parametrize("vocabulary", [5, 128, 300])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, -1, slice(None)])
def test_what_is_not_finite_is_told_by_the_log_probability(where, value, vocabulary, law):
    scores = logits(12, rows=3, vocabulary=vocabulary)
    clean, uniforms = scores.clone(), torch.tensor([0.3, ALMOST_ONE, 0.3], dtype=torch.float64)
    scores[:2, where] = value
    ids, logps = sample_tokens(scores, law, uniforms)
    assert ((ids >= 0) & (ids < vocabulary)).all()
    assert logps.isnan().tolist() == [True, True, False]
    assert ids[2] == sample_tokens(clean, law, uniforms)[0][2]


vocabularies = st.sampled_from([1, 5, 127, 128, 129, 1000])
every_law = st.one_of(st.just(SamplingLaw()), st.just(SamplingLaw(temperature=0.0)), laws,
                      st.builds(SamplingLaw, temperature=st.floats(0.2, 3)))  # fmt: skip


def random_uniforms(seed, rows):
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=200, deadline=None)
@given(seeds, vocabularies, every_law, st.integers(0, 3))
def test_sampling_is_drawing_from_the_law(seed, vocabulary, law, forbidden):
    scores, uniforms = logits(seed, rows=6, vocabulary=vocabulary), random_uniforms(seed, 6)
    # At least one token remains.
    forbidden_ids = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))[:forbidden]
    forbidden_ids = forbidden_ids[: vocabulary - 1] if forbidden else None
    ids, logps = sample_tokens(scores, law, uniforms, forbidden_ids)
    expected = law_logps(scores, law, forbidden_ids)
    assert torch.equal(ids, draw(expected, uniforms))
    torch.testing.assert_close(logps, expected.gather(-1, ids[:, None])[:, 0], rtol=0, atol=1e-12)
    assert forbidden_ids is None or not torch.isin(ids, forbidden_ids).any()
    assert torch.equal(scores, logits(seed, rows=6, vocabulary=vocabulary)), "the logits were changed in place"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [5, 129, 1000])
def test_sampling_is_done_in_fp32(vocabulary, dtype):
    scores, uniforms = logits(1, 50, vocabulary).to(dtype), random_uniforms(2, 50)
    ids, logps = sample_tokens(scores, SamplingLaw(temperature=0.7), uniforms)
    exact = law_logps(scores.double(), SamplingLaw(temperature=0.7))
    assert logps.dtype == torch.float32
    assert torch.equal(ids, draw(exact, uniforms))
    torch.testing.assert_close(logps.double(), exact.gather(-1, ids[:, None])[:, 0], rtol=0, atol=1e-5)


@settings(max_examples=200, deadline=None)
@example(seed=51, vocabulary=127, dtype=torch.float64, share=0.5, temperature=0.3)  # the last token weighs 1.1e-16
@given(seeds, vocabularies, st.sampled_from([torch.float32, torch.float64]), st.floats(0.01, 1),
       st.sampled_from([0.3, 1.0]))  # fmt: skip
def test_what_has_no_probability_is_never_sampled(seed, vocabulary, dtype, share, temperature):
    """Scattered tokens and whole blocks of them, at both ends of the unit interval and at every step of the sums."""
    generator = torch.Generator().manual_seed(seed)
    scores = logits(seed, rows=1, vocabulary=vocabulary).to(dtype)
    possible = torch.rand(vocabulary, generator=generator) < share
    possible[torch.randint(vocabulary, (1,), generator=generator)] = True
    scores[:, ~possible] = IMPOSSIBLE
    law = SamplingLaw(temperature=temperature)
    steps = law_logps(scores, law)[0].exp().double().cumsum(0)
    ends = torch.tensor([0.0, 2**-53, ALMOST_ONE], dtype=torch.float64)
    uniforms = torch.cat([ends, (steps / steps[-1]).clamp(max=ALMOST_ONE)])
    ids, logps = sample_tokens(scores.expand(len(uniforms), -1), law, uniforms)
    assert possible[ids].all()
    assert torch.isfinite(logps).all()
    assert ids[0] == torch.nonzero(possible)[0]
    # Only tokens that together weigh less than a sum in this dtype can hold lie beyond the one at the upper end.
    weights = law_logps(scores, law)[0].exp().double()
    assert weights[ids[2] + 1 :].sum() < vocabulary * torch.finfo(dtype).eps


@pytest.mark.parametrize("forbidden", [None, torch.tensor([0, 3, 150])])
@pytest.mark.parametrize("law", [SamplingLaw(), SamplingLaw(temperature=0.7), SamplingLaw(temperature=1.5, top_p=0.9)])
def test_samples_follow_the_exact_law(law, forbidden):
    """Over two blocks of tokens; those that are rarely expected count together."""
    count, vocabulary = 40_000, 200
    scores = logits(10, rows=1, vocabulary=vocabulary)
    ids, _ = sample_tokens(scores.expand(count, -1), law, random_uniforms(11, count), forbidden)
    kept = torch.ones(vocabulary, dtype=torch.bool)
    if forbidden is not None:
        kept[forbidden] = False
    exact = warped(scores.masked_fill(~kept, IMPOSSIBLE), law)[0].exp()
    counts = torch.bincount(ids, minlength=vocabulary)
    assert not counts[exact == 0].any()
    rare = count * exact < 10
    found = torch.cat([counts[~rare], counts[rare].sum()[None]]).numpy()
    expected = count * torch.cat([exact[~rare], exact[rare].sum()[None]]).numpy()
    assert scipy.stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue > 1e-3
