"""What MLflow's stock pages show of an experiment: a saved view that asks which estimator is best, and at what cost."""

from __future__ import annotations

import json
import time
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from lit_opd.tracking.run import RunLogger

__all__ = ["VIEW_KEY", "offer_view"]

VIEW_KEY = "lit_opd"
VIEW_NAME = "Which estimator, at what cost?"
# In this order (at a first visit MLflow may keep its own, of rows too), and pixels wide: the answer without scrolling.
COLUMNS = {
    "tags.`estimator`": 125,
    "tags.`seed`": 60,
    "metrics.`val/reverse_kl`": 130,
    "metrics.`val/accuracy`": 110,
    "metrics.`cost/tokens`": 105,
    "metrics.`cost/seconds`": 110,
    "attributes.`Dataset`": 330,
    "metrics.`val_interval/reverse_kl_low`": 205,
    "metrics.`val_interval/reverse_kl_high`": 205,
    "tags.`family`": 100,
    "attributes.`Models`": 180,
}


@rank_zero_only
def offer_view(logger: RunLogger) -> None:
    """Add the view to the menu `Views` of the run's experiment; one that somebody changed there stays."""
    client, experiment, now = logger.experiment, str(logger.experiment_id), int(time.time() * 1000)
    key = f"mlflow.sharedViewState.{VIEW_KEY}"
    if key not in client.get_experiment(experiment).tags:
        view = {"name": VIEW_NAME, "createdAt": now, "updatedAt": now, "state": json.dumps(_state())}
        client.set_experiment_tag(experiment, key, json.dumps(view))


def _state() -> dict[str, Any]:
    """The best runs first, and in chart view the held-out curves over the tokens that they cost."""
    return {
        "selectedColumns": list(COLUMNS),
        "columnOrder": list(COLUMNS),
        "columnWidths": COLUMNS,
        "orderByKey": "metrics.`val/reverse_kl`",
        "orderByAsc": True,
        "chartsSearchFilter": "^val/",
        "globalLineChartConfig": {"xAxisKey": "metric", "selectedXAxisMetricKey": "cost/tokens", "lineSmoothness": 0},
    }
