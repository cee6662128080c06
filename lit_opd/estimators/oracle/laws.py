"""Hold every estimator to the laws, whoever wrote it, in tests over the registry and in the command `check`.

A law takes an estimator with its keywords and returns None where it is held, or one sentence on how it is broken.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_opd.errors import UserError
from lit_opd.estimators.asking import check_estimate
from lit_opd.estimators.contract import BoundEstimator, EstimatorSpec
from lit_opd.estimators.needs import write_needs
from lit_opd.estimators.oracle.batches import (
    ROUNDING,
    batch_of,
    cast,
    difference,
    difference_where_masked,
    example_batch,
    loss_and_gradients,
    per_position,
    same,
    spoil_masked,
    take_rows,
    tensors,
    vocabulary_for,
    with_leaves,
)
from lit_opd.estimators.oracle.claims import CLAIMS, Law
from lit_opd.estimators.undeclared import why_it_failed
from lit_opd.types import Estimate, Need, TokenBatch

__all__ = ["LAWS", "broken_laws", "cases", "small_keywords", "works_on_what_it_needs"]

_SUPPORT = 2


def small_keywords(spec: EstimatorSpec) -> dict[str, Any]:
    """Choose the keywords that fit small models: a support that leaves tokens out, and limits that are met."""
    return ({"k": _SUPPORT} if Need.SUPPORT in spec.needs else {}) | dict(spec.small)


def cases(spec: EstimatorSpec) -> tuple[dict[str, Any], ...]:
    """List keywords to test an estimator with: its defaults, where it has any, and its variants, on small models."""
    small = small_keywords(spec)
    incomplete = any(default is inspect.Parameter.empty for default in (spec.defaults | small).values())
    variants = [dict(variant.keywords) for variant in spec.variants]
    return tuple(small | keywords for keywords in (variants if variants and incomplete else [{}, *variants]))


def broken_laws(estimator: BoundEstimator, laws: Mapping[str, Law] | None = None) -> dict[str, str]:
    """Find the laws, by default of `LAWS`, that an estimator breaks, each with how, where an exception breaks one too.

    Where the first is broken the others are not asked.
    """
    found: dict[str, str] = {}
    for name, law in (LAWS if laws is None else laws).items():
        try:
            broken = law(estimator)
        except Exception as error:  # whatever somebody's estimator raises
            broken = _raises(error)
        if broken:
            found[name] = broken
        if works_on_what_it_needs.__name__ in found:
            break
    return found


def works_on_what_it_needs(estimator: BoundEstimator) -> str | None:
    """Call an estimator on a batch with no more than the fields it declares, as others are not computed."""
    tokens = example_batch(estimator)
    try:
        estimate = estimator(tokens)
    except Exception as error:  # whatever somebody's estimator raises
        told = f"on a batch of what it declares to need ({write_needs(estimator.needs)}) {_raises(error)}"
        return f"{told}. {why_it_failed(estimator, tokens, error)}".rstrip(". ")
    if not isinstance(estimate, Estimate):
        return f"it returns a {type(estimate).__name__}: return an Estimate(loss_BT=..., kl_BT=...) of lit_opd.types"
    return None


def _raises(error: Exception) -> str:
    return f"it raises {type(error).__name__}: {' '.join(str(error).split())}"


def returns_one_value_a_position(estimator: BoundEstimator) -> str | None:
    """Demand of an fp32 batch what training does, above all one value a position, or micro-batches would matter."""
    tokens = cast(example_batch(estimator), torch.float32)
    try:
        check_estimate("it", estimator(tokens), tokens)
    except UserError as error:
        return f"training expects {error.expected} and finds {error.found}"
    return None


def only_the_loss_carries_grad(estimator: BoundEstimator) -> str | None:
    """Demand a gradient of the loss alone, as a logged KL that carries one keeps every graph alive."""
    estimate = estimator(with_leaves(example_batch(estimator))[0])
    if not estimate.loss_BT.requires_grad:
        return "its loss carries no gradient"
    return "its KL estimate carries a gradient: detach it" if estimate.kl_BT.requires_grad else None


def leaves_its_inputs_alone(estimator: BoundEstimator) -> str | None:
    """Forbid changes in place, which the next estimator of the same batch would read."""
    tokens = example_batch(estimator)
    before = {name: value.clone() for name, value in tensors(tokens).items()}
    loss_and_gradients(estimator, tokens)
    changed = [name for name, value in before.items() if not torch.equal(getattr(tokens, name), value)]
    return f"it changes {', '.join(changed)} in place" if changed else None


def float64_stays(estimator: BoundEstimator) -> str | None:
    """Demand float64 of a float64 batch, as the oracle's answers are exact in no other."""
    estimate = estimator(example_batch(estimator))
    for name, value in (("loss", estimate.loss_BT), ("KL", estimate.kl_BT)):
        if value.dtype != torch.float64:
            return f"its {name} of a float64 batch is {value.dtype}"
    return None


