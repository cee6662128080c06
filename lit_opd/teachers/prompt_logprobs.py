"""Ask a vLLM server how probable given tokens are, and read its answer with distrust.

The protocol of `ServedScorer` and of the probe that it sends first: a completion of one token, whose prompt is the
sequence to score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lit_opd.errors import UserError
from lit_opd.teachers.replicas import LOOK, Asked

__all__ = ["Row", "ask_for", "read_row"]

PATH = "/v1/completions"
SUM = 1e-3  # how far above 1 rounding may take a sum of probabilities
SCORED = "one log-probability of each token that was sent"


class Row(NamedTuple):
    """Hold what a server says of the last tokens of one sequence.

    Attributes:
        logps: log-probabilities of the tokens, in nats.
        support_ids: the most probable tokens at each position, the most probable first.
        support_logps: their log-probabilities.
    """

    logps: list[float]
    support_ids: list[list[int]]
    support_logps: list[list[float]]


def ask_for(ids: Sequence[int], top: int, model: str, **settings: Any) -> Asked:
    """Make the request that scores a sequence.

    Args:
        ids: the sequence.
        top: how many of the most probable tokens to give at each position.
        model: its name on the server.
        **settings: in the place of those that leave the model's distribution as it is.
    """
    # Every setting is named, so that no default of the server applies.
    plain = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "add_special_tokens": False,
    }  # fmt: skip
    asked = {"model": model, "prompt": list(ids), "max_tokens": 1, "prompt_logprobs": top}
    return PATH, plain | asked | settings


def read_row(answer: dict[str, Any], ids: Sequence[int], first: int, top: int) -> Row:
    """Read the scores of `ids[first:]` from an answer.

    Raises:
        UserError: the answer has none, has those of another sequence, or has numbers that no distribution gives.
    """
    try:
        entries = answer["choices"][0]["prompt_logprobs"]
        scored = len(entries)
    except (KeyError, IndexError, TypeError) as error:
        raise UserError("teacher.server", SCORED, "no prompt_logprobs", "Use vLLM 0.32.") from error
    if scored != len(ids):
        found = f"{scored} positions for {len(ids)} tokens"
        remedy = "The server adds a chat template or a begin-of-sequence token to ids: serve it with plain completions."
        raise UserError("teacher.server", SCORED, found, remedy)
    positions = range(first, scored)
    tables = [{int(token): float(entry["logprob"]) for token, entry in (entries[i] or {}).items()} for i in positions]
    if any(ids[i] not in table for i, table in zip(positions, tables, strict=True)):
        shift = [s for s in (-1, 1) if all(ids[i + s] in t for i, t in zip(positions[:-1], tables, strict=False))]
        found = f"scores of the token {'before' if shift[0] < 0 else 'after'} it" if shift else "scores of other tokens"
        raise UserError("teacher.server", SCORED, found, LOOK)
    for table in tables:
        _check(table)
    best = [sorted(table.items(), key=lambda pair: (-pair[1], pair[0]))[:top] for table in tables]
    if short := [len(kept) for kept in best if len(kept) < top]:
        expected, remedy = f"the {top} most probable tokens at each position", "Lower estimator.kwargs.k."
        raise UserError("teacher.server", expected, f"{min(short)}", remedy)
    logps = [table[ids[i]] for i, table in zip(positions, tables, strict=True)]
    return Row(logps, [[t for t, _ in kept] for kept in best], [[p for _, p in kept] for kept in best])


def _check(table: dict[int, float]) -> None:
    if any(math.isnan(logp) or logp > SUM for logp in table.values()) or sum(map(math.exp, table.values())) > 1 + SUM:
        worst = next((p for p in table.values() if math.isnan(p) or p > SUM), None)
        found = f"{worst}" if worst is not None else f"a sum of probabilities of {sum(map(math.exp, table.values())):g}"
        raise UserError("teacher.server", "log-probabilities of a distribution", found, LOOK)
