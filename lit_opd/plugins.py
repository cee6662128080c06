"""Import what a configuration names: `package.module:name` or `path/to/file.py:name`.

Estimators, prompt sources, verifiers, engines and callbacks of a user's own come in here.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_opd.errors import UserError, suggest

__all__ = ["call_object", "import_object"]


def import_object(key: str, reference: str) -> Callable[..., Any]:
    """Import the function or class that `reference` names. A file is imported once, under a name made from its path.

    Args:
        key: the configuration key, for messages.
        reference: `package.module:name` or `path/to/file.py:name`.

    Raises:
        UserError: the module or file cannot be imported, or holds no such function or class.
    """
    target, _, name = reference.rpartition(":")
    if not target or not name:
        raise UserError(key, "package.module:name or path/to/file.py:name", repr(reference), "Name both.")
    module = _import_file(key, target) if target.endswith(".py") else _import_module(key, target)
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(key, f"a function or class {name!r} in {target}", "none", suggest(name, known))
    return found


def call_object(key: str, reference: str, *arguments: Any, **keywords: Any) -> Any:
    """Import a function or class and call it.

    Args:
        key: the configuration key, for messages.
        reference: as in `import_object`.
        *arguments: of the call.
        **keywords: of the call.

    Raises:
        UserError: see `import_object`; arguments that it does not take.
    """
    found = import_object(key, reference)
    try:
        inspect.signature(found).bind(*arguments, **keywords)
    except TypeError as error:
        given = ", ".join([*(type(a).__name__ for a in arguments), *keywords]) or "nothing"
        raise UserError(key, f"{reference} to take {given}", str(error), "Correct one of them.") from error
    return found(*arguments, **keywords)


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
