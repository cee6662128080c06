"""The statistics against known answers: what an interval of 95 % covers, and how often nothing is called something.

Values are drawn as the model of `paired` has them: a mean, an effect of the seed, one of the prompt, a rest. Shares run
from one of the three alone to all at once, as nobody knows them beforehand.
"""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lit_opd.lab.compare.paired import _variances, holm, interval_of, mean_of, p_value
from lit_opd.lab.compare.standings import NOT_DISTINGUISHABLE, NOT_TESTED, rank

SIZES = [(5, 60), (3, 40)]
REPETITIONS = 500
# Ten times as many where it costs nothing: 500 cannot tell 5 % from 6 % (standard error 1 %), 5000 can (0.3 %).
MANY = 5000
SHARES = {
    "seeds": (1.0, 0.0, 0.0),
    "prompts": (0.0, 1.0, 0.3),
    "rest": (0.0, 0.0, 1.0),
    "seeds and prompts alike": (math.sqrt(0.05), 1.0, 1.0),
    "a little of the seeds": (0.05, 0.5, 1.0),
    "mostly seeds": (0.5, 0.5, 1.0),
}


def draw(rng, repetitions, size, shares, mean=0.0):
    """[repetitions, seeds, prompts] of paired differences."""
    (seeds, prompts), (of_seed, of_prompt, of_rest) = size, shares
    return (
        mean
        + of_seed * rng.standard_normal((repetitions, seeds, 1))
        + of_prompt * rng.standard_normal((repetitions, 1, prompts))
        + of_rest * rng.standard_normal((repetitions, seeds, prompts))
    )


def covered(values, truth):
    low, high = interval_of(values)
    return ((low <= truth) & (high >= truth)).mean()


def called_different(values):
    return np.mean([p_value(differences) < 0.05 for differences in values])


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("size", SIZES)
def test_the_interval_covers_the_truth_and_not_much_more(size, shares):
    coverage = covered(draw(np.random.default_rng(0), MANY, size, shares, mean=0.7), 0.7)
    assert coverage >= 0.94
    # Where one source dominates it is Student's interval, whose coverage is exact; mixtures may be covered too well.
    assert coverage <= (0.96 if sum(share > 0 for share in shares) == 1 and shares[0] else 0.995)


@pytest.mark.parametrize("size", [(5, 60), (1, 60), (1, 40)], ids=str)
def test_the_interval_covers_skewed_prompts(size):
    rng = np.random.default_rng(1)
    values = draw(rng, MANY, size, (0.1 * (size[0] > 1), 0.0, 0.5)) + rng.exponential(size=(MANY, 1, size[1]))
    assert covered(values, 1) >= (0.94 if size[0] > 1 else 0.93)


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("size", SIZES)
def test_at_most_six_in_a_hundred_comparisons_of_equals_are_called_different(size, shares):
    assert called_different(draw(np.random.default_rng(2), REPETITIONS, size, shares)) <= 0.06


@pytest.mark.parametrize("skewed", [False, True], ids=["gaussian", "skewed"])
@pytest.mark.parametrize("prompts", [60, 40])
def test_with_one_seed_at_most_six_in_a_hundred_too(prompts, skewed):
    rng = np.random.default_rng(3)
    size = (MANY, 2, 1, prompts)
    pairs = rng.exponential(size=size) if skewed else rng.standard_normal(size)
    assert called_different(pairs[:, 0] - pairs[:, 1]) <= 0.06


@pytest.mark.parametrize("part", [0.5, 0.1, 0.03, 0.01], ids="they part on {}".format)
@pytest.mark.parametrize(
    ("size", "most"),
    [((1, 2), 0.06), ((1, 8), 0.06), ((1, 40), 0.06), ((1, 256), 0.06),
     ((2, 2), 0.011), ((2, 20), 0.011), ((2, 128), 0.011), ((3, 256), 0.03)], ids=str,
)  # fmt: skip
def test_equals_that_are_right_or_wrong_are_told_apart_no_more_often_though_seeds_often_tie(size, most, part):
    rng = np.random.default_rng(20)
    differences = rng.choice([-1.0, 0.0, 1.0], p=[part / 2, 1 - part, part / 2], size=(2000, *size))
    assert called_different(differences) <= most


def test_two_seeds_that_tie_are_no_certainty():
    differences = np.zeros((2, 20))
    differences[0, :3] = differences[1, 3:6] = 1
    found = mean_of(differences)
    expected = stats.ttest_1samp(differences.mean(0), 0)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert p_value(differences) == pytest.approx(max(expected.pvalue, 2**-5), rel=1e-6)


