"""Every registered estimator holds every law, with its defaults and with each variant; and every law can be broken."""

import re
from dataclasses import replace

import pytest
import torch

from lit_opd import estimators
from lit_opd.errors import UserError
from lit_opd.estimators.contract import BoundEstimator, EstimatorSpec
from lit_opd.estimators.needs import read_needs
from lit_opd.estimators.oracle.batches import example_batch
from lit_opd.estimators.oracle.claims import CLAIMS
from lit_opd.estimators.oracle.laws import LAWS, broken_laws, cases
from lit_opd.functional.precision import upcast
from lit_opd.functional.returns import return_to_go
from lit_opd.types import Estimate


def registered_cases():
    for name in estimators.names():
        for keywords in cases(estimators.get(name)):
            yield pytest.param(name, keywords, id="-".join([name, *(f"{k}={v}" for k, v in keywords.items())]))


@pytest.mark.parametrize(("name", "keywords"), registered_cases())
def test_registered_estimator_holds_every_law(name, keywords):
    try:
        estimator = estimators.build(name, **keywords)
    except UserError as error:
        pytest.fail(f"{error} {name!r} cannot be built from its defaults: register it with `variants`.")
    assert broken_laws(estimator) == {}


# Deliberately wrong estimators. What is right in them is the sampled reverse KL of each position, or of the sequence.


def log_ratio(tokens):
    return upcast(tokens.student_logps_BT).detach() - upcast(tokens.teacher_logps_BT)


def estimate(tokens, advantage):
    return Estimate(advantage * upcast(tokens.student_logps_BT), log_ratio(tokens))


def right(tokens):
    return estimate(tokens, log_ratio(tokens))


def on_support(tokens, *, k=2, support="teacher"):
    """Truncated reverse KL of the support, its empty slots left out."""
    student, teacher = tokens.student_support_logps_BTK, tokens.teacher_support_logps_BTK
    terms = upcast(student).exp() * (upcast(student) - upcast(teacher))
    return Estimate(terms.masked_fill(~tokens.support_mask_BTK, 0.0).sum(-1), log_ratio(tokens))


def to_go(tokens, log_ratio_BT):
    return estimate(tokens, return_to_go(log_ratio_BT, 1.0))


def reads_the_kl(tokens):
    return estimate(tokens, log_ratio(tokens) - tokens.kl_BT)


def averages_by_itself(tokens):
    made = right(tokens)
    return replace(made, loss_BT=made.loss_BT.mean())


def counts_what_it_clips(tokens):
    made = right(tokens)
    return replace(made, clipped_BT=(made.kl_BT > 1).double())


def clips_rows(tokens):
    made = right(tokens)
    return replace(made, clipped_BT=(made.kl_BT > 1).any(1))


def kl_with_grad(tokens):
    return replace(right(tokens), kl_BT=tokens.student_logps_BT - tokens.teacher_logps_BT)


def loss_without_grad(tokens):
    made = right(tokens)
    return replace(made, loss_BT=made.loss_BT.detach())


def writes_into_the_batch(tokens):
    tokens.teacher_logps_BT.clamp_(min=-1)
    return right(tokens)


def rounds_to_fp32(tokens):
    made = right(tokens)
    return Estimate(made.loss_BT.float(), made.kl_BT.float())


def computes_in_bf16(tokens):
    ratio = tokens.student_logps_BT.detach() - tokens.teacher_logps_BT
    return Estimate(ratio * tokens.student_logps_BT, ratio)


def upcasts_too_late(tokens):
    made = computes_in_bf16(tokens)
    return Estimate(upcast(made.loss_BT), upcast(made.kl_BT))


def forgets_the_mask(tokens):
    return to_go(tokens, log_ratio(tokens))


def masks_by_multiplication(tokens):
    return to_go(tokens, log_ratio(tokens) * tokens.mask_BT)


def divides_by_the_count(tokens):
    made = right(tokens)
    return replace(made, loss_BT=made.loss_BT / tokens.mask_BT.sum())


def reads_empty_slots(tokens, *, k=2, support="union"):
    return on_support(replace(tokens, support_mask_BTK=torch.ones_like(tokens.support_mask_BTK)))


def centres_over_the_batch(tokens):
    counted = log_ratio(tokens)[tokens.mask_BT]
    return estimate(tokens, log_ratio(tokens) - (counted.mean() if len(counted) else 0.0))


def centres_over_all_prompts(tokens):
    assert tokens.groups_B is not None
    return centres_over_the_batch(tokens)


