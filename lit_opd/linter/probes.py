"""Try an estimator on small models to find what it does: names and declarations do not count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_opd.errors import UserError
from lit_opd.estimators import BoundEstimator, Term
from lit_opd.estimators.asking import check_estimate
from lit_opd.estimators.oracle.batches import (
    difference,
    example_batch,
    loss_and_gradients,
    per_position,
    same,
    with_leaves,
)
from lit_opd.estimators.oracle.verdict import verify
from lit_opd.types import Need, TokenBatch

__all__ = ["Probe", "probe"]

_PROBED_SUPPORT = 32  # what is wrong with a large support is wrong with a small one, which is tried in milliseconds


class Probe(NamedTuple):
    """The behaviour of one term of an estimator on small models.

    Attributes:
        name: of its estimator.
        support_size: K, 0 where it compares no support.
        dead: samples have gradients, and their expectation is zero.
        silent: no sample has any gradient; not said of what learns from demonstrations, as there are none to try.
        ignores_teacher: another teacher would give the same gradients.
        whitened: twice as large log-ratios would give the same gradients.
        couples: a token's cost is made of other tokens' too.
        leaks: a counted position's gradient depends on values at masked ones.
        taught: it learns from demonstrations alone.
        error: why it could not be tried, else empty.
    """

    name: str
    support_size: int
    dead: bool = False
    silent: bool = False
    ignores_teacher: bool = False
    whitened: bool = False
    couples: bool = False
    leaks: bool = False
    taught: bool = False
    error: str = ""


def probe(term: Term) -> Probe:
    """Try one term with the weights of its tokens on small models, with no randomness of the caller used up.

    Raises:
        UserError: what it returns is no estimate.
    """
    name, size = term.estimator.spec.name, term.estimator.support_size
    term = _with_small_support(term)
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            tokens, _ = with_leaves(example_batch(_alone(term)))
            check_estimate(name, term.estimator(tokens), tokens)
            found, (couples, leaks) = verify(_alone(term)), _couplings(term)
            taught = found.silent and not term.estimator.spec.on_policy and Need.TOKEN in term.estimator.spec.needs
            silent = found.silent and not taught
            return Probe(name, size, found.dead, silent, found.ignores_teacher, found.whitened, couples, leaks, taught)
    except UserError:
        raise
    except Exception as error:  # a user's function fails in a way of its own
        return Probe(name, size, error=f"{type(error).__name__}: {error}")


def _with_small_support(term: Term) -> Term:
    inner = term.estimator
    if inner.support_size <= _PROBED_SUPPORT:
        return term
    return term._replace(estimator=replace(inner, kwargs={**inner.kwargs, "k": _PROBED_SUPPORT}))


def _alone(term: Term) -> BoundEstimator:
    """An estimator that is nothing but this term."""
    return BoundEstimator(term.estimator.spec, term.estimator.kwargs, (term._replace(weight=1.0),))


def _couplings(term: Term) -> tuple[bool, bool]:
    """Tell whether a position's cost depends on others of its sequence, and whether any depends on masked ones."""
    if term.is_local and term.weighting is None:  # called on slices of counted positions
        return False, False
    alone = _alone(term)
    tokens = example_batch(alone)
    one_BT = torch.zeros_like(tokens.mask_BT)
    one_BT[0, 1] = True
    others_BT = tokens.mask_BT & ~one_BT
    others_BT[1:] = False
    (_, before), (_, after) = (loss_and_gradients(alone, batch) for batch in (tokens, _moved(tokens, one_BT)))
    couples = any(not same(after[name][others_BT], before[name][others_BT]) for name in before)
    return couples and not term.is_local, difference(alone, tokens, _moved(tokens, ~tokens.mask_BT)) is not None


def _moved(tokens: TokenBatch, where_BT: Tensor) -> TokenBatch:
    """Move the numbers at some positions, each field by another amount so that ratios move too."""
    moved: dict[str, Any] = {}
    for step, name in enumerate(per_position(tokens), start=1):
        value = getattr(tokens, name)
        if value.is_floating_point():
            where = where_BT.reshape(where_BT.shape + (1,) * (value.dim() - 2))
            moved[name] = torch.where(where, value - 0.1 * step, value)
    return replace(tokens, **moved)
