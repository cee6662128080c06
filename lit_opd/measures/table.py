"""List everything that is measured, once: its name, title, unit, good direction, and what one value belongs to.

Why here: the progress bar, the summary, the report of a comparison and every picture read this table, so that a number
has the same words everywhere. The other files of this room make the numbers; `register_measure` adds a user's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

Better = Literal["lower", "higher"]
Scale = Literal["raw", "log"]
Of = Literal["token", "support", "position", "completion", "step"]


class Measure(NamedTuple):
    """A measured number, described for readers.

    Attributes:
        title: its name in words.
        unit: of its values.
        better: the good direction, or None where neither is, so that nothing can be ranked by it.
        of: what it is made of, which decides where it is logged. On held-out prompts: a `token` (`val/NAME` and curves
            over positions), the `support` at a position (`support/NAME` and curves), a `position` (curves only) or a
            `completion` (`val/NAME`). In training: a `step`, whose name says all.
        short: its title where a terminal has little room; empty where the title is short enough.
        scale: on which variants are compared: `log` for what spans orders of magnitude and is above 0.
        least: no value is smaller; 0 of a share and on a log scale, whatever is said here.
    """

    title: str
    unit: str
    better: Better | None
    of: Of = "token"
    short: str = ""
    scale: Scale = "raw"
    least: float = -math.inf

    @property
    def axis(self) -> str:
        """Title and unit, as an axis or a heading shows them."""
        return f"{self.title} ({self.unit})" if self.unit else self.title

    @property
    def label(self) -> str:
        """The shortest title."""
        return self.short or self.title

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the most that it can be."""
        least = 0.0 if self.is_share or self.scale == "log" else self.least
        return least, 1.0 if self.is_share else math.inf

    @property
    def is_share(self) -> bool:
        """True where it counts something out of all."""
        return self.unit.startswith("share")


