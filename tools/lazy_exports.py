"""Show mkdocstrings, which runs no code, the names that a package imports on first use: an extension of griffe."""

from __future__ import annotations

import ast
from typing import Any

import griffe


class LazyExports(griffe.Extension):
    """Take the table `_HOMES` of a package, {name: the module that defines it}, for imports."""

    def on_module_members(self, *, node: Any, mod: griffe.Module, agent: Any, **kwargs: Any) -> None:
        """Add an alias for each name of the table."""
        if "_HOMES" in mod.members:
            homes = ast.literal_eval(str(mod["_HOMES"].value))
            for name, module in homes.items():
                mod.set_member(name, griffe.Alias(name, f"{module}.{name}"))
