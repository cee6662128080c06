"""Show completions as one HTML page that needs no other file, each token in the colour of its log-ratio.

Why here: `figures` leaves it in the MLflow run of every evaluation, to be opened in a browser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lit_opd.evaluation import Example

__all__ = ["completions_page"]

# Colour-blind readers can tell them apart, on a light page and on a dark one.
RED, BLUE = "204, 51, 17", "0, 119, 187"
# Log-ratios (nats): of the strongest colour, and up to which colours grow about linearly. Fixed, so that pages compare.
STRONGEST, LINEAR = 5.0, 0.2
LEGEND = (-5.0, -2.0, -1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
STYLE = """
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; }
section { border-top: 1px solid gray; padding: 0.7rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.3rem 0; font: 14px/1.75 ui-monospace, monospace; }
.quiet { opacity: 0.65; }
"""


def completions_page(examples: Sequence[Example], title: str) -> str:
    """Write a page of HTML under a title that says whose completions, and when: prompts, completions and rewards."""
    legend = "".join(f'<span style="{shade(value)}"> {value:+g} </span>' for value in LEGEND)
    sections = "\n".join(_section(number, example) for number, example in enumerate(examples, start=1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head>
<body>
<h1>{escape(title)}</h1>
<p>Each token is coloured by its log-ratio, student minus teacher, in nats: red where the teacher disagrees (it gives
the token less than the student does), blue where it would have liked it more. Point at a token to read its value.
⏎ is a line break, ⇥ a tab, ∅ a token without text of its own.</p>
<p class="legend">teacher more {legend} student more</p>
{sections or "<p>No completion was kept: see evaluation.num_examples.</p>"}
</body>
</html>
"""


def shade(log_ratio: float) -> str:
    """Choose the background of a token: its colour says which model gives more, its strength how much more."""
    strength = min(1.0, math.asinh(abs(log_ratio) / LINEAR) / math.asinh(STRONGEST / LINEAR))
    return f"background: rgba({RED if log_ratio > 0 else BLUE}, {0.8 * strength:.2f})"


def _section(number: int, example: Example) -> str:
    tokens = "".join(map(_token, example.tokens, example.log_ratios))
    reward = "" if example.reward is None else f" · reward {example.reward:g}"
    mean = sum(example.log_ratios) / max(1, len(example.log_ratios))
    return f"""<section>
<div>completion {number}{reward} · {len(example.tokens)} tokens · mean log-ratio {mean:+.3f}</div>
<pre class="quiet">{escape(example.prompt)}</pre>
<pre>{tokens}</pre>
</section>"""


def _token(text: str, log_ratio: float) -> str:
    # Adding zero takes the sign from a negative one, below.
    shown = escape(text).replace("\n", "⏎\n").replace("\t", "⇥\t") or "∅"
    return f'<span style="{shade(log_ratio)}" title="{round(log_ratio, 3) + 0.0:+.3f} nats">{shown}</span>'
