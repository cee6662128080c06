"""Give MkDocs the documents of the repository, and a reference page for each public package: the hooks of mkdocs.yml.

A document keeps its path in the repository, README.md being the home page. A link between two documents therefore leads
to the same place on a forge and on the site, and ``mkdocs build --strict`` checks it.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PUBLISHED = ("*.md", "docs/*.md", "docs/*.png", "tutorials/*.md", "conf/recipes/README.md", "conf/*/*.yaml")
FENCE = re.compile(r"^```(\w+) ([^`\n]+)$", re.MULTILINE)


def public_packages() -> list[str]:
    """Read the table of docs/python.md that says which packages are public."""
    return re.findall(r"^\| `(lit_opd[\w.]*)` \|", (ROOT / "docs" / "python.md").read_text(), re.MULTILINE)


def exported(package: str) -> list[str]:
    """Read the names in `__all__` of a package, without importing it."""
    path = ROOT.joinpath(*package.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    assignments = ast.walk(ast.parse(file.read_text()))
    (names,) = (a.value for a in assignments if isinstance(a, ast.Assign) and ast.unparse(a.targets[0]) == "__all__")
    return ast.literal_eval(names)


def reference_page(package: str) -> str:
    """Write the page of a package: what it is for, and every name that it exports."""
    return f"# {package}\n\n::: {package}\n    options: {{show_root_heading: false, members: {exported(package)}}}\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add to the navigation the pages of docs/ that it does not name, and those of the reference."""
    sections = {title: pages for part in config.nav for title, pages in part.items()}
    named = str(config.nav)
    others = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md"))
    sections["Guide"] += [name for name in others if name not in named]
    sections["Python"] += [{package: f"reference/{package}.md"} for package in public_packages()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replace what lies in docs/ by the documents of the whole repository, and add the reference."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted(path for pattern in PUBLISHED for path in ROOT.glob(pattern)):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for package in public_packages():
        files.append(File.generated(config, f"reference/{package}.md", content=reference_page(package)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Write what a forge reads as Python-Markdown reads it: the words behind a block's language, and folded parts."""
    return FENCE.sub(titled, markdown).replace("<details>", '<details markdown="1">')


def titled(fence: re.Match[str]) -> str:
    """Keep the name of a file as a title, and drop what else tools/run_docs.py reads: superfences knows none of it."""
    language, words = fence.groups()
    file = re.search(r"\bfile=(\S+)", words)
    return f'```{language} title="{file[1]}"' if file else f"```{language}"