def test_p_is_never_below_that_of_as_many_coins_as_prompts_differ():
    for differing, size in itertools.product((1, 2, 5, 9), ((1, 200), (3, 200), (1, 9))):
        differences = np.zeros(size)
        differences[:, :differing] = 1
        assert p_value(differences) >= min(1.0, 2.0 ** (1 - differing))
    assert p_value(np.ones((1, 9))) == 2.0**-8, "as exact a test as there is"
    assert p_value(np.ones((3, 200))) == 1e-15


def test_the_same_difference_in_every_seed_cannot_be_tested():
    found = mean_of([[0.03125], [0.03125]])
    assert (found.mean, found.low, found.high) == (0.03125, None, None)
    assert p_value([[0.03125], [0.03125]]) == 1.0
    ranking = rank("accuracy", {"one": {0: [0.5], 1: [0.75]}, "more": {0: [0.75], 1: [1.0]}})
    assert ranking.pairs[0].verdict == NOT_TESTED
    assert ranking.sentence == "The same difference in every seed: nothing can be tested."


def test_resampling_seeds_would_cover_too_little():
    values = draw(np.random.default_rng(4), 1000, (3, 40), SHARES["mostly seeds"])
    drawn = np.random.default_rng(0).integers(3, size=(199, 3))
    low, high = np.quantile(values.mean(2)[:, drawn].mean(2), (0.025, 0.975), axis=1)
    assert ((low <= 0) & (high >= 0)).mean() < 0.8


def test_holm_keeps_the_chance_of_any_false_difference():
    rng = np.random.default_rng(5)
    raw = corrected = 0
    for _ in range(REPETITIONS):
        variants = draw(rng, 4, (5, 60), SHARES["mostly seeds"])
        p_values = [p_value(first - second) for first, second in itertools.combinations(variants, 2)]
        raw += min(p_values) < 0.05
        corrected += min(holm(p_values)) < 0.05
    assert corrected / REPETITIONS <= 0.06
    assert raw / REPETITIONS > 0.1


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_real_difference_is_found():
    assert called_different(draw(np.random.default_rng(6), 100, (5, 60), (0.05, 0.3, 0.5), mean=0.5)) > 0.95


@pytest.mark.parametrize("values", [
    np.random.default_rng(7).standard_normal((5, 1)) + 1,  # one prompt: over seeds
    np.random.default_rng(8).standard_normal((1, 40)) + 0.3,  # one seed: over prompts
    np.tile(np.random.default_rng(8).standard_normal(40) + 0.3, (3, 1)),  # seeds agree: over prompts
], ids=["one prompt", "one seed", "seeds agree"])  # fmt: skip
def test_where_one_source_is_left_it_is_students_t(values):
    expected = stats.ttest_1samp(values[:, 0] if values.shape[1] == 1 else values[0], 0)
    assert p_value(values) == pytest.approx(expected.pvalue, rel=1e-6)
    np.testing.assert_allclose(interval_of(values), expected.confidence_interval(), rtol=1e-9)


@given(st.integers(0, 10_000), st.sampled_from([*SIZES, (1, 40)]), st.sampled_from(list(SHARES.values())))
def test_p_is_the_level_at_which_the_interval_reaches_zero(seed, size, shares):
    values = draw(np.random.default_rng(seed), 1, size, shares, mean=0.3)[0]
    p = p_value(values)
    low, high = interval_of(values, confidence=1 - p)
    assert min(abs(low), abs(high)) < 1e-4 * abs(values.mean()) or p <= 2.0 ** (1 - size[1])


def test_variances_are_those_of_the_mean():
    values = draw(np.random.default_rng(9), 20_000, (4, 10), (0.5, 1.0, 2.0))
    from_seeds, from_prompts, at_these_seeds = _variances(values)
    # The rest is drawn anew with every seed; cutting the prompts' part at zero lifts its mean a little.
    assert from_seeds.mean() == pytest.approx((0.5**2 + 2.0**2 / 10) / 4, rel=0.03)
    assert 1 / 10 <= from_prompts.mean() <= 1.1 / 10
    assert (from_seeds + from_prompts).mean() == pytest.approx(values.mean((1, 2)).var(), rel=0.06)
    assert at_these_seeds.mean() == pytest.approx((1.0**2 + 2.0**2 / 4) / 10, rel=0.03)


