"""Check the keys of a source of the configuration, and say what became of those of earlier versions.

`reading` calls it with every file and override before they are merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import partial
from typing import Any, get_args

from omegaconf import DictConfig

from lit_opd.config.limits import hints_of
from lit_opd.errors import UserError, gather, suggest

__all__ = ["REMOVED", "RENAMED", "check_keys"]

RENAMED: dict[str, str] = {}
"""Dotted keys of earlier versions, and what they are called now: an old one is refused with its new name."""
REMOVED = {
    "estimator.adapt_gamma_every": "A fixed estimator.kwargs.gamma did as well (docs/results.md). Set that instead."
}
"""Dotted keys of earlier versions that are gone, and what to do instead. All were null by default."""


def check_keys(schema: Any, node: DictConfig, prefix: str, where: str) -> None:
    """Check that keys are known, and leave out of `node` those that are not.

    Raises:
        UserError: an unknown key, or one of an earlier version, all there are.
    """
    gather(*(partial(_check_key, hints_of(schema), node, key, prefix, where) for key in list(node)))


def _check_key(hints: Mapping[str, Any], node: DictConfig, key: Any, prefix: str, where: str) -> None:
    name, hint, section = f"{prefix}{key!s}", hints.get(str(key)), node._get_node(key)
    if is_dataclass(hint) and isinstance(section, DictConfig) and not section._is_none():
        check_keys(hint, section, prefix=f"{name}.", where=where)
        return
    named = next((inner for inner in get_args(hint)[1:] if is_dataclass(inner)), None)
    if named is not None and isinstance(section, DictConfig):
        sections = dict.fromkeys(map(str, section), named)
        gather(*(partial(_check_key, sections, section, one, f"{name}.", where) for one in list(section)))
    if hint is not None and not is_dataclass(hint):
        return
    value = node.pop(key)
    if new := RENAMED.get(name):
        raise UserError(name, f"its new name {new}", f"the old one ({where})", f"Write {new}.")
    if remedy := REMOVED.get(name):
        if value is None:  # as runs of earlier versions wrote it into their config.yaml
            return
        raise UserError(name, "no such key any more", f"it ({where})", remedy)
    if hint is None:
        raise UserError(name, "a known key", f"an unknown one ({where})", suggest(str(key), hints))
    raise UserError(name, "a section with keys", f"{section} ({where})", f"Set e.g. {name}.KEY=VALUE.")
