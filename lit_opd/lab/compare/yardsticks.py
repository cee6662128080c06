"""What is measured, in words: its name, its unit, and whether low or high is good."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

__all__ = ["Yardstick", "describe", "in_order"]

Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Yardstick:
    """A yardstick for readers.

    Attributes:
        title: its name in words.
        unit: of its values.
        better: which direction is good; None where neither is, so that nothing can be ranked by it.
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
        """Whether it counts something out of all: its distances from nothing and from all speak as they are."""
        return self.unit.startswith("share")


NATS, COMPLETIONS = "nats/token", "share of completions"
YARDSTICKS = {
    "reverse_kl": Yardstick("reverse KL", NATS, "lower"),
    "accuracy": Yardstick("accuracy", COMPLETIONS, "higher"),
    "forward_kl": Yardstick("forward KL", NATS, "lower"),
    "jsd": Yardstick("Jensen-Shannon divergence", NATS, "lower"),
    "teacher_nll": Yardstick("teacher's negative log-likelihood", NATS, "lower"),
    "top1_agreement": Yardstick("top-1 agreement", "share of tokens", "higher"),
    "student_entropy": Yardstick("student's entropy", NATS, None),
    "teacher_entropy": Yardstick("teacher's entropy", NATS, None),
    "length": Yardstick("length", "tokens", None),
    "truncated_frac": Yardstick("truncated", COMPLETIONS, None),
}
PASS_AT = "pass_at_"


def describe(name: str) -> Yardstick:
    """The yardstick of a name; one that is not known has no direction."""
    if name.startswith(PASS_AT):
        return Yardstick(f"pass@{name.removeprefix(PASS_AT)}", "share of prompts", "higher")
    return YARDSTICKS.get(name, Yardstick(name.replace("_", " "), "", None))


def in_order(names: Iterable[str]) -> list[str]:
    """The names, those with a direction first, in the order in which a report shows them."""
    known = list(YARDSTICKS)

    def place(name: str) -> tuple[bool, int, str]:
        return describe(name).better is None, known.index(name) if name in known else len(known), name

    return sorted(set(names), key=place)
