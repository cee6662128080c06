"""Score with a frozen model in this process.

`build` makes one of the teacher and one of the reference, and evaluations ask for it at temperature 1.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lit_opd.functional import HiddenDistributions, log_softmax, merge_ids, merge_logps, position_losses
from lit_opd.functional.head import Stats
from lit_opd.models import LanguageModel
from lit_opd.teachers.scorer import FULL, MERGED, SUPPORT, TOKEN, Scorer, Wanted
from lit_opd.types import Rollout, Scores

__all__ = ["LocalScorer"]


class LocalScorer(Scorer):
    """Scores with a model in this process, at its temperature and in its precision.

    Args:
        model: the frozen model.
        rows: positions that its head projects at once.
        name: its role.
    """

    gives = frozenset({TOKEN, SUPPORT, FULL, MERGED})

    def __init__(self, model: LanguageModel, rows: int, name: str = "teacher") -> None:
        self.model, self.rows, self.name = model, rows, name

    def untempered(self) -> LocalScorer:
        """Make the same scorer at temperature 1, which the yardsticks compare with."""
        return LocalScorer(self.model.untempered(), self.rows, self.name)

    def present(self) -> AbstractContextManager[None]:
        """Keep an offloaded model on its accelerator for several calls."""
        return self.model.evaluating()

    @torch.no_grad()
    def score(self, rollout: Rollout, wanted: Wanted) -> Scores:
        """Score the counted tokens. Whole distributions stay hidden states with their head until they are read."""
        rollout = rollout.seen_by(self.name)
        with self.model.evaluating():
            hidden_NH, head = self.model.hidden(rollout)
        if wanted.full:
            return Scores(full=HiddenDistributions(hidden_NH, head, self.rows))
        ids_N = merge_ids(rollout.ids_BT[rollout.mask_BT], wanted.merged)

        def read(logits_cV: Tensor, part: slice) -> tuple[Tensor, Stats]:
            logps_cV = merge_logps(log_softmax(logits_cV), wanted.merged)
            taken_c = logps_cV.gather(-1, ids_N[part, None]).squeeze(-1)
            stats = {"logps_N": taken_c}
            if wanted.support:
                support_cK = logps_cV.topk(wanted.support, dim=-1)
                stats |= {"support_ids_NK": support_cK.indices, "support_logps_NK": support_cK.values}
            return taken_c.new_zeros(()), stats

        with self.model.precision():  # of the head: `hidden` has seen to the body's
            stats = position_losses(hidden_NH, head, read, self.rows)[1]
        return Scores(stats["logps_N"], stats.get("support_ids_NK"), stats.get("support_logps_NK"))
