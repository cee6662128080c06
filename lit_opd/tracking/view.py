"""Offer a saved view in MLflow that asks which estimator is best, and at what cost.

Why here: MLflow's own columns hide both. `fit` adds it to the menu `Views` of the run's experiment.
"""

from __future__ import annotations

import json
import time

from lit_opd.tracking.fitting import RunClient
from lit_opd.tracking.mailbox import message
from lit_opd.tracking.run import RunLogger

__all__ = ["offer_view", "view_link"]

TRAINING = "workflowType=machine_learning"  # the pages for training; by default they are those for agents
VIEW_NAME, VIEW_TAG = "Which estimator, at what cost?", "mlflow.sharedViewState.lit_opd"
# In this order (at a first visit MLflow may keep its own, of rows too), and pixels wide: the answer without scrolling.
COLUMNS = {
    "tags.`estimator`": 125, "tags.`variant`": 125, "tags.`seed`": 60, "metrics.`val/reverse_kl`": 130,
    "metrics.`val/accuracy`": 110,
    "metrics.`cost/tokens`": 105, "metrics.`cost/seconds`": 110, "attributes.`Dataset`": 330,
    "metrics.`val_interval/reverse_kl_low`": 205, "metrics.`val_interval/reverse_kl_high`": 205,
    "tags.`family`": 100, "attributes.`Models`": 180,
}  # fmt: skip
# The best runs first, and in chart view the held-out curves over the tokens that they cost.
STATE = {
    "selectedColumns": list(COLUMNS), "columnOrder": list(COLUMNS), "columnWidths": COLUMNS,
    "orderByKey": "metrics.`val/reverse_kl`", "orderByAsc": True, "chartsSearchFilter": "^val/",
    "globalLineChartConfig": {"xAxisKey": "metric", "selectedXAxisMetricKey": "cost/tokens", "lineSmoothness": 0},
}  # fmt: skip


def view_link(address: str, experiment: str) -> str:
    """Make the link that opens the view of an experiment, by its id, on a server of MLflow's pages."""
    return f"{address.rstrip('/')}/#/experiments/{experiment}/runs?viewStateShareKey=lit_opd&{TRAINING}"


def offer_view(logger: RunLogger) -> None:
    """Add the view to the experiment of a run."""
    logger.experiment.add_view(logger.run_id, int(time.time() * 1000))


@message
def add_view(client: RunClient, run_id: str, now: int) -> None:
    """Add the view, unless the experiment has one, which somebody may have changed."""
    experiment = client.get_run(run_id).info.experiment_id
    if VIEW_TAG not in client.get_experiment(experiment).tags:
        view = {"name": VIEW_NAME, "createdAt": now, "updatedAt": now, "state": json.dumps(STATE)}
        client.set_experiment_tag(experiment, VIEW_TAG, json.dumps(view))