NATS, TOKENS, COMPLETIONS, PROMPTS = "nats/token", "share of tokens", "share of completions", "share of prompts"
MASS = "probability"
PERCENTS = (1, 5, 25, 50, 75, 95, 99)
# In the order in which a report shows them.
MEASURES: dict[str, Measure] = {
    "reverse_kl": Measure("reverse KL", NATS, "lower", scale="log"),
    "accuracy": Measure("accuracy", COMPLETIONS, "higher", "completion"),
    "forward_kl": Measure("forward KL", NATS, "lower", scale="log"),
    "jsd": Measure("Jensen-Shannon divergence", NATS, "lower", short="JSD", scale="log"),
    "teacher_nll": Measure("teacher's negative log-likelihood", NATS, "lower", short="teacher NLL", scale="log"),
    "top1_agreement": Measure("top-1 agreement", TOKENS, "higher", short="top-1 agree"),
    "student_entropy": Measure("student's entropy", NATS, None, short="entropy", least=0.0),
    "teacher_entropy": Measure("teacher's entropy", NATS, None, short="teacher ent.", least=0.0),
    "length": Measure("length", "tokens", None, "completion", least=0.0),
    "truncated_frac": Measure("truncated", COMPLETIONS, None, "completion"),
    "verifier_error_frac": Measure(
        "rewards of 0 where the verifier failed", COMPLETIONS, None, "completion", "verifier failed"
    ),
    "log_ratio": Measure("log-ratio of the token, student minus teacher", NATS, None, "position"),
    "entropy_gap": Measure("entropy, student minus teacher", NATS, None, "position"),
    "stop_log_ratio": Measure("log-ratio of stopping here, student minus teacher", NATS, None, "position"),
    "overlap": Measure("most probable tokens in common", "share of the support", None, "support", "overlap"),
    "student_mass": Measure("student's mass on the teacher's top tokens", MASS, None, "support", "student's mass"),
    "teacher_mass": Measure("teacher's mass on its top tokens", MASS, None, "support", "teacher's mass"),
    "train/loss": Measure("loss", "", None, "step"),
    "train/reverse_kl": Measure("reverse KL as the estimator saw it", NATS, "lower", "step", "reverse KL"),
    "train/entropy": Measure("student's entropy, estimated from its own tokens", NATS, None, "step"),
    "train/grad_norm": Measure("norm of the gradient before clipping", "", None, "step"),
    "train/clipped_frac": Measure("clipped by the estimator", TOKENS, None, "step"),
    "train/student_mass": Measure("student's mass on the estimator's support", MASS, None, "step"),
    "train/student_mass_min": Measure("student's smallest mass on the estimator's support", MASS, None, "step"),
    "train/teacher_mass": Measure("teacher's mass on the estimator's support", MASS, None, "step"),
    "train/aligned_frac": Measure("tokens that a teacher with another tokenizer has too", TOKENS, "higher", "step"),
    "train_position/advantage": Measure("advantage, teacher minus student", NATS, None, "step"),
    "train_position/student_nll": Measure("student's negative log-likelihood", NATS, None, "step"),
    "train_position/teacher_nll": Measure("teacher's negative log-likelihood", NATS, None, "step"),
    "train_position/student_mass": Measure("student's mass on the estimator's support", MASS, None, "step"),
    "advantage/mean": Measure("mean advantage, teacher minus student", NATS, None, "step"),
    "advantage/std": Measure("standard deviation of the advantages", NATS, None, "step"),
    "advantage/skew": Measure("skew of the advantages", "", None, "step"),
    "advantage/min": Measure("smallest advantage", NATS, None, "step"),
    "advantage/max": Measure("largest advantage", NATS, None, "step"),
    **{
        f"advantage/q{q:02d}": Measure(f"advantage that {q} % of tokens lie below", NATS, None, "step")
        for q in PERCENTS
    },
    "advantage/top1_share": Measure(
        "what the largest 1 % of tokens hold", "share of the sum of |advantage|", None, "step"
    ),
    "gradient/clipped_frac": Measure("clipped gradients", "share of steps", None, "step"),
    "gradient/signal_to_noise": Measure("signal over noise of the gradient", "", None, "step"),
    "gradient/noise_scale": Measure("simple noise scale of the gradient", "sequences", None, "step"),
    "stop/log_ratio": Measure("log-ratio at stop tokens, student minus teacher", NATS, None, "step"),
    "rollout/length": Measure("length of the sampled completions", "tokens", None, "step", "length"),
    "rollout/truncated_frac": Measure("sampled completions that were cut", COMPLETIONS, None, "step"),
    "rollout/eos_frac": Measure("sampled completions that ended by themselves", COMPLETIONS, None, "step"),
    "rollout/repetition_frac": Measure("repeated 4-grams", "share of 4-grams", None, "step"),
    "rollout/sampler_gap": Measure("sampler's minus student's log-probability", NATS, None, "step"),
    "rollout/sampler_gap_max": Measure("largest gap between sampler and student", NATS, None, "step"),
    "rollout/sampler_ess": Measure("effective sample, student weighted against sampler", TOKENS, None, "step"),
    "rollout/verifier_error_frac": Measure("rewards of 0 where the verifier failed", COMPLETIONS, None, "step"),
    "perf/rollout_s": Measure("time to sample", "seconds", "lower", "step"),
    "perf/teacher_s": Measure("time to score", "seconds", "lower", "step"),
    "perf/student_s": Measure("time to form gradients and step", "seconds", "lower", "step"),
    "perf/step_s": Measure("time of a step", "seconds", "lower", "step"),
    "perf/tokens_per_s": Measure("completion tokens a second", "tokens/s", "higher", "step", "tokens/s"),
    "perf/peak_memory_mb": Measure("peak memory", "MB", "lower", "step"),
    "perf/paths": Measure("fast paths taken", "paths", None, "step"),
    "cost/tokens": Measure("completion tokens sampled for training", "tokens", "lower", "step"),
    "cost/seconds": Measure("time in training steps", "seconds", "lower", "step"),
    "cost/median_step_s": Measure("median time of a step", "seconds", "lower", "step"),
    "cost/median_tokens_per_s": Measure("median completion tokens a second", "tokens/s", "higher", "step"),
    "cost/peak_memory_mb": Measure("peak memory of the run", "MB", "lower", "step"),
}
PASS_AT = "pass_at_"
_ON_HELD_OUT = ("val", "val_interval", "test", "test_interval", "teacher", "teacher_interval", "position", "support")
_ENDINGS = {"_low": "lower end of its interval", "_high": "upper end of its interval"}
_ENDINGS |= {f"_q{number}": f"quarter {number} of the positions" for number in (1, 2, 3, 4)}


def names_of(*kinds: Of) -> tuple[str, ...]:
    """List the measures of some kinds, in the order of the table."""
    return tuple(name for name, measure in MEASURES.items() if measure.of in kinds)


# What every evaluation averages over tokens, whatever the estimator; a user's own come on top.
YARDSTICKS = names_of("token")


def look_up(name: str) -> Measure | None:
    """Find a measure by its name, with or without what logging puts around it, or None.

    >>> look_up("position/reverse_kl_q2").title
    'reverse KL, quarter 2 of the positions'
    """
    if name in MEASURES:
        return MEASURES[name]
    if name.startswith(PASS_AT):
        return Measure(f"pass@{name.removeprefix(PASS_AT)}", PROMPTS, "higher", "completion")
    family, _, rest = name.partition("/")
    if family in _ON_HELD_OUT:
        return look_up(rest)
    for ending, words in _ENDINGS.items():
        if name.endswith(ending) and (measure := look_up(name.removesuffix(ending))):
            return measure._replace(title=f"{measure.title}, {words}")
    return None


def describe(name: str) -> Measure:
    """Look up a measure by name, where an unknown one gets its own name as title and no direction.

    >>> describe("reverse_kl").axis
    'reverse KL (nats/token)'
    >>> describe("pass_at_4").title
    'pass@4'
    """
    return look_up(name) or Measure(name.replace("_", " "), "", None)


def in_order(names: Iterable[str]) -> list[str]:
    """Sort names as a report shows them, those with a direction first."""
    known = list(MEASURES)

    def place(name: str) -> tuple[bool, int, str]:
        return describe(name).better is None, known.index(name) if name in known else len(known), name

    return sorted(set(names), key=place)
