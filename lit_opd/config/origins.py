"""Tell where each value of a configuration came from: a default, a line of a file, or an override.

The command `config` prints it beside the values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lit_opd.config.comments import Place, places
from lit_opd.config.paths import config_file
from lit_opd.config.reading import BELONGING, load_config, to_flat
from lit_opd.config.schema import Config
from lit_opd.config.words import NULLS, hint_of, typed_override

__all__ = ["DEFAULT", "explained"]

DEFAULT = "default"


def explained(files: Sequence[str], overrides: Sequence[str]) -> tuple[Config, dict[str, str]]:
    """Build a configuration as `load_config` does, and say of every dotted key where its value came from.

    Raises:
        UserError: see `load_config`.
    """
    config = load_config(files, overrides)
    found: dict[str, str] = {}
    named: dict[str, str] = {name: str(value) for name, value in to_flat(Config()).items() if name in BELONGING}
    for given, where in _sources(files, overrides):
        for name, (belonging, _) in BELONGING.items():
            if name in given and given[name].text not in (*NULLS, named.get(name)):
                named[name] = given[name].text
                found = {key: told for key, told in found.items() if not f"{key}.".startswith(f"{belonging}.")}
        found |= {key: _told(where, place) for key, place in given.items()}
    if "estimator.terms" in found:
        found.setdefault("estimator.name", "estimator.terms")
    return config, {key: found.get(key, DEFAULT) for key in to_flat(config)}


def _sources(files: Sequence[str], overrides: Sequence[str]) -> Iterator[tuple[dict[str, Place], str]]:
    for name in files:
        yield places(config_file(name).read_text(encoding="utf-8")), name
    # As `load_config` orders them.
    for word in sorted(overrides, key=lambda word: word.partition("=")[0] not in BELONGING):
        key, _, value = word.partition("=")
        text = typed_override(value, hint_of(Config, key))
        key = key.partition("[")[0]
        yield places(text, key) or {key: Place(0, 0, value)}, "override"


def _told(where: str, place: Place) -> str:
    line = where if where == "override" else f"{where}:{place.line + 1}"
    resolved = "${" in place.text.replace("\\${", "")
    return f"{line}, {' '.join(place.text.split())}" if resolved else line
