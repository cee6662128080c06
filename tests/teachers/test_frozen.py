"""What a scorer in this process says, against dense references."""

from dataclasses import replace

import pytest
import torch

from lit_opd import estimators
from lit_opd.models import LanguageModel
from lit_opd.teachers import LocalScorer, Wanted, wanted_by
from lit_opd.types import ScoredRollout

ROWS = [1, 3, 1000]


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("name", "kwargs"), [("token", {}), ("sequence", {}), ("teacher_topk", {"k": 5}), ("full_vocab", {})]
)
def test_scores_hold_what_the_estimator_needs_and_no_more(name, kwargs, rows, two_models):
    _, teacher, rollout, _, logps = two_models
    scores = LocalScorer(teacher, rows).score(rollout, wanted_by(estimators.build(name, **kwargs)))
    filled = {name for name, value in vars(scores).items() if value is not None}
    if name == "full_vocab":
        assert filled == {"full"}
        return close(scores.full.logps(slice(0, len(logps))), logps)
    close(scores.logps_N, logps.gather(-1, rollout.ids_BT[rollout.mask_BT][:, None])[:, 0])
    if name == "teacher_topk":
        assert filled == {"logps_N", "support_ids_NK", "support_logps_NK"}
        close(scores.support_logps_NK, logps.sort(descending=True).values[:, :5])
        return close(logps.gather(-1, scores.support_ids_NK), scores.support_logps_NK)
    return None if filled == {"logps_N"} else pytest.fail(str(filled))


@pytest.mark.parametrize("name", ["token", "teacher_topk", "full_vocab"])
def test_nothing_counted_is_scored_as_nothing(name, two_models):
    _, teacher, rollout, _, _ = two_models
    scores = LocalScorer(teacher, 4).score(rollout.uncount(rollout.mask_BT), wanted_by(estimators.build(name)))
    assert all(len(value) == 0 for value in vars(scores).values() if value is not None)


def test_needs_and_support_size_of_a_mix():
    mix = estimators.build("mix", terms={"sequence": 1, "teacher_topk": {"weight": 1, "k": 5}, "full_vocab": 1})
    assert mix.needs == {"token", "support", "full"}
    assert mix.largest_support == 5
    assert wanted_by(mix) == Wanted(full=True)
    assert estimators.build("token").largest_support == 0
    assert wanted_by(estimators.build("token")) == Wanted()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("resopd", Wanted(support=16)), ("topk_tail_forward_kl", Wanted(support=16)), ("log_ratio_sign", Wanted()),
     ("fixed_advantage", Wanted())],
)  # fmt: skip
def test_a_teacher_that_gives_no_whole_distribution_is_enough(name, wanted):
    """Only the student's own support asks for what a teacher knows of tokens that it does not name."""
    assert wanted_by(estimators.build(name)) == wanted
    if wanted.support:
        assert wanted_by(estimators.build(name, support="student")).full


@pytest.mark.parametrize("rows", ROWS)
def test_the_reference_is_scored_at_the_sampled_tokens_only(rows, two_models, make_model, tiny_tokenizer, full_logits):
    _, teacher, rollout, _, _ = two_models
    reference = LanguageModel(make_model(3, torch.float64), tiny_tokenizer, "reference", own_precision=True)
    logps = full_logits(reference.model, rollout).log_softmax(-1).gather(-1, rollout.ids_BT[..., None])
    scorer = LocalScorer(reference, rows, "reference")
    found = scorer.score(rollout, Wanted())
    close(found.logps_N, logps[..., 0][rollout.mask_BT])
    assert {name for name, value in vars(found).items() if value is not None} == {"logps_N"}
    assert scorer.score(rollout.uncount(rollout.mask_BT), Wanted()).logps_N.shape == (0,)


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(support=5), Wanted(full=True)])
def test_scores_of_chosen_rows_are_those_of_the_rows_alone(wanted, two_models):
    """Sliced scores own their head: they say the same when they are read later."""
    student, teacher, rollout, _, _ = two_models
    scorer, index = LocalScorer(teacher, 3), torch.tensor([4, 1, 7])
    chosen = ScoredRollout(rollout, {"teacher": scorer.score(rollout, wanted)}).rows(index)
    expected, found = scorer.score(chosen.rollout, wanted), chosen.scores["teacher"]
    for name in ("logps_N", "support_ids_NK", "support_logps_NK"):
        if getattr(expected, name) is not None:
            close(getattr(found, name), getattr(expected, name).double())
    if wanted.full:
        everything = slice(0, len(expected.full))
        close(found.full.logps(everything), expected.full.logps(everything))


def test_a_scorer_reads_its_own_prompt(two_models, make_batch, full_logits):
    """The same completions after another prompt, which only this scorer is shown."""
    _, teacher, rollout, _, _ = two_models
    own = rollout.prompts._replace(ids_BP=rollout.prompts.ids_BP.roll(1, dims=1) * rollout.prompts.mask_BP)
    shown = replace(rollout, shown={"teacher": own})
    expected = full_logits(teacher.model, replace(rollout, prompts=own)).log_softmax(-1)[rollout.mask_BT]
    found = LocalScorer(teacher, 3).score(shown, Wanted(full=True)).full
    close(found.logps(slice(0, len(found))), expected)
    other = LocalScorer(teacher, 3, "reference").score(shown, Wanted(full=True)).full
    assert (other.logps(slice(0, len(found))) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "kwargs"), [("token", {}), ("teacher_topk", {"k": 5}), ("full_vocab", {})])
def test_the_teacher_s_temperature_is_in_every_score(name, kwargs, two_models, full_logits, tiny_tokenizer):
    _, teacher, rollout, _, _ = two_models
    warm = LanguageModel(teacher.model, tiny_tokenizer, "teacher", own_precision=True, temperature=0.3)
    expected = (full_logits(teacher.model, rollout) / 0.3).log_softmax(-1)[rollout.mask_BT]
    scores = LocalScorer(warm, 4).score(rollout, wanted_by(estimators.build(name, **kwargs)))
    if name == "full_vocab":
        return close(scores.full.logps(slice(0, len(expected))), expected)
    if name == "teacher_topk":
        close(scores.support_logps_NK, expected.gather(-1, scores.support_ids_NK))
    return close(scores.logps_N, expected.gather(-1, rollout.ids_BT[rollout.mask_BT][:, None])[:, 0])
