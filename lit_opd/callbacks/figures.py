"""Leave pictures, numbers and completions of every evaluation in its MLflow run.

Why here: a mean does not show where two models differ. Every trainer of `fit` has it, unless `diagnostics.figures` is
false.
"""

from __future__ import annotations

import json
import math
from typing import Any

import lightning as L

from lit_opd.callbacks.page import completions_page
from lit_opd.callbacks.pictures import QUANTILES, draw_log_ratios, draw_positions
from lit_opd.measures.histogram import Histogram
from lit_opd.measures.positions import Curves
from lit_opd.module import DistillationModule
from lit_opd.tracking import log_files, logger_of

__all__ = ["EvaluationFigures"]


class EvaluationFigures(L.Callback):
    """Leaves, of every evaluation on held-out prompts, four artifacts `diagnostics/NAME_STEP` in the MLflow run.

    `positions` (PNG: every value over completion positions; JSON: these numbers and the histogram's), `log_ratios`
    (PNG: a histogram) and `completions` (HTML: the examples, each token coloured). An evaluation of the teacher itself
    is named NAME_teacher_STEP.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: DistillationModule) -> None:  # type: ignore[override]
        """Draw and write, in the first process."""
        logger, profile = logger_of(trainer), pl_module.evaluation.profile
        if logger is None or profile is None or trainer.sanity_checking:
            return
        step, judged, size = trainer.global_step, pl_module.judged, pl_module.evaluation.support_size
        of_teacher = judged == "teacher"
        title = "the teacher on its own completions" if of_teacher else f"student at step {step}"
        ending = f"{'teacher_' if of_teacher else ''}{step:06d}"
        numbers = {"step": step, "judged": judged, "support_size": size, **to_json(*profile)}
        files: dict[str, bytes | str] = {
            f"positions_{ending}.png": draw_positions(profile.curves, title, size),
            f"positions_{ending}.json": json.dumps(numbers, allow_nan=False),
            f"log_ratios_{ending}.png": draw_log_ratios(profile.log_ratios, title),
            f"completions_{ending}.html": completions_page(pl_module.examples, f"Completions: {title}"),
        }
        log_files(logger, files, "diagnostics")


def to_json(curves: Curves, log_ratios: Histogram) -> dict[str, Any]:
    """Collect everything that the pictures show, point by point, with null where there is no number."""
    tables = {"mean": curves.means, "low": curves.lows, "high": curves.highs}
    return {
        "confidence": curves.confidence,
        "starts": curves.starts.tolist(),
        "tokens": curves.counts.tolist(),
        "prompts": curves.prompts.tolist(),
        "values": {
            name: {key: [_number(x) for x in table[name].tolist()] for key, table in tables.items()}
            for name in curves.means
        },
        "log_ratios": {
            "edges": [_number(x) for x in log_ratios.edges.tolist()],
            "counts": log_ratios.counts[1:-1].tolist(),
            "below": int(log_ratios.counts[0]),
            "above": int(log_ratios.counts[-1]),
            "least": _number(log_ratios.least),
            "largest": _number(log_ratios.largest),
            "quantiles": {f"{share:g}": _number(log_ratios.quantile(share)) for share in QUANTILES},
            "top_1_percent_share": _number(log_ratios.top_share()),
        },
    }


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
