"""Say beside a field of the configuration which values it may have, and check them.

Every section is a `Section`: its `check` is called where the section comes in, by `load_config` and by what takes
sections in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

from lit_opd.errors import UserError, choose

__all__ = ["Section", "above", "at_least", "limited", "one_of", "one_of_or_path", "within"]

Limit = Callable[[str, Any], None]
"""Called with a key and its value; raises UserError."""


class Section:
    """A section of the configuration."""

    def check(self, name: str) -> None:
        """Check every value that needs no model and no data to be judged, in the section `name`.

        Raises:
            UserError: naming the first key whose value is out of its range.
        """
        for own in fields(self):  # type: ignore[arg-type]
            if "limit" in own.metadata:
                own.metadata["limit"](f"{name}.{own.name}", getattr(self, own.name))


def limited(default: Any, limit: Limit) -> Any:
    """Declare a field with its default and the values it may have."""
    return field(default=default, metadata={"limit": limit})


def within(expected: str, holds: Callable[[Any], bool]) -> Limit:
    """Ask something of a value, told by `expected`, which completes "expected a value ..."."""

    def check(key: str, value: Any) -> None:
        if not holds(value):
            raise UserError(key, f"a value {expected}", value, f"Set {key} to a value {expected}.")

    return check


def at_least(minimum: float, note: str = "", null: str | None = None) -> Limit:
    """Ask for a number that is not smaller.

    Args:
        minimum: the smallest value.
        note: what the message adds.
        null: what null means; by default it is refused.
    """
    nothing = "" if null is None else f", or null for {null}"
    return within(f"at least {minimum:g}{note}{nothing}", lambda v: null is not None if v is None else v >= minimum)


def above(bound: float, null: str | None = None) -> Limit:
    """Ask for a larger number, where null means what `null` says, as in `at_least`."""
    nothing = "" if null is None else f", or null for {null}"
    return within(f"above {bound:g}{nothing}", lambda v: null is not None if v is None else v > bound)


def one_of(*words: str) -> Limit:
    """Ask for one of a few words."""
    return lambda key, value: choose(key, value, words)


def one_of_or_path(*words: str) -> Limit:
    """Ask for one of a few words, or for `package.module:name` or `file.py:name`."""

    def check(key: str, value: Any) -> None:
        if ":" not in value:
            choose(key, value, [*words], "package.module:name or file.py:name")

    return check
