"""List the published recipes, or print one, to begin a file of one's own with it.

The recipes are the files of conf/recipes/, which the package carries in `conf/`. What the head of a file says in
lines of `# field: text` is what the listing shows, and what `tools/make_recipes.py` writes into their page.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lit_opd.config import PACKAGE_FOLDER
from lit_opd.errors import UserError, suggest

__all__ = ["FIELDS", "Recipe", "all_recipes", "print_recipe", "print_recipes"]

FIELDS = ("system", "objective", "teacher", "source", "published", "not reproduced")
FOLDER = PACKAGE_FOLDER / "conf" / "recipes"


class Recipe(NamedTuple):
    """A file, and what its head says: `FIELDS` and their text."""

    file: Path
    head: dict[str, str]

    @property
    def name(self) -> str:
        """The name of the file, without its ending."""
        return self.file.stem


def all_recipes() -> list[Recipe]:
    """Read the head of every recipe, in the order of their names."""
    return [Recipe(file, _head(file.read_text(encoding="utf-8"))) for file in sorted(FOLDER.glob("*.yaml"))]


def print_recipes() -> None:
    """Print a table of all recipes: system, objective, teacher, and what is not reproduced."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=max(100, terminal.width))
    table = Table(box=box.SIMPLE_HEAD, show_lines=True)
    for header in ("recipe, system", "objective, and the teacher", "not reproduced"):
        table.add_column(header)
    for recipe in all_recipes():
        head = recipe.head
        system = Text.assemble((recipe.name, "bold"), f"\n{head['system']}")
        table.add_row(system, Text(f"{head['objective']}\nteacher: {head['teacher']}"), Text(head["not reproduced"]))
    console.print(table)
    print("Train with one: python -m lit_opd fit --config lit_opd:recipes/NAME.yaml")
    print("Begin your own: python -m lit_opd recipes NAME > my.yaml")


def print_recipe(name: str) -> None:
    """Print the file of one recipe.

    Raises:
        UserError: there is none of this name.
    """
    files = {recipe.name: recipe.file for recipe in all_recipes()}
    if name not in files:
        raise UserError("recipes", "the name of a recipe", name, suggest(name, files))
    print(files[name].read_text(encoding="utf-8"), end="")


def _head(text: str) -> dict[str, str]:
    """Read `# field: text` from the top of a file, whose text goes on in lines of `#   `."""
    head: dict[str, str] = {}
    for line in text.splitlines():
        field, _, said = line.removeprefix("# ").partition(": ")
        if line.startswith("#   ") and head:
            last = next(reversed(head))
            head[last] += " " + line.removeprefix("#").strip()
        elif line.startswith("# ") and field in FIELDS:
            head[field] = said
        else:
            break
    return head
