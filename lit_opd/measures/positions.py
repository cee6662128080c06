"""Collect an evaluation token by token: curves over completion positions, in summable states, and the log-ratios.

Why here: a mean over all tokens hides where in a completion two models part. `lit_opd.evaluation` feeds a
`TokenProfile` with every batch; the pictures of an evaluation and `position/*` are made from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from torchmetrics import Metric

from lit_opd.measures.histogram import Histogram, LogRatioHistogram
from lit_opd.measures.intervals import CONFIDENCE, MOMENTS, prompt_moments, ratio_interval
from lit_opd.measures.table import YARDSTICKS, names_of
from lit_opd.types import Rollout

__all__ = ["POSITION_VALUES", "SUPPORT_VALUES", "Curves", "PositionMeans", "Profile", "TokenProfile"]

SUPPORT_VALUES = names_of("support")
POSITION_VALUES = (*YARDSTICKS, *names_of("position"), *SUPPORT_VALUES)
QUARTERS = 4
# A longer completion's positions are put together, so that curves stay legible, and bands those of what is shown.
MOST_POINTS = 128


class Curves(NamedTuple):
    """Measured values at every point: a completion position, or neighbouring ones together.

    Tables are [points], NaN where nothing was counted.

    Attributes:
        starts: [points + 1] the positions, counted from 0, at which points begin, and where the last one ends.
        counts: tokens at each point: completions that had not ended before it, where it is one position.
        prompts: prompts with a token at each point.
        means: name -> mean over tokens.
        lows: name -> lower end of the mean's interval, over prompts; minus infinity with fewer than two.
        highs: name -> upper end.
        confidence: level of the intervals.
    """

    starts: np.ndarray
    counts: np.ndarray
    prompts: np.ndarray
    means: dict[str, np.ndarray]
    lows: dict[str, np.ndarray]
    highs: dict[str, np.ndarray]
    confidence: float = CONFIDENCE

    @property
    def middles(self) -> np.ndarray:
        """[points] their positions, counted from 1."""
        return (self.starts[:-1] + self.starts[1:] + 1) / 2

    def mean(self, name: str, chosen: np.ndarray | slice = slice(None)) -> float:
        """Average a value over the tokens at some points, NaN where there are none."""
        counts, values = self.counts[chosen], self.means[name][chosen]
        counted = counts > 0
        return float((counts * values)[counted].sum() / counts.sum()) if counted.any() else math.nan

    def summary(self) -> dict[str, float]:
        """Average what is logged: every value over each quarter of the positions, the supports over all of them.

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

    Each point has an interval of its own, over the prompts that have a token there.

    Args:
        names: of the values.
        length: positions, T; the longest completion.
        width: positions of a point.
        confidence: level of the intervals.
    """

    full_state_update = False
    moments: Tensor

    def __init__(self, names: Sequence[str], length: int, width: int = 1, confidence: float = CONFIDENCE) -> None:
        super().__init__()
        self.names, self.length, self.width, self.confidence = tuple(names), length, width, confidence
        self.points = math.ceil(length / width)
        blank = torch.zeros(MOMENTS, len(self.names), self.points, dtype=torch.float64)
        self.add_state("moments", blank, dist_reduce_fx="sum")

    def update(self, values: Mapping[str, Tensor], mask_BT: Tensor, group_B: Tensor) -> None:
        """Add whole prompts.

        Args:
            values: name -> [B, T], zero where not counted; T at most `length`. A missing name is not measured.
            mask_BT: True at counted tokens.
            group_B: completions of one prompt have one number.
        """
        # Shapes: Q values, G prompts, C points.
        unknown_BT = torch.full(mask_BT.shape, math.nan, device=mask_BT.device)
        tokens_QBC = self._at_points(torch.stack([values.get(name, unknown_BT).double() for name in self.names]))
        counts_BC = self._at_points(mask_BT.double())
        groups = int(group_B.max()) + 1
        sums_QGC = tokens_QBC.new_zeros(len(self.names), groups, self.points).index_add(1, group_B, tokens_QBC)
        counts_GC = counts_BC.new_zeros(groups, self.points).index_add(0, group_B, counts_BC)
        # Not in place: torch raises where a tensor that was made in inference mode is changed outside it.
        self.moments = self.moments + prompt_moments(sums_QGC, counts_GC, dim=1)

    def _at_points(self, values: Tensor) -> Tensor:
        """Sum [..., T] within points: [..., points]."""
        whole = pad(values, (0, self.points * self.width - values.shape[-1]))
        return whole.unflatten(-1, (self.points, self.width)).sum(-1)

    def compute(self) -> Curves:
        """Compute means and intervals at every point."""
        moments = self.moments.double().cpu().numpy()
        counts, prompts = (moments[number, 0].astype(int) for number in (0, 2))
        tables = ratio_interval(moments, self.confidence)
        means, lows, highs = (dict(zip(self.names, table, strict=True)) for table in tables)
        starts = np.minimum(np.arange(self.points + 1) * self.width, self.length)
        return Curves(starts, counts, prompts, means, lows, highs, self.confidence)


class Profile(NamedTuple):
    """An evaluation token by token."""

    curves: Curves
    log_ratios: Histogram


class TokenProfile(Module):
    """Curves and histogram of an evaluation, fed with per-token values of completions grouped by prompt.

    Args:
        length: the longest completion.
        names: of the values that get curves.
    """

    def __init__(self, length: int, names: Sequence[str] = POSITION_VALUES) -> None:
        super().__init__()
        self.curves = PositionMeans(names, length, width=math.ceil(length / MOST_POINTS))
        self.log_ratios = LogRatioHistogram()

    def update(self, values: Mapping[str, Tensor], rollout: Rollout) -> None:
        """Add a batch of whole prompts, with [B, T] for the names that are measured, zero where not counted."""
        self.curves.update(values, rollout.mask_BT, rollout.prompt_index_B)
        self.log_ratios.update(values["log_ratio"][rollout.own_mask_BT])

    def compute(self) -> Profile:
        """Read everything that was fed, and forget it."""
        found = Profile(self.curves.compute(), self.log_ratios.compute())
        self.curves.reset()
        self.log_ratios.reset()
        return found
