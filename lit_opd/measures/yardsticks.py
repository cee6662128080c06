"""Collect everything that an evaluation measures, prompt by prompt, exact over batches and processes.

Why here: one table of sums and weights is enough for the means, for their intervals and for `compare`, which pairs
runs prompt by prompt. `lit_opd.evaluation` feeds it with every batch, and reads it in the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_opd.measures.intervals import Interval, over_prompts, pass_at_k, wilson_over_prompts
from lit_opd.measures.table import COMPLETIONS, PROMPTS, describe
from lit_opd.types import FinishReason, Rollout

__all__ = ["PerPrompt", "Yardsticks"]


class PerPrompt(NamedTuple):
    """An evaluation prompt by prompt: every number is the sum of its sums over the sum of its weights.

    Attributes:
        numbers: which prompt each entry is of.
        sums: name -> sum of its values of each prompt.
        weights: name -> how many values (tokens, completions) each sum holds.
    """

    numbers: list[int]
    sums: dict[str, list[float]]
    weights: dict[str, list[float]]

    def intervals(self) -> dict[str, Interval]:
        """Compute every mean with its interval over prompts: Wilson's for shares of completions or prompts.

        No interval leaves what the measure can be.
        """
        return {name: self._interval(name) for name in self.sums}

    def _interval(self, name: str) -> Interval:
        measure = describe(name)
        over = wilson_over_prompts if measure.unit in (COMPLETIONS, PROMPTS) else over_prompts
        mean, low, high = over(self.sums[name], self.weights[name])
        least, most = measure.bounds
        return Interval(mean, max(low, least), min(high, most))


class Yardsticks(Metric):
    """The table of an evaluation, fed with per-token values of completions grouped by prompt.

    Args:
        per_token: names of the per-token values, averaged over tokens.
        pass_at: the k of every pass@k; `accuracy` is pass@1, the mean over all completions of every prompt.
    """

    full_state_update = False
    numbers: list[Tensor]
    rows: list[Tensor]

    def __init__(self, per_token: Sequence[str], pass_at: Sequence[int]) -> None:
        super().__init__()
        self.per_token = tuple(per_token)
        self.pass_at = {f"pass_at_{k}": k for k in pass_at if k > 1} | {"accuracy": 1}
        self.columns: list[str] = []
        for name in ("numbers", "rows"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self, values: Mapping[str, Tensor], rollout: Rollout, rewards_B: Tensor | None, numbers: Sequence[int] = (),
        failed_B: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add a batch of whole prompts.

        Args:
            values: [B, T] for per-token names, zero where not counted; a name that is missing is not measured.
            rollout: the completions.
            rewards_B: [B] 1 where correct; None where nothing judges them.
            numbers: of the batch's prompts among all; without them prompts keep the order in which they come.
            failed_B: [B] True where the reward stands for an error of the verifier; None where errors end the run.
        """
        group_B, tokens_B = rollout.prompt_index_B, rollout.mask_BT.sum(1)
        blank_G = torch.zeros(int(group_B.max()) + 1, dtype=torch.float64, device=group_B.device)

        def by_prompt(values_B: Tensor) -> Tensor:
            return blank_G.index_add(0, group_B, values_B.detach().double())

        tokens_G, completions_G = by_prompt(tokens_B), by_prompt(torch.ones_like(tokens_B))
        cut_G = by_prompt(rollout.finish_B == FinishReason.LENGTH)
        pairs = {name: (by_prompt(values[name].sum(1)), tokens_G) for name in self.per_token if name in values}
        pairs["length"] = tokens_G, completions_G
        pairs["truncated_frac"] = pass_at_k(cut_G, completions_G, 1), torch.ones_like(blank_G)
        if rewards_B is not None:
            correct_G = by_prompt(rewards_B >= 1)
            for name, k in self.pass_at.items():
                pairs[name] = pass_at_k(correct_G, completions_G, k), torch.ones_like(blank_G)
        if failed_B is not None:
            pairs["verifier_error_frac"] = pass_at_k(by_prompt(failed_B), completions_G, 1), torch.ones_like(blank_G)
        self.columns = list(pairs)
        self.numbers.append(torch.tensor(numbers or [0] * len(blank_G), device=group_B.device))
        self.rows.append(torch.stack([torch.stack(pair, dim=1) for pair in pairs.values()], dim=1))

    def compute(self) -> PerPrompt:
        """Read everything that was fed, in the order of the prompts' numbers whatever process measured them."""
        if not self.columns:
            return PerPrompt([], {}, {})
        numbers, rows = dim_zero_cat(self.numbers), dim_zero_cat(self.rows)
        order = numbers.argsort(stable=True)
        sums, weights = ([column.tolist() for column in part.T] for part in rows[order].unbind(2))
        named = (dict(zip(self.columns, table, strict=True)) for table in (sums, weights))
        return PerPrompt(numbers[order].tolist(), *named)

    def reset(self) -> None:
        """Forget everything that was fed."""
        super().reset()
        self.columns = []
