"""The numbers of an evaluation, as torchmetrics with summable states: exact over batches and processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_opd.types import FinishReason, Rollout

__all__ = ["AvgAtK", "Interval", "PassAtK", "PerPrompt", "PromptMean", "PromptTable", "Yardsticks"]


class Interval(NamedTuple):
    """A mean with its confidence interval, in the units of the values."""

    mean: float
    low: float
    high: float


class PromptMean(Metric):
    """A weighted mean whose interval takes the prompt as the unit: completions of one prompt are not independent.

    With s_i the sum of values and n_i the sum of weights of prompt i, the mean is sum s_i / sum n_i. Its variance is
    that of a ratio (delta method; Cochran, Sampling Techniques, 1977, ch. 6): m / (m - 1) x sum (s_i - mean n_i)^2 /
    (sum n_i)^2 over m prompts. The interval is Student's t with m - 1 degrees of freedom.

    Args:
        confidence: level of the interval.
    """

    full_state_update = False
    s: Tensor
    n: Tensor
    ss: Tensor
    sn: Tensor
    nn: Tensor
    prompts: Tensor

    def __init__(self, confidence: float = 0.95) -> None:
        super().__init__()
        self.confidence = confidence
        for name in ("s", "n", "ss", "sn", "nn", "prompts"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, sums: Tensor, weights: Tensor) -> None:
        """Add prompts.

        Args:
            sums: [prompts] sum of the values of each prompt.
            weights: [prompts] how many values (tokens, completions) each sum holds.
        """
        sums, weights = self.summands(sums, weights)
        # Not in place: a state made in inference mode may not be changed outside it.
        self.s = self.s + sums.sum()
        self.n = self.n + weights.sum()
        self.ss = self.ss + (sums * sums).sum()
        self.sn = self.sn + (sums * weights).sum()
        self.nn = self.nn + (weights * weights).sum()
        self.prompts = self.prompts + len(sums)

    def summands(self, sums: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What each prompt adds to numerator and denominator of the mean, for the arguments of `update`."""
        return sums.detach().double(), weights.detach().double()

    def compute(self) -> Interval:
        """Mean and confidence interval: NaN where nothing was counted, unbounded with fewer than two prompts."""
        if self.n == 0:
            return Interval(math.nan, math.nan, math.nan)
        return self._interval((self.s / self.n).item(), self._variance(), int(self.prompts))

    def _variance(self) -> float:
        mean, m = self.s / self.n, self.prompts
        squares = (self.ss - 2 * mean * self.sn + mean**2 * self.nn).clamp(min=0)
        return (squares / self.n**2 * m / (m - 1)).item() if m > 1 else math.inf

    def _interval(self, mean: float, variance: float, prompts: int) -> Interval:
        if prompts < 2:
            return Interval(mean, -math.inf, math.inf)
        half = float(stats.t.ppf(0.5 + self.confidence / 2, prompts - 1)) * math.sqrt(variance)
        return Interval(mean, mean - half, mean + half)


