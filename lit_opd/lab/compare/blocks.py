"""The pieces of a document, and how they are written in Markdown and in HTML."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Block", "Details", "Heading", "Items", "Picture", "Table", "Text", "html_page", "markdown_page"]


@dataclass(frozen=True)
class Heading:
    """A heading of a level, 1 for the title."""

    level: int
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph; names stand between backticks."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    items: list[str]


@dataclass(frozen=True)
class Table:
    """A table: a header, and rows of as many cells; the first column names the row."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A figure: name of its file without suffix, what it shows, and the PNG."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Details:
    """What is folded away until it is asked for."""

    summary: str
    blocks: Sequence[Block]


Block = Heading | Text | Items | Table | Picture | Details

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
.number { text-align: right; } td.number, td code { white-space: nowrap; }
thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
tbody tr:hover { background: #f4f6f8; } td { font-variant-numeric: tabular-nums; }
figure { margin: 1.5rem 0; } img { max-width: 100%; width: 800px; height: auto; }
figcaption { font-size: .875rem; color: #555; }
code { background: #f0f2f4; padding: 0 .25em; border-radius: 3px; } summary { cursor: pointer; color: #0072B2; }
"""


def markdown_page(blocks: Sequence[Block], pictures: str = "figures") -> str:
    """The blocks in Markdown.

    Args:
        blocks: in order.
        pictures: folder of the figures, as seen from the file.
    """
    return "\n\n".join(_markdown(block, pictures) for block in blocks) + "\n"


def html_page(blocks: Sequence[Block]) -> str:
    """The blocks as one page of HTML that needs nothing else: styles and figures are in it."""
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{_html_all(blocks)}\n</body>\n</html>\n"
    )


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Text():
            return block.text
        case Items():
            return "\n".join(f"- {item}" for item in block.items)
        case Table():
            rows = [block.header, ["---:" if number else "---" for number in _numbers(block)], *block.rows]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
        case Picture():
            return f"![{_alt(block)}]({pictures}/{block.name}.png)\n\n{block.caption}"
        case Details():
            inner = "\n\n".join(_markdown(inner, pictures) for inner in block.blocks)
            return f"<details><summary>{html.escape(block.summary)}</summary>\n\n{inner}\n\n</details>"


def _html_all(blocks: Sequence[Block]) -> str:
    return "\n".join(map(_html, blocks))


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
        case Text():
            return f"<p>{_inline(block.text)}</p>"
        case Items():
            return "<ul>\n" + "\n".join(f"<li>{_inline(item)}</li>" for item in block.items) + "\n</ul>"
        case Table():
            numbers = _numbers(block)
            body = "\n".join(_row(row, "td", numbers) for row in block.rows)
            table = f"<thead>{_row(block.header, 'th', numbers)}</thead>\n<tbody>\n{body}\n</tbody>"
            return f'<div class="table"><table>\n{table}</table></div>'
        case Picture():
            source = f"data:image/png;base64,{base64.b64encode(block.png).decode()}"
            alt = html.escape(_alt(block), quote=True)
            return f'<figure><img src="{source}" alt="{alt}"><figcaption>{_inline(block.caption)}</figcaption></figure>'
        case Details():
            return f"<details><summary>{_inline(block.summary)}</summary>\n{_html_all(block.blocks)}\n</details>"


def _row(cells: Sequence[str], tag: str, numbers: Sequence[bool]) -> str:
    classes = [' class="number"' if number else "" for number in numbers]
    row = zip(cells, classes, strict=True)
    return "<tr>" + "".join(f"<{tag}{kind}>{_inline(cell)}</{tag}>" for cell, kind in row) + "</tr>"


def _numbers(table: Table) -> list[bool]:
    """Which columns are of numbers: they are aligned to the right."""
    columns = [[cell for cell in column if cell] for column in zip(*table.rows, strict=True)] or [[]] * len(
        table.header
    )
    return [
        bool(cells) and all(re.fullmatch(r"[-<]?[\d.,e+-]+( \[.*\])?", cell) for cell in cells) for cells in columns
    ]


def _alt(picture: Picture) -> str:
    """The caption's first sentence, as plain text."""
    return picture.caption.replace("`", "").replace("]", ")").replace("[", "(").partition(". ")[0].removesuffix(".")


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
