"""The table of everything that is measured: its name, unit, direction and title.

Written once, so that the progress bar, the summary, the report of a comparison and every picture call a number by the
same words. The numbers themselves are made by the other files of this room.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

__all__ = ["MEASURES", "Better", "Measure", "describe", "in_order"]

Better = Literal["lower", "higher"]


class Measure(NamedTuple):
    """A measured number, described for readers.

    Attributes:
        title: its name in words.
        unit: of its values.
        better: the good direction, or None where neither is, so that nothing can be ranked by it.
    """

    title: str
    unit: str
    better: Better | None

    @property
    def axis(self) -> str:
        """Title and unit, as an axis or a heading shows them."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def is_share(self) -> bool:
        """True where it counts something out of all."""
        return self.unit.startswith("share")


NATS, COMPLETIONS = "nats/token", "share of completions"
# In the order in which a report shows them.
MEASURES = {
    "reverse_kl": Measure("reverse KL", NATS, "lower"),
    "accuracy": Measure("accuracy", COMPLETIONS, "higher"),
    "forward_kl": Measure("forward KL", NATS, "lower"),
    "jsd": Measure("Jensen-Shannon divergence", NATS, "lower"),
    "teacher_nll": Measure("teacher's negative log-likelihood", NATS, "lower"),
    "top1_agreement": Measure("top-1 agreement", "share of tokens", "higher"),
    "student_entropy": Measure("student's entropy", NATS, None),
    "teacher_entropy": Measure("teacher's entropy", NATS, None),
    "length": Measure("length", "tokens", None),
    "truncated_frac": Measure("truncated", COMPLETIONS, None),
}
PASS_AT = "pass_at_"


def describe(name: str) -> Measure:
    """Look up a measure by name; an unknown one gets its own name as title and no direction.

    >>> describe("reverse_kl").axis
    'reverse KL (nats/token)'
    >>> describe("pass_at_4").title
    'pass@4'
    """
    if name.startswith(PASS_AT):
        return Measure(f"pass@{name.removeprefix(PASS_AT)}", "share of prompts", "higher")
    return MEASURES.get(name, Measure(name.replace("_", " "), "", None))


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names as a report shows them, those with a direction first."""
    known = list(MEASURES)

    def place(name: str) -> tuple[bool, int, str]:
        return describe(name).better is None, known.index(name) if name in known else len(known), name

    return sorted(set(names), key=place)
