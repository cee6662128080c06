"""Fill the dataclasses from YAML files and dotted overrides, and write them back.

The command line calls `load_config`. What takes a section in Python calls `as_section`.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf import errors as omegaconf_errors

from lit_opd.config.keys import check_keys
from lit_opd.config.limits import Section, as_type, hints_of, type_name
from lit_opd.config.paths import PACKAGE_FOLDER, config_file, expand_paths
from lit_opd.config.schema import Config
from lit_opd.config.secret_keys import keep_secrets
from lit_opd.config.words import hint_of, typed_override, typed_yaml
from lit_opd.errors import UserError, concealed, gather

__all__ = ["as_section", "load_as", "load_config", "parse_overrides", "to_flat", "to_yaml"]

T = TypeVar("T")
R = TypeVar("R")
S = TypeVar("S", bound=Section)
KEY = re.compile(r"[^.\[\]]+(?:\.[^.\[\]]+|\[[0-9]+\])*")
# Some keys belong to another's value: whoever names another estimator or kind of teacher begins with its own defaults.
BELONGING: dict[str, tuple[str, Any]] = {
    "estimator.name": ("estimator.kwargs", {}),
    "optim.name": ("optim.kwargs", {}),
    "optim.scheduler": ("optim.scheduler_kwargs", {}),
    "teacher.kind": ("teacher.path", ""),
}


def load_config(files: str | Path | Sequence[str | Path] = (), overrides: str | Iterable[str] = ()) -> Config:
    """Build the configuration: defaults <- YAML files in order <- `key=value` overrides, then check every value.

    Naming another estimator, optimizer, scheduler or kind of teacher drops what earlier sources gave to the one before:
    keywords, or a path.
    `${lit_opd:NAME}` in a value stands for the path of NAME inside the installed package.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong type, a value out of its range; all there are.
    """
    return _load(Config, files, overrides, Config.check)


def load_as(schema: type[T], files: Sequence[str | Path] = (), overrides: Iterable[str] = ()) -> T:
    """Fill a dataclass: defaults <- YAML files in order <- `key=value` overrides. Types are checked, ranges are not.

    Raises:
        UserError: a missing or malformed file, an unknown key, a wrong type, a value that is missing; all there are.
    """
    return _load(schema, files, overrides, lambda _: None)


def _load(schema: type[T], files: Any, overrides: Any, check: Callable[[Any], None]) -> T:
    files = as_type("files", [files] if isinstance(files, str | Path) else files, list[str])
    overrides = as_type("overrides", [overrides] if isinstance(overrides, str) else overrides, list[str])
    OmegaConf.register_resolver("lit_opd", lambda name: str(PACKAGE_FOLDER / name), replace=True)
    words = sorted(overrides, key=lambda word: word.partition("=")[0] not in BELONGING)
    node, sources = _tree(schema), []

    def read(make: Callable[[], DictConfig], where: str) -> None:
        update = make()
        keep_secrets(OmegaConf.to_container(update))
        sources.append((update, where))

    steps = [partial(read, partial(_read, file, schema), str(file)) for file in files]
    steps += [partial(read, partial(_parse, word, schema), f"override {word!r}") for word in words]

    def fill() -> T | None:
        if len(sources) < len(steps):  # what seems to be missing may be in a file that could not be read
            return None
        missing = _resolved(lambda: sorted(OmegaConf.missing_keys(node)))
        for key in missing:
            OmegaConf.update(node, key, OmegaConf.select(OmegaConf.structured(schema), key, default=""))
        refusals = (partial(_refuse_missing, key) for key in missing)
        return gather(*refusals, lambda: _checked(_to_object(node), check))[-1]

    return gather(*steps, lambda: _merge_all(schema, node, sources), fill)[-1]


def _tree(schema: Any) -> Any:
    """Make OmegaConf's tree of a schema."""
    # A copy takes a sixth of the time that building the tree takes.
    return copy.deepcopy(_built_tree(schema))


@cache
def _built_tree(schema: Any) -> Any:
    return OmegaConf.structured(schema)


def _refuse_missing(key: str) -> NoReturn:
    raise UserError(key, "a value", "nothing", f"Set {key} in a config file or as {key}=VALUE.")


def _checked(filled: T, check: Callable[[T], None]) -> T:
    expand_paths(filled)
    check(filled)
    return filled


def as_section(schema: type[S], value: S | Mapping[str, Any] | None, name: str) -> S:
    """Make a section of itself, of a mapping of its keys, or of nothing (its defaults), and check its values.

    Raises:
        UserError: an unknown key, a wrong type, a value out of its range; all there are.
    """
    if value is None:
        value = schema()
    if not isinstance(value, schema):
        if not isinstance(value, Mapping):
            found = f"{value!r}, a {type(value).__name__}"
            raise UserError(name, f"a mapping of its keys, or a {schema.__name__}", found, "Pass one of them.")
        node = OmegaConf.create({name: _tree(schema)})
        keys = {name: _plain(schema, value, name)}
        keep_secrets(keys)
        given = OmegaConf.create(keys, flags={"allow_objects": True})
        value = gather(lambda: _merge_all(Config, node, [(given, "keyword")]), lambda: _to_object(node[name]))[-1]
    assert isinstance(value, schema)
    value.check(name)
    return value


