"""The numbers of an evaluation, as torchmetrics with summable states: exact over batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_opd.measures.intervals import AvgAtK, Interval, PassAtK, PromptMean
from lit_opd.types import FinishReason, Rollout

__all__ = ["PerPrompt", "PromptTable", "Yardsticks"]


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