def bf16_is_raised_before_any_maths(estimator: BoundEstimator) -> str | None:
    """Demand fp32 maths of a bf16 batch, as a KL in bf16 is noise at the values that matter."""
    low = cast(example_batch(estimator), torch.bfloat16)
    found, expected = estimator(low), estimator(cast(low, torch.float32))
    for name, value, raised in (("loss", found.loss_BT, expected.loss_BT), ("KL", found.kl_BT, expected.kl_BT)):
        if value.dtype != torch.float32:
            return f"its {name} of a bf16 batch is {value.dtype}: raise every log-probability with `upcast` first"
        if not torch.equal(value, raised):
            return f"its {name} of a bf16 batch differs from that of the same numbers in fp32: `upcast` comes too late"
    return None


def masked_garbage_has_no_effect(estimator: BoundEstimator) -> str | None:
    """Put garbage at masked positions, as padding may hold anything, and demand the same loss and gradients."""
    tokens, vocabulary = example_batch(estimator), vocabulary_for(estimator)
    generator = torch.Generator().manual_seed(3)

    def garbage(value: Tensor) -> Tensor:
        if value.dtype == torch.bool:
            return ~value
        if not value.is_floating_point():
            return torch.randint(vocabulary, value.shape, generator=generator)
        return 100 * torch.randn(value.shape, generator=generator, dtype=value.dtype)

    for name in per_position(tokens):
        if broken := difference_where_masked(estimator, tokens, spoil_masked(tokens, name, garbage)):
            return f"garbage at masked positions of {name} {broken}"
    return None


def masked_non_finite_teacher_has_no_effect(estimator: BoundEstimator) -> str | None:
    """Put infinite and NaN scores at masked positions, which only `where` masks, as 0 times NaN is NaN.

    The law is for what sees [B, T]: per-position estimators are called on counted positions only.
    """
    tokens = example_batch(estimator)
    for garbage in (torch.nan, torch.inf, -torch.inf):
        dirty = spoil_masked(tokens, "teacher_logps_BT", partial(torch.full_like, fill_value=garbage))
        for term in estimator.terms:
            if not term.is_local and (broken := difference_where_masked(term.__call__, tokens, dirty)):
                return f"teacher_logps_BT of {garbage} at masked positions {broken}"
            factors, expected = (term.factors(batch)[tokens.mask_BT] for batch in (dirty, tokens))
            if not same(factors, expected):
                return f"teacher_logps_BT of {garbage} at masked positions changes the weights of counted ones"
    return None


def all_masked_gives_zero(estimator: BoundEstimator) -> str | None:
    """Demand zero of a micro-batch without any counted token."""
    tokens = example_batch(estimator)
    loss, gradients = loss_and_gradients(estimator, replace(tokens, mask_BT=torch.zeros_like(tokens.mask_BT)))
    if loss != 0:
        return f"where every position is masked its loss is {float(loss)}"
    wrong = [name for name, gradient in gradients.items() if not (gradient == 0).all()]
    return f"where every position is masked, its gradient on {wrong[0]} is not zero" if wrong else None


def empty_support_slots_have_no_effect(estimator: BoundEstimator) -> str | None:
    """Put other values into empty slots, which a union or an intersection of supports leaves."""
    tokens = example_batch(estimator)
    if tokens.support_mask_BTK is None or tokens.support_mask_BTK.all():
        return None
    mask_BTK = tokens.support_mask_BTK
    supports = {name: value for name, value in tensors(tokens).items() if name.endswith("support_logps_BTK")}
    spoilt = {name: torch.where(mask_BTK, value, value - 1.5) for name, value in supports.items()}
    broken = difference(estimator, tokens, replace(tokens, **spoilt))  # type: ignore[arg-type]
    return f"other values in empty slots of the support {broken}" if broken else None


def slices_like_the_whole(estimator: BoundEstimator) -> str | None:
    """Call an estimator of the `token` family on slices of positions, as chunks end anywhere."""
    tokens = example_batch(estimator)
    for term in (term.estimator for term in estimator.terms if term.is_local):
        mask_BT, whole = tokens.mask_BT, term(tokens)
        flat = {name: value[mask_BT] for name, value in tensors(tokens).items() if not name.endswith("_B")}
        for part in (slice(None), slice(0, 3), slice(3, None), slice(0, 0)):
            sliced = {name: value[part] for name, value in flat.items()}
            estimate = term(TokenBatch(**sliced, progress=tokens.progress))
            for found, expected in ((estimate.loss_BT, whole.loss_BT), (estimate.kl_BT, whole.kl_BT)):
                if not same(found, expected[mask_BT][part]):
                    return "a slice of positions gives other values than the same positions of the whole batch"
        _, inside = loss_and_gradients(term, tokens)
        _, alone = loss_and_gradients(term, TokenBatch(**flat, progress=tokens.progress))
        if not all(same(alone[name], gradient[mask_BT]) for name, gradient in inside.items()):
            return "positions alone have other gradients than inside the whole batch"
    return None


