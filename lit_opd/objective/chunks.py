"""Go over the counted positions a chunk at a time, by the plain path or by kernels.

Both give a loss the same chunks to look at: `counted.Chunk` holds whole distributions in fp32, `FusedChunk` reads what
is asked for from the rows of logits as the products wrote them. `loss` is written once for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lit_opd.estimators import BoundEstimator
from lit_opd.estimators.asking import ask
from lit_opd.estimators.full import distillm, full_vocab, mixed_kl_estimator, total_variation
from lit_opd.estimators.needs import check_fits, needs_of
from lit_opd.functional import Head, HiddenDistributions, compute_dtype, position_losses
from lit_opd.functional.fused_head import Rows, fused_rows
from lit_opd.functional.head import Piece, Stats, run_head
from lit_opd.functional.support import join_supports
from lit_opd.objective.counted import Chunk, CountedPositions, as_policy
from lit_opd.types import Estimate, Need, TokenBatch

__all__ = ["AnyChunk", "FusedChunk", "SumChunks", "chunk_sums", "why_plain"]


def chunk_sums(
    hidden_NH: Tensor, head: Head, positions: CountedPositions, estimator: BoundEstimator, rows: int, fused: bool
) -> SumChunks:
    """Make what sums a loss of chunks over all positions, by kernels where they are wanted and right."""
    if fused and why_plain(estimator, positions, compute_dtype(hidden_NH)) is None:
        most = fused_rows(rows, len(head.weight_VH))
        return lambda chunk_loss: run_head(hidden_NH, head, _by_kernels(head, positions, chunk_loss), most)

    def plain(chunk_loss: LossOfChunk) -> tuple[Tensor, Stats]:
        return position_losses(hidden_NH, head, lambda logits, part: chunk_loss(positions.chunk(logits, part)), rows)

    return plain


def why_plain(
    estimator: BoundEstimator, positions: CountedPositions | None = None, dtype: torch.dtype = torch.float32
) -> str | None:
    """Say why the head of an estimator takes the plain path, None where kernels compute the same.

    Args:
        estimator: decides most of it.
        positions: those of a micro-batch; None where nothing is known of them.
        dtype: that of the student's logits.
    """
    whole = [term.estimator for term in estimator.terms if Need.FULL in term.estimator.spec.needs]
    for part in whole:
        if _divergence(part) is None:
            return f"{part.spec.name} sees the whole vocabulary by a formula without a kernel"
    if len({_divergence(part) for part in whole}) > 1:
        return "its terms have several divergences over the whole vocabulary"
    if dtype == torch.float64:
        return "kernels compute in float32"
    if positions is not None and positions.merged:
        return "tokens are merged (estimator.merged_stops)"
    if positions is not None and not isinstance(positions.teacher.full, HiddenDistributions | None):
        return "the teacher's distributions are put together from several"
    return None


def _divergence(estimator: BoundEstimator) -> tuple[str, float] | None:
    """Name the divergence of an estimator over the whole vocabulary and its weight, None without a kernel."""
    keywords = estimator.keywords
    if estimator.spec.fn is full_vocab or estimator.spec.fn is distillm:
        name = keywords["divergence"]
        weight = keywords["teacher_weight"] if name == "jsd" else keywords["skew"] if "skew" in name else 0
    elif estimator.spec.fn is total_variation:
        name, weight = "tvd", 0
    elif estimator.spec.fn is mixed_kl_estimator:
        name, weight = "mixed_kl", keywords["forward_weight"]
    else:
        return None
    return _ENDS.get((name, weight), name), float(weight)


# At the ends of its weight a divergence is a KL, which a kernel that mixes would not find.
_ENDS = {
    ("jsd", 0): "forward_kl",
    ("jsd", 1): "reverse_kl",
    ("skew_reverse_kl", 0): "reverse_kl",
    ("skew_forward_kl", 0): "forward_kl",
    ("mixed_kl", 0): "reverse_kl",
    ("mixed_kl", 1): "forward_kl",
}


def _by_kernels(
    head: Head, positions: CountedPositions, chunk_loss: LossOfChunk
) -> Callable[[Tensor, slice, bool], Iterator[Piece]]:
    teacher = positions.teacher.full

    def differentiate(projected_cV: Tensor, part: slice, learns: bool) -> Iterator[Piece]:
        pair = (teacher.project(part), teacher.head) if isinstance(teacher, HiddenDistributions) else None
        rows = Rows(projected_cV, head, pair)
        loss, stats = chunk_loss(FusedChunk.of(positions, rows, part))
        yield part, loss.detach(), stats  # before the gradient takes the place of what values may be views of
        if learns:
            rows.differentiate(loss)

    return differentiate


@dataclass(frozen=True)
class FusedChunk:
    """The facts that `counted.Chunk` has, of rows that are read by kernels.

    Attributes:
        sampled: the fields that concern the sampled tokens alone, leading shape [c].
        rows: both models' logits.
        positions: all positions, for the teacher's scores and the reference.
        part: which of them these are.
    """

    sampled: TokenBatch
    rows: Rows
    positions: CountedPositions
    part: slice

    @classmethod
    def of(cls, positions: CountedPositions, rows: Rows, part: slice) -> FusedChunk:
        """Read the sampled tokens at the positions `part`."""
        ids_c, known_N = positions.ids_N[part], positions.teacher.logps_N
        student_c = rows.student_logps(ids_c[:, None]).squeeze(-1)
        teacher_c = rows.teacher_logps(ids_c[:, None]).squeeze(-1) if known_N is None else known_N[part]
        return cls(positions.sampled(student_c, teacher_c, ids_c, part), rows, positions, part)

    def tokens(self, estimator: BoundEstimator) -> TokenBatch:
        """Fill the fields that an estimator asks for, but for whole distributions, and leave the rest None."""
        found = self.summaries(estimator.spec.needs)
        if Need.SUPPORT in estimator.spec.needs:
            found |= self._support(estimator.support_size, estimator.support)
        return as_policy(replace(self.sampled, **found), estimator)  # type: ignore[arg-type]

    def summaries(self, needs: Iterable[Need]) -> dict[str, Tensor]:
        """Compute what is asked for and has one value a position, detached."""
        asked, found = needs_of(needs, "position"), {}
        if Need.KL in asked:
            found["kl_BT"] = self.rows.kl
        if Need.ENTROPY in asked:
            found["student_entropy_BT"], found["teacher_entropy_BT"] = self.rows.entropies()
        if Need.REFERENCE in asked and self.positions.reference_logps_N is not None:
            found["reference_logps_BT"] = self.positions.reference_logps_N[self.part]
        return found

    def estimate(self, estimator: BoundEstimator) -> tuple[TokenBatch, Estimate]:
        """Ask an estimator about these positions, and tell what it saw."""
        tokens = self.tokens(estimator)
        if Need.FULL not in estimator.spec.needs:
            return tokens, ask(estimator, tokens)
        divergence = _divergence(estimator)
        assert divergence is not None
        return tokens, Estimate(self.rows.divergence(*divergence), self.rows.kl)

    def _support(self, k: int, source: str) -> dict[str, Tensor]:
        check_fits(k, self.rows.student_cV.shape[-1])
        scores, part = self.positions.teacher, self.part
        if scores.support_ids_NK is not None and scores.support_logps_NK is not None:
            ids_cK, teacher_cK = scores.support_ids_NK[part, :k], scores.support_logps_NK[part, :k]
            mask_cK = torch.ones_like(ids_cK, dtype=torch.bool)
        else:
            most_probable = self.rows.most_probable
            student, teacher = (lambda: most_probable(k, teacher=False)), (lambda: most_probable(k, teacher=True))
            ids_cK, mask_cK = join_supports(student, teacher, source)
            teacher_cK = self.rows.teacher_logps(ids_cK)
        return {
            "support_ids_BTK": ids_cK, "support_mask_BTK": mask_cK, "teacher_support_logps_BTK": teacher_cK,
            "student_support_logps_BTK": self.rows.student_logps(ids_cK),
        }  # fmt: skip


AnyChunk = Chunk | FusedChunk
LossOfChunk = Callable[[AnyChunk], tuple[Tensor, Stats]]
SumChunks = Callable[[LossOfChunk], tuple[Tensor, Stats]]
