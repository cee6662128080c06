"""Completions to read in a browser: one page that needs no other file, each token in the colour of its log-ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lit_opd.evaluation import Example

__all__ = ["completions_page"]

# Shades on either side; a token has the strongest one whose limit |log-ratio| reaches. Fixed, so that pages compare.
SHADES, STRONGEST, LINEAR = 8, 5.0, 0.2
# Two of Tol's: colour-blind readers can tell them apart, and both carry dark and light text.
RED, BLUE = "204, 51, 17", "0, 119, 187"
STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --text: #1a1a1a; --quiet: #5c5c5c; --line: #d5d5d5; }
@media (prefers-color-scheme: dark) { :root { --page: #17181a; --text: #ececec; --quiet: #a5a5a5; --line: #3a3c40; } }
body { max-width: 60rem; margin: 1.5rem auto; padding: 0 1rem; background: var(--page); color: var(--text);
       font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin-bottom: 0.3rem; }
.quiet { color: var(--quiet); font-size: 0.87rem; }
section { border-top: 1px solid var(--line); padding: 0.7rem 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.3rem 0; font: 14px/1.75 ui-monospace, monospace; }
pre.prompt { color: var(--quiet); border-left: 3px solid var(--line); padding-left: 0.7rem; line-height: 1.45; }
pre span { border-radius: 3px; padding: 0.12em 0; box-shadow: inset -1px 0 var(--page); }
.scale { display: flex; flex-wrap: wrap; font-size: 0.78rem; margin: 0.6rem 0; }
.scale span { padding: 0.15rem 0.28rem; text-align: center; }
"""


def completions_page(examples: Sequence[Example], title: str) -> str:
    """Prompts, completions and rewards.

    Args:
        examples: to show.
        title: whose completions, and when.

    Returns:
        HTML.
    """
    shades = "\n".join(
        f".{side}{level} {{ background: rgba({colour}, {0.8 * level / SHADES:.2f}); }}"
        for side, colour in (("s", RED), ("t", BLUE))
        for level in range(1, SHADES + 1)
    )
    sections = "\n".join(_section(number, example) for number, example in enumerate(examples, start=1))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}{shades}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p class="quiet">Each token is coloured by its log-ratio, student minus teacher, in nats: red where the teacher
disagrees (it gives the token less than the student does), blue where it would have liked it more. Point at a token to
read its value. ⏎ is a line break, ⇥ a tab, ∅ a token without text of its own.</p>
{_scale()}
{sections or '<p class="quiet">No completion was kept: see evaluation.num_examples.</p>'}
</body>
</html>
"""


def limit(level: int) -> float:
    """From which |log-ratio| on a token has a shade: nearly linear in small ones, then logarithmic."""
    return LINEAR * math.sinh(level / SHADES * math.asinh(STRONGEST / LINEAR))


def shade(log_ratio: float) -> str:
    """The class of a token: `s` where the student gives more, `t` where the teacher does, and how much; or nothing."""
    level = sum(abs(log_ratio) >= limit(level) for level in range(1, SHADES + 1))
    return f"{'s' if log_ratio > 0 else 't'}{level}" if level else ""


def _section(number: int, example: Example) -> str:
    tokens = "".join(map(_token, example.tokens, example.log_ratios))
    reward = "" if example.reward is None else f" · reward {example.reward:g}"
    mean = sum(example.log_ratios) / max(1, len(example.log_ratios))
    return f"""<section>
<div class="quiet">completion {number}{reward} · {len(example.tokens)} tokens · mean log-ratio {_signed(mean)}</div>
<pre class="prompt">{escape(example.prompt)}</pre>
<pre>{tokens}</pre>
</section>"""


def _token(text: str, log_ratio: float) -> str:
    # What breaks the line stays outside of the mark, which would otherwise be drawn around nothing.
    shown = escape(text).replace("\n", "⏎\n").replace("\t", "⇥\t") or "∅"
    return f'<span class="{shade(log_ratio)}" title="{_signed(log_ratio)} nats">{shown}</span>'


def _signed(value: float) -> str:
    # Adding zero takes the sign from a negative one.
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")


def _scale() -> str:
    steps = [(-level, f"−{limit(level):.1f}") for level in range(SHADES, 0, -1)]
    steps += [(0, "0"), *((level, f"+{limit(level):.1f}") for level in range(1, SHADES + 1))]
    marks = [f'<span class="{"s" if level > 0 else "t"}{abs(level)}">{text}</span>' for level, text in steps]
    return f'<div class="scale"><span>teacher more</span>{"".join(marks)}<span>student more</span></div>'
