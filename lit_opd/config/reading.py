"""Fill the dataclasses from YAML files and dotted overrides, and write them back.

The command line calls `load_config`. What takes a section in Python calls `as_section`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf import errors as omegaconf_errors

from lit_opd.config.limits import Section
from lit_opd.config.paths import expand_paths
from lit_opd.config.schema import Config
from lit_opd.errors import UserError, suggest

__all__ = ["as_section", "load_as", "load_config", "parse_overrides", "to_flat", "to_yaml"]

PACKAGE_FOLDER = Path(__file__).parents[1]
T = TypeVar("T")
S = TypeVar("S", bound=Section)
# Keywords belong to what they are given to: whoever names another estimator or optimizer begins with its own defaults.
KEYWORDS_OF = {
    "estimator.name": "estimator.kwargs",
    "optim.name": "optim.kwargs",
    "optim.scheduler": "optim.scheduler_kwargs",
}
RENAMED: dict[str, str] = {}
"""Dotted keys of earlier versions, and what they are called now: an old one is refused with its new name."""
REMOVED = {"estimator.adapt_gamma_every": "A fixed estimator.kwargs.gamma did as well (RESULTS.md). Set that instead."}
"""Dotted keys of earlier versions that are gone, and what to do instead. All were null by default."""


def load_config(files: Sequence[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """Build the configuration: defaults <- YAML files in order <- `key=value` overrides, then check every value.

    Naming another estimator, optimizer or scheduler drops the keywords that earlier sources gave to the one before.
    `${lit_opd:NAME}` in a value stands for the path of NAME inside the installed package.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong type, a value out of its range.
    """
    config = load_as(Config, files, overrides)
    config.check()
    return config


def load_as(schema: type[T], files: Sequence[str | Path] = (), overrides: Iterable[str] = ()) -> T:
    """Fill a dataclass: defaults <- YAML files in order <- `key=value` overrides. Types are checked, ranges are not.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong type, a value that is missing.
    """
    OmegaConf.register_resolver("lit_opd", lambda name: str(PACKAGE_FOLDER / name), replace=True)
    sources = [(_read(Path(file)), str(file)) for file in files]
    for override in sorted(overrides, key=lambda word: word.partition("=")[0] not in KEYWORDS_OF):
        sources.append((_parse(override), f"override {override!r}"))
    node = _merge_all(schema, OmegaConf.structured(schema), sources)
    filled = _to_object(node)
    assert isinstance(filled, schema)
    expand_paths(filled)
    return filled


def as_section(schema: type[S], value: S | Mapping[str, Any] | None, name: str) -> S:
    """Make a section of itself, of a mapping of its keys, or of nothing (its defaults), and check its values.

    Raises:
        UserError: an unknown key, a wrong type, a value out of its range.
    """
    if not value:
        value = schema()
    if not isinstance(value, schema):
        given: Any = {name: dict(value)}  # type: ignore[arg-type]
        # This section alone: OmegaConf takes a tenth of a second for the tree of all of them.
        empty = OmegaConf.create({name: OmegaConf.structured(schema)})
        merged = _merge_all(Config, empty, [(OmegaConf.create(given), "keyword")])
        value = _to_object(merged[name])
    assert isinstance(value, schema)
    value.check(name)
    return value


def _to_object(node: Any) -> Any:
    try:
        return OmegaConf.to_object(node)
    except omegaconf_errors.MissingMandatoryValue as error:
        key = error.full_key or "a key"
        raise UserError(key, "a value", "nothing", f"Set {key} in a config file or as {key}=VALUE.") from error
    except omegaconf_errors.InterpolationResolutionError as error:
        remedy = r"Correct it, or write \${...} where something else is to resolve it."
        raise UserError(error.full_key or "config", "a resolvable value", _first_line(error), remedy) from error
    except omegaconf_errors.OmegaConfBaseException as error:
        raise UserError(error.full_key or "config", "a resolvable value", _first_line(error), "Correct it.") from error


def _read(file: Path) -> DictConfig:
    if not file.is_file():
        raise UserError("--config", "a YAML file", f"no file {str(file)!r}", "Check the path; examples are in conf/.")
    try:
        node = OmegaConf.load(file)
    except (yaml.YAMLError, UnicodeDecodeError, OSError, omegaconf_errors.OmegaConfBaseException) as error:
        reason = getattr(error, "problem", None) or _first_line(error)
        raise UserError("--config", "valid YAML", f"{file}: {reason}", "Correct the file.") from error
    if not isinstance(node, DictConfig):
        raise UserError("--config", "a mapping of keys", f"{file}: a list", "Write `key: value` lines.")
    return node


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """Read `key=value` words, as `python -m lit_opd check` takes them, into a mapping.

    Raises:
        UserError: a word without `=`, or a value that is no YAML.
    """
    return OmegaConf.to_container(OmegaConf.merge({}, *map(_parse, words)))  # type: ignore[return-value]


def _parse(override: str) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(override, "an override of the form key=value", "no '='", "Write e.g. optim.lr=1e-4.")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, omegaconf_errors.OmegaConfBaseException) as error:
        raise UserError(key, "a value in YAML", f"{value!r}: {_first_line(error)}", "Quote it.") from error


def _merge_all(schema: Any, node: Any, sources: Sequence[tuple[DictConfig, str]]) -> Any:
    # A list of terms is a mix. Where a source names an estimator too, the name stays, for `build_from` to refuse.
    named = any(OmegaConf.select(update, "estimator.name") for update, _ in sources)
    for update, where in sources:
        node = _merge(schema, node, update, where)
    if OmegaConf.select(node, "estimator.terms") and not named:
        OmegaConf.update(node, "estimator.name", "mix")
    return node


def _merge(schema: Any, node: Any, update: DictConfig, where: str) -> Any:
    _check_keys(schema, update, prefix="", where=where)
    for name, keywords in KEYWORDS_OF.items():
        if OmegaConf.select(update, name) not in (None, OmegaConf.select(node, name)):
            OmegaConf.update(node, keywords, {}, merge=False)
    try:
        # `merge` of OmegaConf copies the whole tree first, for every override. Nobody else holds these two.
        return OmegaConf.unsafe_merge(node, update)
    except omegaconf_errors.OmegaConfBaseException as error:
        key = error.full_key or "config"
        found = repr(OmegaConf.select(update, key, throw_on_missing=False))
        raise UserError(key, _type_of(schema, key), f"{found} ({where})", "Correct the value.") from error


def _check_keys(schema: Any, node: DictConfig, prefix: str, where: str) -> None:
    hints = get_type_hints(schema)
    for key in list(node):
        name = f"{prefix}{key!s}"
        if new := RENAMED.get(name):
            raise UserError(name, f"its new name {new}", f"the old one ({where})", f"Write {new}.")
        if remedy := REMOVED.get(name):
            if node[key] is None:  # as runs of earlier versions wrote it into their config.yaml
                del node[key]
                continue
            raise UserError(name, "no such key any more", f"it ({where})", remedy)
        if str(key) not in hints:
            raise UserError(name, "a known key", f"an unknown one ({where})", suggest(str(key), hints))
        if not is_dataclass(hints[str(key)]):
            continue
        section = node._get_node(key)
        if isinstance(section, DictConfig):
            _check_keys(hints[str(key)], section, prefix=f"{name}.", where=where)
        else:
            raise UserError(name, "a section with keys", f"{section} ({where})", f"Set e.g. {name}.KEY=VALUE.")


def _type_of(schema: Any, key: str) -> str:
    for part in key.split("."):
        if not is_dataclass(schema):
            break
        name, item, _ = part.partition("[")
        schema = get_type_hints(schema).get(name, Any)
        schema = get_args(schema)[0] if item else schema
    if get_origin(schema) in (dict, list):
        return "a mapping" if get_origin(schema) is dict else "a list"
    names = [getattr(t, "__name__", str(t)) for t in (get_args(schema) or (schema,))]
    return "a value of type " + " or ".join("null" if n == "NoneType" else n for n in names)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def to_flat(config: Config) -> dict[str, Any]:
    """Write the configuration as dotted key -> value, as overrides are, for tables of parameters."""
    return dict(_leaves(asdict(config), ""))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))


def to_yaml(config: Any) -> str:
    """Write the resolved configuration, or another dataclass, as YAML that `load_config` or `load_as` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(asdict(config))))


def _escaped(value: Any) -> Any:
    # Everything is resolved: what still looks like an interpolation is text.
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
