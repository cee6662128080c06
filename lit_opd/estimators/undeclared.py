"""Explain why an estimator failed by what it read of a `TokenBatch` and did not ask for.

`asking` tells it of a training step, and the laws of the command `check`.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import fields

from lit_opd.estimators.contract import BoundEstimator
from lit_opd.estimators.needs import FILLERS, needs_of, write_needs
from lit_opd.types import Need, TokenBatch

__all__ = ["why_it_failed"]

_OF_NONE = (TypeError, AttributeError, AssertionError)  # what Python raises where None stands for a tensor


def why_it_failed(estimator: BoundEstimator, tokens: TokenBatch, error: BaseException | None) -> str:
    """Name the field that is empty or does not exist, and how to ask for it, or nothing where that was not the reason.

    Args:
        estimator: it is called once more.
        tokens: what it failed on.
        error: what it raised.
    """
    known = [own.name for own in fields(TokenBatch)]
    if isinstance(error, AttributeError) and isinstance(error.obj, TokenBatch) and error.name not in known:
        return f"A TokenBatch has {', '.join(known)}."
    if not isinstance(error, _OF_NONE):
        return ""
    read = _last_empty(estimator, tokens)
    need = next((need for need, filler in FILLERS.items() if read in filler.fields), None)
    return f"{read} is empty, for it was not asked for: {_asking(estimator, need)}." if need else ""


def _last_empty(estimator: BoundEstimator, tokens: TokenBatch) -> str | None:
    """Call the estimator again, and find the last field without a value that it read before it failed."""
    read: list[str] = []

    class Watched(TokenBatch):
        def __getattribute__(self, name: str) -> object:
            value = super().__getattribute__(name)
            if value is None:
                read.append(name)
            return value

    with suppress(Exception):
        estimator(Watched(**{own.name: getattr(tokens, own.name) for own in fields(tokens)}))
    return read[-1] if read else None


def _asking(estimator: BoundEstimator, need: Need) -> str:
    """Write the declaration that asks for one need more."""
    given = estimator.needs - {Need.TOKEN} if FILLERS[need].per == "token" else estimator.needs
    of_rows = needs_of({need}, "row") and estimator.spec.family == "token"
    family = "family='sequence', " if of_rows else ""
    return f"register_estimator(..., {family}needs={write_needs(given | {need})!r})"
