"""Tell mistakes of the user and failures of a run in one line each, which the command line prints without traceback."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["LintWarning", "RunError", "UserError", "UserErrors"]

MASK = "***"
# Credentials in an address, tokens by their usual beginnings, and values of keys that name a secret. What comes from an
# environment variable is `${oc.env:NAME}` already, and stays.
SECRETS = (
    re.compile(r"(?<=://)(?![^/\s'\"]*\$\{)[^/\s'\"]+(?=@)"),
    re.compile(r"\b(?:(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-(?:[a-z0-9]+-)?)[A-Za-z0-9_]{20,}|AKIA[A-Z0-9]{16})\b"),
    re.compile(r"(?<=[?&;])((?:\w*[_-])?(?:token|secret|password|key|signature|sig))=(?!\$\{)[^&\s'\"]+", re.I),
)
SHORTEST = 5  # of a secret that is looked for inside of other text
_SECRETS: dict[str, str] = {}


def keep_secret(value: str, shown: str = MASK) -> None:
    """Have `concealed` write `shown` for a value from now on."""
    _SECRETS[value] = shown


def concealed(text: str) -> str:
    """Write a text without the secrets of the configuration, and without what looks like one."""
    if text in _SECRETS:
        return _SECRETS[text]
    for value in sorted(_SECRETS, key=len, reverse=True):
        if len(value) >= SHORTEST:
            text = text.replace(value, _SECRETS[value])
    address, tokens, queries = SECRETS
    return queries.sub(rf"\1={MASK}", tokens.sub(MASK, address.sub(MASK, text)))


class UserError(Exception):
    """A mistake in what the user asked for, in one line: the key, what was expected, what was found, the remedy."""

    def __init__(self, key: str, expected: str, found: object, remedy: str) -> None:
        self.key, self.expected, self.found, self.remedy = key, expected, found, remedy
        told = str(found).rstrip(".")  # words of another library may bring a full stop of their own
        text = f"{key}: expected {expected}, found {told}. {remedy}"
        super().__init__(concealed(" ".join(text.split())))

    @property
    def mistakes(self) -> tuple[UserError, ...]:
        """The mistakes that it tells of, one but for `UserErrors`."""
        return (self,)


class UserErrors(UserError):
    """Several mistakes at once, a line each. It has the parts of the first."""

    def __init__(self, mistakes: Sequence[UserError]) -> None:
        first = mistakes[0]
        super().__init__(first.key, first.expected, first.found, first.remedy)
        self.args = ("\n".join(map(str, mistakes)),)
        self._mistakes = tuple(mistakes)

    @property
    def mistakes(self) -> tuple[UserError, ...]:
        """The mistakes, in the order in which they were found."""
        return self._mistakes


class RunError(RuntimeError):
    """A run that cannot go on, though nobody made a mistake."""

    def __str__(self) -> str:
        return concealed(super().__str__())


class LintWarning(UserWarning):
    """A warning of what may not do what it says, or that was let pass knowingly. Commands tell it in one line."""


def gather(*checks: Callable[[], Any]) -> list[Any]:
    """Do several checks, that a user may mend all mistakes at once, and return what they return.

    Raises:
        UserError: the one mistake there is, or all of them.
    """
    made: list[Any] = []
    mistakes: dict[str, UserError] = {}
    for check in checks:
        try:
            made.append(check())
        except UserError as error:
            mistakes |= {str(mistake): mistake for mistake in error.mistakes}
    if mistakes:
        first, *more = mistakes.values()
        raise UserErrors([first, *more]) if more else first
    return made


def suggest(word: str, known: Iterable[str]) -> str:
    """Write the remedy for a misspelt word, a sentence: the nearest known word, or the list of all."""
    known = sorted(known)
    spelt = {name.lower(): name for name in reversed(known)}  # a word in other letters is the nearest
    close = difflib.get_close_matches(word.lower(), spelt, n=1, cutoff=0.6)
    return f"Did you mean {spelt[close[0]]!r}?" if close else f"Known: {', '.join(known) or 'none'}."


def choose(key: str, value: str, allowed: Iterable[str], otherwise: str = "") -> None:
    """Refuse the value of a key that is none of the allowed words, with a message that may offer something else too."""
    allowed = list(allowed)
    if value not in allowed:
        words = ", ".join(allowed) + (f", or {otherwise}" if otherwise else "")
        raise UserError(key, f"one of {words}", repr(value), suggest(str(value), allowed))
