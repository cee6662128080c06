"""Say beside a field of the configuration which values it may have, and check them and their types.

Every section is a `Section`: its `check` is called where the section comes in, by `load_config` and by what takes
sections in Python.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from numbers import Integral, Real
from types import FunctionType, NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from lit_opd.errors import UserError, choose, gather

Limit = Callable[[str, Any], None]
"""Called with a key and its value, for which it may raise a UserError."""

MOST = 2**31 - 1  # beyond it a number of things overflows an index of some library


class Section:
    """A section of the configuration."""

    def check(self, name: str = "") -> None:
        """Check every value that needs no model and no data to be judged, in the section `name`.

        What Python spells otherwise becomes the declared type: a `Path` its text, a class its path for import.

        Raises:
            UserError: naming every key whose value is of another type or out of its range.
        """
        gather(*(functools.partial(self._check_field, own, name) for own in fields(self)))  # type: ignore[arg-type]

    def _check_field(self, own: Any, name: str) -> None:
        key, value = f"{name}.{own.name}".lstrip("."), getattr(self, own.name)
        if isinstance(value, Section):
            value.check(key)
            return
        if isinstance(value, Mapping) and value and all(isinstance(inner, Section) for inner in value.values()):
            gather(*(functools.partial(inner.check, f"{key}.{name}") for name, inner in value.items()))
            return
        value = as_type(key, value, hints_of(type(self))[own.name])  # type: ignore[arg-type]
        setattr(self, own.name, value)
        if "limit" in own.metadata:
            own.metadata["limit"](key, value)
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(key, "a finite number", value, "Correct the value.")


@functools.cache
def hints_of(section: type) -> Mapping[str, Any]:
    """Read the declared types of a section, once: Python evaluates the text of all of them anew, every time."""
    return get_type_hints(section)


def as_type(key: str, value: Any, hint: Any) -> Any:
    """Give a value as the declared type has it, containers with all that they hold.

    Raises:
        UserError: it is of another type.
    """
    if isinstance(value, str) and value == MISSING:
        raise UserError(key, "a value", "nothing", f"Set {key} in a config file or as {key}=VALUE.")
    for option in type_options(hint):
        for made in _converted(key, value, option):
            return made
    raise UserError(key, type_name(hint), repr(value), "Correct the value.")


def type_options(hint: Any) -> tuple[Any, ...]:
    """List the types of a union, or the one that stands alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def type_name(hint: Any) -> str:
    """Tell in words what a declared type asks for."""
    if get_origin(hint) in (dict, list):
        return "a mapping" if get_origin(hint) is dict else "a list"
    words = [str(word) for option in type_options(hint) if get_origin(option) is Literal for word in get_args(option)]
    types = [get_origin(t) or t for t in type_options(hint) if get_origin(t) is not Literal]
    names = ["null" if t is NoneType else getattr(t, "__name__", str(t)) for t in types]
    return "a value of type " + " or ".join(names) if not words else "one of " + ", ".join([*words, *names])


def _converted(key: str, value: Any, option: Any) -> Iterator[Any]:
    """Yield the value as one type has it, or nothing."""
    kind, inner = get_origin(option) or option, get_args(option)
    whole = is_dataclass(option) and isinstance(value, option)  # type: ignore[arg-type]
    if option is Any or whole or (option is NoneType and value is None) or (kind is Literal and value in inner):
        yield value
    elif kind is dict and isinstance(value, Mapping):
        yield {k: as_type(f"{key}.{k}", v, inner[1]) for k, v in value.items()}
    elif kind is list and isinstance(value, list | tuple | Iterator):
        yield [as_type(f"{key}[{i}]", v, inner[0]) for i, v in enumerate(value)]
    elif isinstance(value, bool):
        yield from [value] if option is bool else []
    elif option is str and isinstance(value, str | os.PathLike):
        yield os.fspath(value)
    elif option is str and isinstance(value, type | FunctionType) and "<" not in value.__qualname__:
        yield f"{value.__module__}:{value.__qualname__}"
    elif (option is int and isinstance(value, Integral)) or (option is float and isinstance(value, Real)):
        yield int(value) if option is int else float(value)  # type: ignore[call-overload]


def limited(default: Any, limit: Limit) -> Any:
    """Declare a field with its default and the values it may have."""
    return field(default=default, metadata={"limit": limit})


def within(expected: str, holds: Callable[[Any], bool]) -> Limit:
    """Ask something of a value, told by `expected`, which completes "expected a value ..."."""

    def check(key: str, value: Any) -> None:
        if not holds(value):
            raise UserError(key, f"a value {expected}", value, f"Set {key} to a value {expected}.")

    return check


def at_least(minimum: float, note: str = "", null: str | None = None, most: float = MOST) -> Limit:
    """Ask for a number that is not smaller, nor beyond `most`, where null means what `null` says or is refused."""
    nothing = "" if null is None else f", or null for {null}"
    small = within(f"at least {minimum:g}{note}{nothing}", lambda v: null is not None if v is None else v >= minimum)
    large = within(f"at most {most}{nothing}", lambda v: v is None or v <= most or v == math.inf)

    def check(key: str, value: Any) -> None:
        small(key, value)
        large(key, value)

    return check


def auto_or_at_least(minimum: int) -> Limit:
    """Ask for the word `auto`, or for a whole number that is not smaller."""

    def check(key: str, value: Any) -> None:
        if value != "auto":
            if isinstance(value, bool) or not isinstance(value, Integral):
                expected = f"auto, or a whole number of at least {minimum}"
                raise UserError(key, expected, repr(value), f"Set {key}=auto.")
            at_least(minimum, " (or auto)")(key, value)

    return check


def seed(key: str, value: Any) -> None:
    """Ask for a number that every library takes as a seed."""
    at_least(0, most=2**32 - 1)(key, as_type(key, value, int))


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