def other_rows_do_not_matter(estimator: BoundEstimator) -> str | None:
    """Take rows away, as those that share a micro-batch do so by accident, but for `groups` of one prompt."""
    tokens = example_batch(estimator)
    units = [[0], [1], [2], [3]] if tokens.groups_B is None else [[0, 1], [2, 3]]
    whole, (_, inside) = estimator(tokens), loss_and_gradients(estimator, tokens)
    for rows in (torch.tensor(unit) for unit in units):
        part = take_rows(tokens, rows)
        _, alone = loss_and_gradients(estimator, part)
        counted = torch.where(part.mask_BT, estimator(part).loss_BT - whole.loss_BT[rows], 0.0)
        if counted.abs().max() > ROUNDING or not all(same(alone[n], g[rows]) for n, g in inside.items()):
            others = "the rows beside it" if tokens.groups_B is None else "completions of other prompts"
            return f"a row's loss depends on {others}"
    return None


def one_completion_a_prompt_stays_finite(estimator: BoundEstimator) -> str | None:
    """Leave every prompt one completion, whose standard deviation is NaN, to be refused or coped with."""
    tokens = example_batch(estimator)
    if tokens.groups_B is None:
        return None
    try:
        loss, gradients = loss_and_gradients(estimator, replace(tokens, groups_B=torch.arange(len(tokens.groups_B))))
    except UserError:
        return None
    finite = loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())
    return None if finite else "with one completion a prompt it has no finite loss and gradient"


def large_log_ratios_stay_finite(estimator: BoundEstimator) -> str | None:
    """Let student and teacher disagree by e^60, as on some tokens of every real run, in fp32."""
    tokens = example_batch(estimator)
    assert tokens.completion_ids_BT is not None
    signs = torch.tensor([1.0, -1.0]).repeat(10).view(4, 5, 1)
    apart_BTV = torch.zeros(4, 5, vocabulary_for(estimator))
    apart_BTV.scatter_(-1, tokens.completion_ids_BT[..., None], 60 * signs)
    student_BTV, teacher_BTV = (logits.clamp(max=0).log_softmax(-1) for logits in (apart_BTV, -apart_BTV))
    apart = batch_of(estimator, student_BTV, teacher_BTV, tokens.completion_ids_BT)
    loss, gradients = loss_and_gradients(estimator, apart)
    if not loss.isfinite():
        return f"at log-ratios of +-60 its loss in fp32 is {float(loss)}"
    wrong = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    return f"at log-ratios of +-60 its gradient on {wrong[0]} in fp32 is not finite" if wrong else None


def padding_has_no_effect(estimator: BoundEstimator) -> str | None:
    """Demand of completions of one token what they give beside longer ones."""
    tokens = example_batch(estimator)
    first = torch.zeros_like(tokens.mask_BT)
    first[:, 0] = True
    padded = replace(tokens, mask_BT=first)
    short = replace(padded, **{name: getattr(padded, name)[:, :1] for name in (*per_position(padded), "mask_BT")})
    (long_loss, long), (loss, gradients) = (loss_and_gradients(estimator, batch) for batch in (padded, short))
    if not (loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients.values())):
        return "completions of one token have no finite loss and gradient"
    if not same(loss, long_loss) or not all(same(gradient, long[name][:, :1]) for name, gradient in gradients.items()):
        return "padding changes the loss or gradient of completions of one token"
    return None


def sampled_token_outside_the_support(estimator: BoundEstimator) -> str | None:
    """Let a teacher asked for its top K not know the sampled token, which what learns from the support alone bears.

    The law is for support estimators without a gradient on the sampled token's log-probability.
    """
    tokens = example_batch(estimator)
    before = loss_and_gradients(estimator, tokens)
    if tokens.support_ids_BTK is None or before[1]["student_logps_BT"].any():
        return None
    assert tokens.completion_ids_BT is not None
    inside = (tokens.support_ids_BTK == tokens.completion_ids_BT[..., None]).any(-1)
    unknown = replace(tokens, teacher_logps_BT=tokens.teacher_logps_BT.masked_fill(~inside, -torch.inf))
    broken = difference(estimator, tokens, unknown)
    return f"a teacher that does not know a sampled token outside the support {broken}" if broken else None


_OF_ALL: tuple[Law, ...] = (
    works_on_what_it_needs, returns_one_value_a_position, only_the_loss_carries_grad, leaves_its_inputs_alone,
    float64_stays, bf16_is_raised_before_any_maths, masked_garbage_has_no_effect,
    masked_non_finite_teacher_has_no_effect, all_masked_gives_zero, empty_support_slots_have_no_effect,
    slices_like_the_whole, other_rows_do_not_matter, one_completion_a_prompt_stays_finite,
    large_log_ratios_stay_finite, padding_has_no_effect, sampled_token_outside_the_support,
)  # fmt: skip
LAWS: dict[str, Law] = {law.__name__: law for law in _OF_ALL} | CLAIMS