def test_pairs_are_narrower_than_two_separate_means_on_correlated_data():
    rng = np.random.default_rng(10)
    for shares in SHARES.values():
        common = 3 * rng.standard_normal((1, 60))
        difference = draw(rng, 1, (5, 60), shares)[0]
        sides = [mean_of(common + values) for values in (difference, np.zeros((5, 60)))]
        unpaired, paired = math.hypot(*(side.high - side.low for side in sides)), mean_of(difference)
        assert paired.high - paired.low < (unpaired if shares[0] == 1 else 0.8 * unpaired)


@pytest.mark.parametrize("shape", [(5, 60), (1, 60), (5, 1), (1, 1)])
@pytest.mark.parametrize("binary", [False, True])
def test_a_variant_compared_with_itself_is_not_distinguishable(shape, binary):
    values = np.random.default_rng(15).random(shape)
    by_seed = dict(enumerate((values > 0.5).astype(float) if binary else values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ranking = rank("accuracy", {"one": by_seed, "same": dict(by_seed)})
    (pair,) = ranking.pairs
    assert (pair.difference.mean, pair.p) == (0, 1)
    assert {pair.difference.low, pair.difference.high} <= {0.0, None}
    assert pair.verdict == (NOT_TESTED if values.size == 1 else NOT_DISTINGUISHABLE)
    assert ("nothing can be tested" if values.size == 1 else "not distinguishable") in ranking.sentence


def test_a_ranking_tells_apart_what_can_be_told_apart():
    rng = np.random.default_rng(17)
    common = 3 * rng.standard_normal(60)
    levels = {"best": 1.0, "near": 1.0, "far": 2.0}
    values = {
        name: {seed: common + level + 0.05 * rng.standard_normal(60) for seed in range(5)}
        for name, level in levels.items()
    }
    ranking = rank("reverse_kl", values)
    assert [row.standing for row in ranking.rows] == ["best", NOT_DISTINGUISHABLE, "worse"]
    assert len(ranking.pairs) == 3
    best, near, far = (row.variant for row in ranking.rows)
    assert far == "far"
    assert ranking.sentence == f"`{best}` has the best mean; not distinguishable from it: `{near}`; worse: `far`."
    upwards = rank("accuracy", values)
    assert upwards.rows[0].variant == "far"
    assert upwards.sentence == "`far` is best, and can be told from each of the others."
    neither = rank("length", values)
    assert [row.standing for row in neither.rows] == ["lowest", NOT_DISTINGUISHABLE, "higher"]
    assert {pair.verdict for pair in neither.pairs} == {NOT_DISTINGUISHABLE, "`best` is lower", "`near` is lower"}
    assert neither.sentence == ("No direction of it is good, so nothing is ranked; 2 of 3 pairs can be told apart.")


def test_means_of_other_seeds_do_not_overrule_the_pairs():
    rng = np.random.default_rng(19)
    # Seeds 3 and 4 are easy, and only one of the two variants finished them.
    levels = {"lucky": dict.fromkeys(range(3), 1.1) | {3: 0.1, 4: 0.1}, "better": dict.fromkeys(range(3), 1.0)}
    values = {v: {s: level + 0.01 * rng.random(40) for s, level in by_seed.items()} for v, by_seed in levels.items()}
    ranking = rank("reverse_kl", values | {"alone": {9: np.full(40, 3.0)}})
    assert [row.standing for row in ranking.rows] == ["best", "ahead on common seeds", "not tested"]
    assert ranking.sentence == (
        "`lucky` has the best mean; better on the seeds that both finished: `better`; not tested against it: `alone`."
    )


def test_only_common_seeds_are_paired():
    rng = np.random.default_rng(18)
    values = {
        name: {seed: rng.random(40) for seed in seeds} for name, seeds in {"a": (1, 2, 3), "b": (2, 3, 4)}.items()
    }
    ranking = rank("reverse_kl", values)
    found = ranking.pairs[0].difference
    better, worse = (values[row.variant] for row in ranking.rows)
    assert found.seeds == 2
    assert found.mean == pytest.approx(np.mean([better[seed] - worse[seed] for seed in (2, 3)]))
    apart = rank("reverse_kl", {"a": {1: rng.random(9)}, "b": {2: rng.random(9)}})
    assert apart.pairs == []
    assert apart.sentence == "No two variants share a finished seed: nothing is compared."
