"""Read YAML by the declared types of keys, so that a word of a key stays the word that was written.

YAML takes `off`, `no`, `010`, `1:30` and `2024-01-01` for other things than text. What a key is declared to be decides
here, before OmegaConf reads the text. `reading` calls it for files and for overrides.
"""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from typing import Any, get_args, get_origin

import yaml

from lit_opd.config.limits import hints_of, type_options

__all__ = ["hint_of", "typed_override", "typed_yaml"]

TEXT, NULL, INTEGER, FLOAT = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "int", "float"))
# Those in C, where PyYAML was built with them, take a tenth of the time.
LOADER, DUMPER = getattr(yaml, "CSafeLoader", yaml.SafeLoader), getattr(yaml, "CSafeDumper", yaml.SafeDumper)
NULLS = ("null", "~", "")
# What YAML 1.1 counts in base 60 or base 8 was hardly meant as a number.
SURPRISING = re.compile(r"[-+]?(?:[0-9_]+(?::[0-9.]+)+|0[0-9_]+)")
# OmegaConf takes any whole number for a boolean, as -1 or 2, and refuses one that is not whole.
NO_BOOLEAN = re.compile(r"(?![01]$)[-+]?[0-9_]+")


def typed_yaml(text: str, hint: Any) -> str:
    """Quote, in a YAML text, what the declared type, for a file its dataclass, takes as it is written.

    Raises:
        yaml.YAMLError: it is no YAML.
    """
    node = yaml.compose(text, Loader=LOADER)
    if node is None:
        return ""
    _quote(node, hint, set())
    return yaml.serialize(node, Dumper=DUMPER)


def typed_override(value: str, hint: Any) -> str:
    """Write the value of a `key=value` as YAML. Text is taken as it stands, but for quotes around it.

    Raises:
        yaml.YAMLError: it is no YAML, and the key does not take text.
    """
    options = type_options(hint)
    if str not in options or int in options or value in NULLS:
        return typed_yaml(value, hint)
    return yaml.serialize(yaml.ScalarNode(TEXT, _unquoted(value), style='"'), Dumper=DUMPER)


def hint_of(schema: Any, key: str) -> Any:
    """Find the declared type of a dotted key, Any where none is declared."""
    for part in re.findall(r"[^.\[\]]+", key):
        inner = next((option for option in type_options(schema) if get_args(option) or is_dataclass(option)), Any)
        schema = hints_of(inner).get(part, Any) if is_dataclass(inner) else (get_args(inner) or (Any,))[-1]
    return schema


def _unquoted(value: str) -> str:
    try:
        node = yaml.compose(value, Loader=LOADER) if value[:1] in ("'", '"') else None
    except yaml.YAMLError:
        return value
    return node.value if isinstance(node, yaml.ScalarNode) else value


def _quote(node: yaml.Node, hint: Any, seen: set[int]) -> None:
    if id(node) in seen:  # an alias, or a node that holds itself
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            declared = is_dataclass(hint) or get_origin(hint) is dict
            if declared and isinstance(key, yaml.ScalarNode) and key.value != "<<":
                key.tag, key.style = TEXT, '"'
            _quote(value, hint_of(hint, key.value) if isinstance(key.value, str) and key.value else Any, seen)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _quote(value, hint_of(hint, "0"), seen)
    elif bool in type_options(hint) and NO_BOOLEAN.fullmatch(node.value):
        node.tag = FLOAT
    elif _is_text(node, type_options(hint)):
        node.tag, node.style = TEXT, node.style if node.style in ("|", ">") else '"'


def _is_text(node: yaml.Node, options: tuple[Any, ...]) -> bool:
    """Tell whether a scalar is to reach OmegaConf as text, which it turns into a declared number or boolean itself."""
    if node.tag == NULL:
        return False
    numbers = {INTEGER: int, FLOAT: float}
    free = Any in options or (node.tag in numbers and numbers[node.tag] in options)
    return not free or SURPRISING.fullmatch(node.value) is not None
