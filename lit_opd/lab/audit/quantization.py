"""Measure what quantisation makes of the teacher: its log-probabilities, its first choices, the gradient.

`auditing` lists it among its checks.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from lit_opd.errors import UserError
from lit_opd.functional import log_softmax
from lit_opd.functional.head import Stats
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.probe_gradients import cosine, gradient
from lit_opd.lab.audit.readings import compare_positions
from lit_opd.measures.steps import quantiles
from lit_opd.models import LanguageModel, load_frozen
from lit_opd.runs.verdicts import PASS, WARN, Finding, conclude, graded

__all__ = ["quantised_teacher"]

_SMALL = 50_000_000  # weights of a teacher that is loaded once more only to tell
_CHOICES = 16
_TURNED, _WRONG = 0.99, 0.9


def quantised_teacher(evidence: Evidence) -> Finding:
    """Measure how far the quantised teacher is from the one in full precision, on the student's rollouts.

    Where no quantisation is configured and the teacher is small, what 8 bits would do is told for information.
    """
    config = evidence.config.teacher
    size = sum(p.numel() for p in evidence.teacher.model.parameters())
    asked = config.quantization != "none"
    if importlib.util.find_spec("bitsandbytes") is None:
        return conclude(PASS, "not measured: bitsandbytes is not installed, and teacher.quantization=none")
    if not asked and size > _SMALL:
        return conclude(PASS, f"not measured: teacher.quantization=none, and {size / 1e6:.0f} M weights")
    try:
        with _unheard():
            other = load_frozen(replace(config, quantization="none" if asked else "8bit"), evidence.teacher.tokenizer)
            other.vocabulary = evidence.teacher.vocabulary
            other.to(evidence.student.device)
            full, quantised = (other, evidence.teacher) if asked else (evidence.teacher, other)
            numbers = _compare(evidence, full, quantised)
    except UserError as error:
        fix = "Audit where the teacher in full precision can be loaded."
        return conclude(WARN if asked else PASS, f"not measured: {error}", fix)
    found = (f"{config.quantization if asked else 'not asked for; 8bit'}: log-prob error {numbers['logp_error']:.3f} "
             f"nats a token beside a log-ratio of {numbers['log_ratio']:.3f}, top-{numbers['k']:.0f} Jaccard "
             f"{numbers['jaccard']:.2f}, gradient cosine {numbers['cosine']:.4f}")  # fmt: skip
    fix = "Set teacher.quantization=none, or 8bit where it is 4bit; teacher.offload=true saves memory too."
    return conclude(graded(numbers["cosine"], _TURNED, _WRONG) if asked else PASS, found, fix, **numbers)


@contextmanager
def _unheard() -> Iterator[None]:
    """Drop logs below an error: what is slow about the other teacher is not the run's concern."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _compare(evidence: Evidence, full: LanguageModel, quantised: LanguageModel) -> dict[str, float]:
    rollout = evidence.rollout
    ids_N1 = rollout.ids_BT[rollout.mask_BT][:, None]
    k = min(_CHOICES, max(1, full.vocabulary // 2))

    def compare(logits_cV: Tensor, quantised_cV: Tensor, part: slice) -> Stats:
        full_cV = log_softmax(logits_cV)
        first, second = (logps_cV.topk(k, dim=-1).indices for logps_cV in (full_cV, quantised_cV))
        shared_c = (first[..., :, None] == second[..., None, :]).any(-1).sum(-1)
        errors_c = (quantised_cV - full_cV).gather(-1, ids_N1[part]).squeeze(-1).abs()
        return {"errors": errors_c, "jaccard": shared_c / (2 * k - shared_c)}

    stats = compare_positions(full, quantised, rollout, evidence.distiller.head_rows, compare)
    readings = evidence.readings
    return {
        "logp_error": float(stats["errors"].mean()),
        "logp_error_99": float(quantiles(stats["errors"].float(), (0.99,))),
        "log_ratio": float(readings.log_ratio_N[readings.counted_N].abs().mean()),
        "jaccard": float(stats["jaccard"].float().mean()),
        "k": float(k),
        "cosine": cosine(*(gradient(evidence.taught_by(teacher)) for teacher in (full, quantised))),
    }
