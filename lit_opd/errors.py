"""Tell mistakes of the user and failures of a run in one line each, which the command line prints without traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["LintWarning", "RunError", "UserError", "choose", "suggest"]


class UserError(Exception):
    """A mistake in what the user asked for, in one line: the key, what was expected, what was found, the remedy."""

    def __init__(self, key: str, expected: str, found: object, remedy: str) -> None:
        self.key, self.expected, self.found, self.remedy = key, expected, found, remedy
        told = str(found).rstrip(".")  # words of another library may bring a full stop of their own
        text = f"{key}: expected {expected}, found {told}. {remedy}"
        super().__init__(" ".join(text.split()))


class RunError(RuntimeError):
    """A run that cannot go on, though nobody made a mistake."""


class LintWarning(UserWarning):
    """A warning of what may not do what it says, or that was let pass knowingly. Commands tell it in one line."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Write the remedy for a misspelt word, a sentence: the nearest known word, or the list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def choose(key: str, value: str, allowed: Iterable[str], otherwise: str = "") -> None:
    """Check that a value is one of the allowed words.

    Args:
        key: the configuration key, for messages.
        value: of the key.
        allowed: words.
        otherwise: what else the message offers.

    Raises:
        UserError: it is not.
    """
    allowed = list(allowed)
    if value not in allowed:
        words = ", ".join(allowed) + (f", or {otherwise}" if otherwise else "")
        raise UserError(key, f"one of {words}", repr(value), suggest(value, allowed))