class PassAtK(PromptMean):
    """Unbiased pass@k: the chance that at least one of k completions drawn from a prompt's n is correct.

    1 - C(n - c, k) / C(n, k) for c correct of n (arXiv:2107.03374, eq. 1), averaged over prompts. The interval is
    Wilson's on the effective number of prompts p (1 - p) / variance of the mean, so that it stays inside [0, 1] and is
    not empty at the ends.

    Args:
        k: completions drawn.
        confidence: level of the interval.
    """

    def __init__(self, k: int = 1, confidence: float = 0.95) -> None:
        super().__init__(confidence)
        self.k = k

    def summands(self, sums: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Each prompt's pass@k, with weight 1.

        Args:
            sums: [prompts] how many completions are correct.
            weights: [prompts] how many there are, at least k.

        Raises:
            ValueError: fewer completions than k.
        """
        if (weights < self.k).any():
            fewest = int(weights.min())
            raise ValueError(f"pass@{self.k} needs at least {self.k} completions a prompt, found {fewest}")
        pairs = zip(sums.tolist(), weights.tolist(), strict=True)
        passed = [1 - math.comb(int(n) - int(c), self.k) / math.comb(int(n), self.k) for c, n in pairs]
        values = torch.tensor(passed, dtype=torch.float64, device=self.s.device)
        return values, torch.ones_like(values)

    def _interval(self, mean: float, variance: float, prompts: int) -> Interval:
        n = mean * (1 - mean) / variance if 0 < mean < 1 and 0 < variance < math.inf else prompts
        z = float(stats.norm.ppf(0.5 + self.confidence / 2))
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return Interval(mean, max(0.0, centre - half), min(1.0, centre + half))


class AvgAtK(PassAtK):
    """avg@k: the mean accuracy over all k completions of every prompt; it equals pass@1."""

    def __init__(self, confidence: float = 0.95) -> None:
        super().__init__(1, confidence)


class PerPrompt(NamedTuple):
    """An evaluation prompt by prompt: every metric is the sum of its sums over the sum of its weights.

    Attributes:
        numbers: which prompt each entry is of.
        sums: metric -> sum of its values of each prompt.
        weights: metric -> how many values (tokens, completions) each sum holds.
    """

    numbers: list[int]
    sums: dict[str, list[float]]
    weights: dict[str, list[float]]


class PromptTable(Metric):
    """The prompts themselves, in the order of their numbers whatever process measured them."""

    full_state_update = False
    numbers: list[Tensor]
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("numbers", "rows"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, numbers: Tensor, rows: Tensor) -> None:
        """Add prompts.

        Args:
            numbers: [prompts] which they are; those of one number stay in the order in which they come.
            rows: [prompts, ...] what is kept of each.
        """
        self.numbers.append(numbers)
        self.rows.append(rows.detach().double())

    def compute(self) -> tuple[Tensor, Tensor]:
        """Numbers [prompts] and rows [prompts, ...], in order."""
        numbers, rows = dim_zero_cat(self.numbers), dim_zero_cat(self.rows)
        order = numbers.argsort(stable=True)
        return numbers[order], rows[order]


class Yardsticks(nn.Module):
    """All metrics of an evaluation, fed with per-token values of completions grouped by prompt.

    Args:
        per_token: names of the per-token values, averaged over tokens.
        pass_at: the k of every pass@k; `accuracy` is avg@k.
    """

    def __init__(self, per_token: Sequence[str], pass_at: Sequence[int]) -> None:
        super().__init__()
        self._per_token = {name: PromptMean() for name in per_token}
        # A share of completions, like accuracy, so its interval is Wilson's too.
        self._per_completion = {"length": PromptMean(), "truncated_frac": AvgAtK()}
        self._passes: dict[str, PassAtK] = {f"pass_at_{k}": PassAtK(k) for k in pass_at if k > 1}
        self._passes["accuracy"] = AvgAtK()
        self._table = PromptTable()
        # A module of all of them, so that they move with the module to its device.
        self._modules["metrics"] = nn.ModuleList(self._all().values())

    def _all(self) -> dict[str, PromptMean]:
        return {**self._per_token, **self._per_completion, **self._passes}

    def update(
        self, values: Mapping[str, Tensor], rollout: Rollout, rewards_B: Tensor | None, numbers: Sequence[int] = ()
    ) -> None:
        """Add a batch.

        Args:
            values: [B, T] for every per-token name, zero where not counted.
            rollout: the completions.
            rewards_B: [B] 1 where correct; None where nothing judges them.
            numbers: of the batch's prompts among all; without them prompts keep the order in which they come.
        """
        group_B, tokens_B = rollout.prompt_index_B, rollout.mask_BT.sum(1)
        blank = torch.zeros(int(group_B.max()) + 1, dtype=torch.float64, device=group_B.device)

        def by_prompt(values_B: Tensor) -> Tensor:
            return blank.index_add(0, group_B, values_B.double())

        tokens, completions = by_prompt(tokens_B), by_prompt(torch.ones_like(tokens_B))
        fed = {name: (by_prompt(values[name].sum(1)), tokens) for name in self._per_token}
        fed["length"] = (tokens, completions)
        fed["truncated_frac"] = (by_prompt(rollout.finish_B == FinishReason.LENGTH), completions)
        if rewards_B is not None:
            fed |= dict.fromkeys(self._passes, (by_prompt(rewards_B >= 1), completions))
        metrics = self._all()
        for name, pair in fed.items():
            metrics[name].update(*pair)
        rows = torch.stack([torch.stack(metrics[name].summands(*pair), dim=1) for name, pair in fed.items()], dim=1)
        self._table.update(torch.tensor(numbers or [0] * len(blank), device=blank.device), rows)

    def per_prompt(self) -> PerPrompt:
        """Every metric that was fed, prompt by prompt; to be asked before `compute`, which resets."""
        if not self._table.update_called:
            return PerPrompt([], {}, {})
        numbers, rows = self._table.compute()
        names = [name for name, metric in self._all().items() if metric.update_called]
        sums, weights = ([column.tolist() for column in part.T] for part in rows.unbind(2))
        return PerPrompt(numbers.tolist(), dict(zip(names, sums, strict=True)), dict(zip(names, weights, strict=True)))

    def compute(self) -> dict[str, Interval]:
        """Every metric that was fed; all are reset."""
        results = {name: metric.compute() for name, metric in self._all().items() if metric.update_called}
        for metric in (*self._all().values(), self._table):
            metric.reset()
        return results
