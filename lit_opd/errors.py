"""Mistakes of the user and failures of a run, and how they are told."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["RunError", "UserError", "choose", "suggest"]


class UserError(Exception):
    """A mistake in what the user asked for, in one line: the key, what was expected, what was found, the remedy."""

    def __init__(self, key: str, expected: str, found: object, remedy: str) -> None:
        self.key, self.expected, self.found, self.remedy = key, expected, found, remedy
        told = str(found).rstrip(".")  # words of another library may bring a full stop of their own
        text = f"{key}: expected {expected}, found {told}. {remedy}"
        super().__init__(" ".join(text.split()))


class RunError(RuntimeError):
    """A run that cannot go on, though nobody made a mistake: told in one line, without traceback."""


def suggest(word: str, known: Iterable[str]) -> str:
    """The remedy for a misspelt word: the nearest known one, or the list of all (a sentence)."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def choose(key: str, value: str, allowed: Iterable[str]) -> None:
    """Check that a value is one of the allowed words.

    Raises:
        UserError: it is not.
    """
    allowed = list(allowed)
    if value not in allowed:
        raise UserError(key, f"one of {', '.join(allowed)}", repr(value), suggest(value, allowed))
