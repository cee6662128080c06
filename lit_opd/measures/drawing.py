"""Draw pictures that look alike: one palette, one set of markers, one style, PNG bytes at the end.

Why here: comparisons, measurements and evaluations all draw what this room measures. Each of them makes a `figure`
within `style()`, draws on it, and takes `png`. The figures belong to nobody else, as `pyplot` keeps none of them, and
matplotlib is imported only when something is drawn, as it takes a second.

Colours are Okabe and Ito's, which colour-blind readers can tell apart, without the yellow, too pale for lines.
"""

from __future__ import annotations

import io
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "GREY", "MARKERS", "figure", "look", "plain", "png", "style"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", ":", "-.")
GREY = "0.45"
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # matplotlib's own search for a free place takes a third of the drawing
    "grid.alpha": 0.25,
}


def look(number: int) -> dict[str, Any]:
    """Give the number-th thing that is drawn its colour, marker and line style, different for the first 70.

    >>> look(1)
    {'color': '#D55E00', 'marker': 's', 'linestyle': '-'}
    """
    line = LINES[number // len(COLOURS) % len(LINES)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "linestyle": line}


def plain(text: str) -> str:
    r"""Escape what matplotlib would read as mathematics, or as an entry that a legend hides.

    >>> print(plain("cost in $"))
    cost in \$
    """
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def style(size: float = 10) -> AbstractContextManager[None]:
    """Draw in the common style, with letters of `size` points, for as long as the context is open."""
    import matplotlib

    return matplotlib.rc_context(STYLE | {"font.size": size})


def figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    """Make an empty figure, in inches, of which 8 to 10 fill a page.

    Without a layout it draws faster, and leaves the margins to the caller.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def png(drawn: Figure, dpi: int = 150) -> bytes:
    """Turn a figure into the bytes of a PNG, with `dpi` pixels an inch."""
    target = io.BytesIO()
    drawn.savefig(target, format="png", dpi=dpi)
    return target.getvalue()
