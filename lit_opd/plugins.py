"""Import what a configuration names: `package.module:name` or `path/to/file.py:name`.

Estimators, prompt sources, verifiers, engines and callbacks of a user's own come in here.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

from lit_opd.errors import RunError, UserError, suggest

__all__ = ["call_object", "calling", "calling_parts", "import_object"]

_KEYS: dict[str, tuple[str, str]] = {}
"""Modules that hold a part of the user's own -> the key that named the part, and its path."""


def import_object(key: str, reference: str) -> Callable[..., Any]:
    """Import the function or class that the reference of a key names: `package.module:name` or `path/to/file.py:name`.

    A file is imported once, under a name made from its path.

    Raises:
        UserError: the module or file cannot be imported, or holds no such function or class.
    """
    target, _, name = reference.rpartition(":")
    if not target or not name:
        raise UserError(key, "package.module:name or path/to/file.py:name", repr(reference), "Name both.")
    with calling(key, f"an importable module {target!r}", "Install it, or correct it or its name."):
        module = _import_file(key, target) if target.endswith(".py") else importlib.import_module(target)
    found = getattr(module, name, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise UserError(key, f"a function or class {name!r} in {target}", "none", suggest(name, known))
    for home in (module.__name__, getattr(found, "__module__", "")):
        _KEYS[home] = key, reference
    return found


def call_object(key: str, reference: str, *arguments: Any, **keywords: Any) -> Any:
    """Import a function or class, as `import_object` does, and call it.

    Raises:
        UserError: see `import_object`; arguments that it does not take, and what it raises.
    """
    found = import_object(key, reference)
    try:
        inspect.signature(found).bind(*arguments, **keywords)
    except TypeError as error:
        given = ", ".join([*(type(a).__name__ for a in arguments), *keywords]) or "nothing"
        raise UserError(key, f"{reference} to take {given}", str(error), "Correct one of them.") from error
    with calling(key, f"{reference} to run"):
        return found(*arguments, **keywords)


@contextmanager
def calling(key: str, expected: str, remedy: str = "Correct it.") -> Iterator[None]:
    """Run a user's own code, whose exceptions become mistakes told in one line. `sys.exit` is one of them.

    Raises:
        UserError: what was raised inside, with the line of the file that raised it.
    """
    try:
        yield
    except (UserError, RunError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(key, expected, _told(error), remedy) from error


@contextmanager
def calling_parts() -> Iterator[None]:
    """Run what calls parts of the user's own by way of other libraries, as Lightning calls callbacks.

    Raises:
        UserError: what was raised inside came through such a part.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except (Exception, SystemExit) as error:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if named := _KEYS.get(frame.f_globals.get("__name__", "")):
                key, reference = named
                raise UserError(key, f"{reference} to run", _told(error), "Correct it.") from error
        raise


def _told(error: BaseException) -> str:
    """Tell an exception, with the last line of the user's that it came through, or else the last of a library."""
    own, parts = str(Path(__file__).parent), {getattr(sys.modules.get(name), "__file__", None) for name in _KEYS}
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    # Below the user's line there may be others: wandb puts a function of its own in the place of sys.exit.
    lines = [frame for frame in lines if frame.filename in parts] or lines
    where = f" ({lines[-1].filename}, line {lines[-1].lineno})" if lines else ""
    return f"{type(error).__name__}: {error}{where}"


class _ReadAnew(SourceFileLoader):
    """Python's loader without its cache, which takes a file of the same size and second for the one before."""

    def get_code(self, fullname: str) -> CodeType:
        """Compile the file as it is now."""
        return self.source_to_code(self.get_data(self.path), self.path)


def _import_file(key: str, target: str) -> Any:
    path = Path(target).expanduser().resolve()
    if not path.is_file():
        raise UserError(
            key, "a Python file", f"no file {target!r}", "Check the path; it is relative to the current folder."
        )
    name = f"lit_opd_plugin_{path.stem}_{abs(hash(str(path)))}"
    if name in sys.modules:
        return sys.modules[name]
    loader = _ReadAnew(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with calling(key, f"{target} to import", "Correct the file."):
            loader.exec_module(module)
    except UserError:
        del sys.modules[name]
        raise
    return module