def divides_by_the_deviation_of_the_group(tokens):
    advantage_BT = torch.zeros_like(log_ratio(tokens))
    for group in tokens.groups_B.unique():
        sums = torch.where(tokens.mask_BT, log_ratio(tokens), 0.0)[tokens.groups_B == group].sum(1)
        advantage_BT[tokens.groups_B == group] = (
            (sums - sums.mean()) / ((sums - sums.mean()).square().sum() / (len(sums) - 1)).sqrt()
        )[:, None]
    return estimate(tokens, advantage_BT)


def squares_the_ratio(tokens):
    """exp(-d) squared: finite in float64, where the other laws look."""
    return estimate(tokens, (-log_ratio(tokens)).exp().square())


def weighs_by_padded_length(tokens):
    made = right(tokens)
    return replace(made, loss_BT=made.loss_BT / tokens.mask_BT.shape[-1])


def looks_at_the_sampled_token(tokens, *, k=2):
    made = on_support(tokens)
    return replace(made, loss_BT=made.loss_BT + 0.0 * made.kl_BT)


def sign_flip(tokens):
    return estimate(tokens, -log_ratio(tokens))


def log_ratio_as_loss(tokens):
    return Estimate(upcast(tokens.student_logps_BT) - upcast(tokens.teacher_logps_BT), log_ratio(tokens))


def nan_gradient(tokens):
    return estimate(tokens, log_ratio(tokens) * torch.nan)


def made(fn, *, needs="token", family="token", keywords=None, **contract):
    return BoundEstimator(
        EstimatorSpec(fn.__name__, fn, family=family, needs=read_needs("needs", needs), **contract), keywords or {}
    )


UNBIASED = {"target": "reverse_kl", "unbiased": True}
MUTANTS = [
    ("works_on_what_it_needs", made(reads_the_kl), r"need \(token\) it raises TypeError"),
    ("returns_one_value_a_position", made(averages_by_itself), r"loss_BT of shape \[4, 5\].* finds shape \[\]"),
    ("returns_one_value_a_position", made(counts_what_it_clips), "clipped_BT of torch.bool and finds torch.float64"),
    ("returns_one_value_a_position", made(clips_rows), r"clipped_BT of shape \[4, 5\].* finds shape \[4\]"),
    ("only_the_loss_carries_grad", made(kl_with_grad), "KL estimate carries a gradient"),
    ("only_the_loss_carries_grad", made(loss_without_grad), "loss carries no gradient"),
    ("leaves_its_inputs_alone", made(writes_into_the_batch), "changes teacher_logps_BT in place"),
    ("float64_stays", made(rounds_to_fp32), "loss of a float64 batch is torch.float32"),
    ("bf16_is_raised_before_any_maths", made(computes_in_bf16), "loss of a bf16 batch is torch.bfloat16"),
    ("bf16_is_raised_before_any_maths", made(upcasts_too_late), "`upcast` comes too late"),
    ("masked_garbage_has_no_effect", made(forgets_the_mask, family="sequence"), "of student_logps_BT changes the loss"),
    ("masked_non_finite_teacher_has_no_effect", made(masks_by_multiplication, family="sequence"), "nan at masked"),
    ("all_masked_gives_zero", made(divides_by_the_count, family="sequence"), "student_logps_BT is not zero"),
    ("empty_support_slots_have_no_effect", made(reads_empty_slots, needs="support"), "empty slots"),
    ("slices_like_the_whole", made(centres_over_the_batch), "slice of positions gives other values"),
    ("other_rows_do_not_matter", made(centres_over_the_batch, family="sequence"), "on the rows beside it"),
    ("other_rows_do_not_matter", made(centres_over_all_prompts, family="sequence", needs="token+groups"),
     "completions of other prompts"),
    ("one_completion_a_prompt_stays_finite",
     made(divides_by_the_deviation_of_the_group, family="sequence", needs="token+groups"), "one completion a prompt"),
    ("large_log_ratios_stay_finite", made(squares_the_ratio), r"its loss in fp32 is (-?inf|nan)"),
    ("padding_has_no_effect", made(weighs_by_padded_length, family="sequence"), "padding changes"),
    ("padding_has_no_effect", made(nan_gradient), "no finite loss"),
    ("sampled_token_outside_the_support", made(looks_at_the_sampled_token, needs="support"),
     "changes the loss"),
    ("bias_is_as_declared", made(sign_flip, **UNBIASED), "off by 200.0% of its norm"),
    ("bias_is_as_declared", made(right, target="reverse_kl"), "say unbiased=True"),
    ("bias_is_as_declared", made(right, target="reverse"), "'reverse' is unknown"),
    ("bias_is_as_declared", made(right, unbiased=True), "no target"),
    ("bias_is_as_declared", made(nan_gradient, **UNBIASED), "is not finite"),
    ("gradient_at_equal_models_is_as_declared", made(log_ratio_as_loss), "say at_equal='expectation'"),
    ("gradient_at_equal_models_is_as_declared", made(right, at_equal="never"), "say at_equal='sample'"),
    ("gradient_at_equal_models_is_as_declared", made(on_support, needs="support"), "'never'"),
]  # fmt: skip


