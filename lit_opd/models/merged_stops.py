"""Find the tokens that the loss counts as one symbol: endings that mean the same to student and teacher.

The training module calls `merged_groups`, and what prepares a run `named_groups`, before weights load.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

from lit_opd.errors import LintWarning, UserError
from lit_opd.models.pair import Pair
from lit_opd.models.vocabulary import token_ids

__all__ = ["AUTO", "merged_groups", "named_groups"]

AUTO = "auto"
_KEY = "estimator.merged_stops"


def merged_groups(given: Any, pair: Pair, masked_ids: Collection[int], teachers: Sequence[str] = ()) -> list[list[int]]:
    """List the groups of ids to merge, where `auto` makes one of both models' stop tokens if they differ.

    Several `teachers` are given by name.

    Raises:
        UserError: as of `named_groups`; `auto` with a teacher whose stop tokens are not known, or with several that do
            not end alike.
    """
    if given != AUTO:
        return named_groups(given, pair.student.tokenizer, masked_ids)
    ends = {key: pair.stop_ids(key) for key in ([f"teachers.{name}" for name in teachers] or ["teacher"])}
    own, other = pair.student.stop_ids, next(iter(ends.values()))
    if any(set(stops) != set(other) for stops in ends.values()):
        expected = "groups of tokens, for the stop tokens of the teachers differ"
        found = f"auto with {', '.join(f'{key} {stops}' for key, stops in ends.items())}"
        raise UserError(_KEY, expected, found, "Name all endings as one group.")
    if set(own) == set(other):
        warnings.warn(f"{_KEY}: auto merges nothing, for both models name the same stop tokens, {own}.", LintWarning, 3)
        return []
    group = [*own, *(index for index in other if index not in own)]
    return _checked([group] if len(group) > 1 else [], masked_ids)


def named_groups(given: Any, tokenizer: Any, masked_ids: Collection[int]) -> list[list[int]]:
    """Look up the ids of the groups that are named, none for null and `auto`.

    Raises:
        UserError: a text or an id that is no token, a token that stands twice, or one that is masked.
    """
    named: Sequence[Any] = () if given in (None, AUTO) else given
    return _checked([token_ids(tokenizer, group, _KEY) for group in named], masked_ids)


def _checked(groups: list[list[int]], masked_ids: Collection[int]) -> list[list[int]]:
    ids = [index for group in groups for index in group]
    twice = sorted({index for index in ids if ids.count(index) > 1})
    if twice:
        raise UserError(_KEY, "every token in one group, once", f"{twice} twice", "Join the groups, or take it out.")
    masked = sorted(set(ids) & set(masked_ids))
    if masked:
        expected = "no masked token: merged, it would count with its group, and masked, it would not"
        raise UserError(_KEY, expected, masked, "Take it out of estimator.masked_tokens, or of the group.")
    return groups
