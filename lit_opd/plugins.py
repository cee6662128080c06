"""Functions that a configuration names: `package.module:function` or `path/to/file.py:function`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_opd.errors import UserError, suggest

__all__ = ["import_function"]


def import_function(key: str, reference: str) -> Callable[..., Any]:
    """The function that `reference` names; a file is imported once, under a name made from its path.

    Args:
        key: the configuration key, for messages.
        reference: `package.module:function` or `path/to/file.py:function`.

    Raises:
        UserError: the module or file cannot be imported, or holds no such function.
    """
    target, _, name = reference.rpartition(":")
    if not target or not name:
        raise UserError(key, "package.module:function or path/to/file.py:function", repr(reference), "Name both.")
    module = _import_file(key, target) if target.endswith(".py") else _import_module(key, target)
    function = getattr(module, name, None)
    if not callable(function):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(key, f"a function {name!r} in {target}", "none", suggest(name, functions))
    return function


def _import_module(key: str, target: str) -> Any:
    try:
        return importlib.import_module(target)
    except Exception as error:  # whatever the user's module raises while it is imported
        expected, found = f"an importable module {target!r}", f"{type(error).__name__}: {error}"
        raise UserError(key, expected, found, "Install it, or correct it or its name.") from error


def _import_file(key: str, target: str) -> Any:
    path = Path(target).expanduser().resolve()
    if not path.is_file():
        raise UserError(
            key, "a Python file", f"no file {target!r}", "Check the path; it is relative to the current folder."
        )
    name = f"lit_opd_plugin_{path.stem}_{abs(hash(str(path)))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises while it is imported
        del sys.modules[name]
        raise UserError(key, f"{target} to import", f"{type(error).__name__}: {error}", "Correct the file.") from error
    return module
