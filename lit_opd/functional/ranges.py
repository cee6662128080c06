"""Say which values a keyword may have, and refuse the others by a ValueError.

The functions of this room ask at once. Estimators declare the same ranges beside their contract, so that a
configuration is refused before any model loads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple


class Range(NamedTuple):
    """The values that a keyword may have.

    Attributes:
        words: what completes "NAME must ...".
        holds: tells whether a value is one of them.
        hint: what a refusal adds.
    """

    words: str
    holds: Callable[[Any], bool]
    hint: str = ""

    def check(self, name: str, value: Any) -> None:
        """Raise a ValueError that names the keyword, where its value is none of them."""
        if not self.holds(value):
            raise ValueError(f"{name} must {self.words}, found {value!r}" + (f"; {self.hint}" if self.hint else ""))


SHARE = Range("lie in [0, 1]", lambda value: 0 <= value <= 1)
POSITIVE_SHARE = Range("lie in (0, 1]", lambda value: 0 < value <= 1)
BELOW_ONE = Range("lie in [0, 1)", lambda value: 0 <= value < 1)
POSITIVE = Range("be positive", lambda value: value > 0)
FINITE = Range("be finite", math.isfinite)
WEIGHT = Range("be at least 0 and finite", lambda value: 0 <= value < math.inf)


def at_least(bound: float) -> Range:
    """Allow numbers that are not smaller.

    >>> at_least(1).holds(0.5)
    False
    """
    return Range(f"be at least {bound:g}", lambda value: value >= bound)


def whole(least: int = 1, hint: str = "") -> Range:
    """Allow whole numbers that are not smaller.

    >>> [whole().holds(value) for value in (1, True, 1.0, 0)]
    [True, False, False, False]
    """
    known = f"be a whole number of at least {least}"
    return Range(known, lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least, hint)


def one_of(words: Collection[str], hint: str = "") -> Range:
    """Allow a few words.

    >>> one_of(("mask", "clip")).words
    'be one of mask, clip'
    """
    return Range(f"be one of {', '.join(words)}", lambda value: value in words, hint)


def allow(**ranges: Range) -> Callable[..., None]:
    """Make a function that checks those of its keywords that have a range.

    >>> allow(gamma=SHARE)(gamma=2, base="token")
    Traceback (most recent call last):
    ValueError: gamma must lie in [0, 1], found 2
    """

    def check(**keywords: Any) -> None:
        for name, allowed in ranges.items():
            allowed.check(name, keywords[name])

    return check
