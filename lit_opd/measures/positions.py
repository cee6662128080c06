"""An evaluation token by token: curves over completion positions and the histogram of log-ratios, in summable states.

Like `intervals`, exact over batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from torchmetrics import Metric

from lit_opd.measures.histogram import Histogram, LogRatioHistogram
from lit_opd.types import Rollout

__all__ = ["POSITION_VALUES", "SUPPORT_VALUES", "Curves", "PositionMeans", "Profile", "TokenProfile"]

SUPPORT_VALUES = ("overlap", "student_mass", "teacher_mass")
POSITION_VALUES = (
    "reverse_kl", "log_ratio", "teacher_nll", "student_entropy", "teacher_entropy", "entropy_gap", *SUPPORT_VALUES,
    "stop_log_ratio",
)  # fmt: skip
QUARTERS = 4
# A longer completion's positions are put together, so that curves stay legible, and bands those of what is shown.
MOST_POINTS = 128


class Curves(NamedTuple):
    """What was measured at every point: a completion position, or neighbouring ones together.

    Tables are [points], NaN where nothing was counted.

    Attributes:
        starts: [points + 1] the positions, counted from 0, at which points begin, and where the last one ends.
        counts: tokens at each point: completions that had not ended before it, where it is one position.
        prompts: prompts with a token at each point.
        means: name -> mean over tokens.
        lows: name -> lower end of the mean's interval, over prompts; minus infinity with fewer than two.
        highs: name -> upper end.
        deviations: name -> standard deviation of the tokens' values.
        confidence: level of the intervals.
    """

    starts: np.ndarray
    counts: np.ndarray
    prompts: np.ndarray
    means: dict[str, np.ndarray]
    lows: dict[str, np.ndarray]
    highs: dict[str, np.ndarray]
    deviations: dict[str, np.ndarray]
    confidence: float = 0.95

    @property
    def middles(self) -> np.ndarray:
        """[points] their positions, counted from 1."""
        return (self.starts[:-1] + self.starts[1:] + 1) / 2

    def mean(self, name: str, chosen: np.ndarray | slice = slice(None)) -> float:
        """Mean over the tokens at some points; NaN where there are none."""
        counts, values = self.counts[chosen], self.means[name][chosen]
        counted = counts > 0
        return float((counts * values)[counted].sum() / counts.sum()) if counted.any() else math.nan

    def summary(self) -> dict[str, float]:
        """Means to log: of every value over each quarter of the positions, of the supports over all of them.

        A point is in the quarter in which it begins.
        """
        quarter = self.starts[:-1] * QUARTERS // self.starts[-1] + 1
        values = {
            f"position/{name}_q{number}": self.mean(name, quarter == number)
            for name in self.means
            for number in range(1, QUARTERS + 1)
        } | {f"support/{name}": self.mean(name) for name in SUPPORT_VALUES if name in self.means}
        return {name: value for name, value in values.items() if math.isfinite(value)}


class PositionMeans(Metric):
    """Means of per-token values over completion positions, with intervals that take the prompt as the unit.

    At each point by itself, the interval is that of `PromptMean`: a ratio's, over the prompts that have a token there
    (Cochran, Sampling Techniques, 1977, ch. 6), Student's t with one degree of freedom less than prompts.

    Args:
        names: of the values.
        length: positions, T; the longest completion.
        width: positions of a point.
        confidence: level of the intervals.
    """

    full_state_update = False
    sums: Tensor
    squares: Tensor
    prompt_squares: Tensor
    cross: Tensor
    counts: Tensor
    count_squares: Tensor
    prompts: Tensor

    def __init__(self, names: Sequence[str], length: int, width: int = 1, confidence: float = 0.95) -> None:
        super().__init__()
        self.names, self.length, self.width, self.confidence = tuple(names), length, width, confidence
        self.points = math.ceil(length / width)
        for state in ("sums", "squares", "prompt_squares", "cross"):
            self.add_state(state, torch.zeros(len(self.names), self.points, dtype=torch.float64), dist_reduce_fx="sum")
        for state in ("counts", "count_squares", "prompts"):
            self.add_state(state, torch.zeros(self.points, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Mapping[str, Tensor], mask_BT: Tensor, group_B: Tensor) -> None:
        """Add whole prompts.

        Args:
            values: name -> [B, T], zero where not counted; T at most `length`.
            mask_BT: True at counted tokens.
            group_B: completions of one prompt have one number.
        """
        # Shapes: Q values, G prompts, C points.
        values_QBT = torch.stack([values[name] for name in self.names]).double()
        tokens_QBC, counts_BC = self._at_points(values_QBT), self._at_points(mask_BT.double())
        groups = int(group_B.max()) + 1
        sums_QGC = tokens_QBC.new_zeros(len(self.names), groups, self.points).index_add(1, group_B, tokens_QBC)
        counts_GC = counts_BC.new_zeros(groups, self.points).index_add(0, group_B, counts_BC)
        # Not in place: a state made in inference mode may not be changed outside it.
        self.sums = self.sums + sums_QGC.sum(1)
        self.squares = self.squares + self._at_points(values_QBT.square()).sum(1)
        self.prompt_squares = self.prompt_squares + sums_QGC.square().sum(1)
        self.cross = self.cross + (sums_QGC * counts_GC).sum(1)
        self.counts = self.counts + counts_GC.sum(0)
        self.count_squares = self.count_squares + counts_GC.square().sum(0)
        self.prompts = self.prompts + (counts_GC > 0).double().sum(0)

    def _at_points(self, values: Tensor) -> Tensor:
        """[..., T] summed within points: [..., points]."""
        whole = pad(values, (0, self.points * self.width - values.shape[-1]))
        return whole.unflatten(-1, (self.points, self.width)).sum(-1)

    def compute(self) -> Curves:
        """Means, intervals and standard deviations at every point."""
        states = (
            self.sums, self.prompt_squares, self.cross, self.squares, self.counts, self.count_squares, self.prompts,
        )  # fmt: skip
        s, ss, sn, own, n, nn, m = (state.double().cpu().numpy() for state in states)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = s / n
            variance = np.clip(ss - 2 * mean * sn + mean**2 * nn, 0, None) / n**2
            # One prompt says nothing of how prompts differ.
            variance = np.where(m > 1, variance * m / (m - 1), np.inf)
            half = stats.t.ppf(0.5 + self.confidence / 2, np.maximum(m - 1, 1)) * np.sqrt(variance)
            deviation = np.sqrt(np.clip(own / n - mean**2, 0, None))
        tables = (mean, mean - half, mean + half, deviation)
        means, lows, highs, deviations = (dict(zip(self.names, table, strict=True)) for table in tables)
        starts = np.minimum(np.arange(self.points + 1) * self.width, self.length)
        return Curves(starts, n.astype(int), m.astype(int), means, lows, highs, deviations, self.confidence)


class Profile(NamedTuple):
    """An evaluation token by token."""

    curves: Curves
    log_ratios: Histogram


class TokenProfile(Module):
    """Curves and histogram of an evaluation, fed with per-token values of completions grouped by prompt.

    Args:
        length: the longest completion.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.curves = PositionMeans(POSITION_VALUES, length, width=math.ceil(length / MOST_POINTS))
        self.log_ratios = LogRatioHistogram()

    def update(self, values: Mapping[str, Tensor], rollout: Rollout) -> None:
        """Add a batch of whole prompts.

        Args:
            values: [B, T] for every name of `POSITION_VALUES`, zero where not counted.
            rollout: the completions.
        """
        self.curves.update(values, rollout.mask_BT, rollout.prompt_index_B)
        self.log_ratios.update(values["log_ratio"][rollout.own_mask_BT])

    def compute(self) -> Profile:
        """Everything that was fed; it is forgotten."""
        found = Profile(self.curves.compute(), self.log_ratios.compute())
        self.curves.reset()
        self.log_ratios.reset()
        return found