def _plain(schema: type[Section], values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Give values of Python their declared types, before OmegaConf makes text of everything. Text may be of any."""
    hints, keys = hints_of(schema), [str(key) for key in values]  # type: ignore[arg-type]
    typed = (
        partial(as_type, f"{name}.{key}", value, Any if isinstance(value, str) else hints.get(key, Any))
        for key, value in zip(keys, values.values(), strict=True)
    )
    return dict(zip(keys, gather(*typed), strict=True))


def _to_object(node: Any) -> Any:
    return _resolved(lambda: OmegaConf.to_object(node))


def _resolved(read: Callable[[], R]) -> R:
    try:
        return read()
    except omegaconf_errors.MissingMandatoryValue as error:
        return _refuse_missing(error.full_key or "a key")
    except omegaconf_errors.InterpolationResolutionError as error:
        remedy = r"Correct it, or write \${...} where something else is to resolve it."
        raise UserError(error.full_key or "config", "a resolvable value", _first_line(error), remedy) from error
    except Exception as error:  # resolvers and a structure that nests too deep raise what they like
        key = getattr(error, "full_key", None) or "config"
        raise UserError(key, "a resolvable value", _first_line(error), "Correct it.") from error


def _read(name: str, schema: Any) -> DictConfig:
    file = config_file(name)
    try:
        node = OmegaConf.create(typed_yaml(file.read_text(encoding="utf-8"), schema))
    except Exception as error:  # a text that is no YAML brings errors of PyYAML, OmegaConf and Python
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


def _parse(override: str, schema: Any = Any) -> DictConfig:
    key, equals, value = override.partition("=")
    if not equals or not KEY.fullmatch(key):
        remedy = f"Write --config {key}." if key.endswith((".yaml", ".yml")) else "Write e.g. optim.lr=1e-4."
        found = f"the key {key!r}" if equals else "no '='"
        raise UserError(override, "an override of the form key=value", found, remedy)
    try:
        return OmegaConf.from_dotlist([f"{key}={typed_override(value, hint_of(schema, key))}"])
    except Exception as error:  # a text that is no YAML brings errors of PyYAML, OmegaConf and Python
        raise UserError(key, "a value in YAML", f"{value!r}: {_first_line(error)}", "Quote it.") from error


def _merge_all(schema: Any, node: Any, sources: Sequence[tuple[DictConfig, str]]) -> None:
    # A list of terms is a mix. Where a source names an estimator too, the name stays, for `build_from` to refuse.
    named = any(OmegaConf.select(update, "estimator.name") for update, _ in sources)
    gather(*(partial(_merge, schema, node, update, where) for update, where in sources))
    if OmegaConf.select(node, "estimator.terms") and not named:
        OmegaConf.update(node, "estimator.name", "mix")


def _merge(schema: Any, node: Any, update: DictConfig, where: str) -> None:
    gather(lambda: check_keys(schema, update, "", where), lambda: _put(schema, node, update, where))


def _put(schema: Any, node: Any, update: DictConfig, where: str) -> None:
    for name, (key, default) in BELONGING.items():
        if OmegaConf.select(update, name) not in (None, OmegaConf.select(node, name)):
            OmegaConf.update(node, key, default, merge=False)
    try:
        # `merge` of OmegaConf copies the whole tree first, for every override. Nobody else holds these two.
        OmegaConf.unsafe_merge(node, update)
        for key, value in _leaves(OmegaConf.to_container(update), ""):
            if value == MISSING:  # which `merge` passes over, as if nothing had been written
                OmegaConf.update(node, key, MISSING)
    except Exception as error:  # OmegaConf stops at the first mistake, and brings errors of Python too
        if len(parts := _parts(update)) > 1:
            gather(*(partial(_put, schema, node, part, where) for part in parts))
        key = getattr(error, "full_key", None) or _path(schema, update)
        found = repr(OmegaConf.select(update, key, throw_on_missing=False))
        raise UserError(key, type_name(hint_of(schema, key)), f"{found} ({where})", "Correct the value.") from error


def _parts(update: DictConfig) -> list[DictConfig]:
    """Cut an update into one for each key, or for each key of the only section there is."""
    keys = list(update)
    if len(keys) == 1 and isinstance(section := update._get_node(keys[0]), DictConfig):
        return [OmegaConf.create({keys[0]: OmegaConf.masked_copy(section, str(key))}) for key in section]
    return [OmegaConf.masked_copy(update, str(key)) for key in keys]


def _path(schema: Any, update: DictConfig) -> str:
    """Name the only key of an update that is declared to hold a value."""
    key = str(next(iter(update)))
    hint, inner = hints_of(schema).get(key), update._get_node(key)
    return f"{key}.{_path(hint, inner)}" if is_dataclass(hint) and isinstance(inner, DictConfig) and inner else key


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def to_flat(config: Config) -> dict[str, Any]:
    """Write the configuration as dotted key -> value, as overrides are, for tables of parameters, without secrets."""
    return dict(_leaves(_each_text(asdict(config), concealed), ""))


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield name, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))


def to_yaml(config: Any, secrets: bool = False) -> str:
    """Write the resolved configuration, or another dataclass, as YAML that `load_config` or `load_as` reads back.

    Args:
        config: to write.
        secrets: write them too, for a file that nobody else may read. Else values that came from the environment are
            written as `${oc.env:NAME}`, and other secrets as `***`.
    """
    write = _escaped if secrets else lambda text: concealed(_escaped(text))
    return OmegaConf.to_yaml(OmegaConf.create(_each_text(asdict(config), write)))


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _each_text(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_each_text(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def _escaped(text: str) -> str:
    # Everything is resolved: what still looks like an interpolation is text.
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