@pytest.mark.parametrize(("law", "mutant", "how"), MUTANTS, ids=[f"{m[0]}-{m[1].spec.name}" for m in MUTANTS])
def test_wrong_estimator_is_caught(law, mutant, how):
    assert re.search(how, broken_laws(mutant)[law])


def test_every_law_has_an_estimator_that_breaks_it():
    assert {law for law, *_ in MUTANTS} == set(LAWS)


@pytest.mark.parametrize("estimator", [
    made(right, **UNBIASED), made(lambda tokens: to_go(tokens, log_ratio(tokens).masked_fill(~tokens.mask_BT, 0.0)),
                                  family="sequence", target="sequence_reverse_kl", unbiased=True),
    made(on_support, needs="support", keywords={"support": "union"}, at_equal="never"),
])  # fmt: skip
def test_what_the_wrong_ones_are_made_from_is_right(estimator):
    assert broken_laws(estimator) == {}


def test_an_exception_breaks_a_law():
    def fails(tokens):
        if not tokens.mask_BT.all():
            raise ValueError("a hole")
        return right(tokens)

    assert list(broken_laws(made(fails))) == ["works_on_what_it_needs"]  # of the others nothing can be said

    def fails_on_slices(tokens):
        if tokens.mask_BT.dim() != 2:
            raise ValueError("not [B, T]")
        return right(tokens)

    assert broken_laws(made(fails_on_slices)) == {"slices_like_the_whole": "it raises ValueError: not [B, T]"}


def test_only_the_asked_laws_are_checked():
    assert set(broken_laws(made(sign_flip, **UNBIASED), {"float64_stays": LAWS["float64_stays"]})) == set()
    assert set(broken_laws(made(sign_flip, **UNBIASED), CLAIMS)) == {"bias_is_as_declared"}


def test_one_completion_a_prompt_may_be_refused():
    def refuses(tokens):
        if len(tokens.groups_B.unique()) == len(tokens.groups_B):
            raise UserError("rollout.num_completions", "at least 2", 1, "Set it.")
        return right(tokens)

    law = LAWS["one_completion_a_prompt_stays_finite"]
    assert law(made(refuses, family="sequence", needs="token+groups")) is None


def test_cases_are_defaults_and_variants_on_a_small_support():
    assert cases(estimators.get("token")) == ({},)
    assert cases(estimators.get("teacher_topk"))[0] == {"k": 2}
    assert {"gamma": 1.0} in cases(estimators.get("hybrid"))
    assert cases(estimators.get("k_step"))[:2] == ({"steps": 2}, {"steps": 1})  # the default, 8, is not met
    assert {} not in cases(estimators.get("mix"))  # it has no default terms


def test_an_estimator_without_usable_defaults_asks_for_a_row():
    def needy(tokens, *, level):
        return right(tokens)

    (keywords,) = cases(EstimatorSpec("needy", needy))
    with pytest.raises(UserError, match="missing a required argument: 'level'"):
        estimators.build(needy, **keywords)


def test_a_batch_holds_what_is_needed_and_no_more():
    assert example_batch(made(right)).support_ids_BTK is None
    tokens = example_batch(made(right, needs="full+entropy"))
    assert tokens.teacher_full_logps_BTV is not None
    assert tokens.student_entropy_BT is not None
    assert tokens.kl_BT is None


def test_mix_is_the_weighted_sum_of_its_terms():
    terms = {"sequence": 1, "full_vocab": {"weight": 0.5, "divergence": "forward_kl"}}
    mixed, tokens = estimators.build("mix", terms=terms), example_batch(made(right, needs="full"))
    parts = [estimators.build("sequence")(tokens), estimators.build("full_vocab", divergence="forward_kl")(tokens)]
    found = mixed(tokens)
    torch.testing.assert_close(found.loss_BT, parts[0].loss_BT + 0.5 * parts[1].loss_BT, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.kl_BT, (parts[0].kl_BT + 0.5 * parts[1].kl_BT) / 1.5, rtol=0, atol=1e-14)
