"""Tell MLflow what went into a run and what came out: its prompts, its student, its costs.

Why here: the columns Dataset and Models of MLflow's table are filled from it. `fit` calls it at both ends of a run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric
from mlflow.tracking import MlflowClient

from lit_opd.data import PromptDataModule
from lit_opd.data.rows import Row
from lit_opd.errors import concealed
from lit_opd.tracking.fitting import RunClient
from lit_opd.tracking.mailbox import message
from lit_opd.tracking.run import RunLogger

__all__ = ["dataset_inputs", "log_datasets", "log_medians", "log_student"]

CONTEXT = "mlflow.data.context"
TYPES = {str: "string", bool: "boolean", int: "long", float: "double"}
DIGEST_LENGTH = 10  # what MLflow recommends
NOT_IN_NAMES = r"""[/:.%"']"""  # of MLflow's models


def log_datasets(logger: RunLogger, data: PromptDataModule) -> None:
    """Fill the run's Dataset column, to which resuming adds nothing."""
    logger.experiment.log_inputs(logger.run_id, dataset_inputs(data))


def dataset_inputs(data: PromptDataModule) -> list[DatasetInput]:
    """Describe the training and the validation prompts to MLflow: where from, which content, what columns.

    Two runs have the same digest exactly where they have the same rows in the same order.
    """
    paths = (data.config.path, data.config.validation_path or data.config.path)
    parts = zip(("training", "validation"), paths, data.rows, data.part_sha256, strict=True)
    return [
        DatasetInput(_dataset(data, context, str(path), rows, sha256), [InputTag(CONTEXT, context)])
        for context, path, rows, sha256 in parts
        if rows
    ]


def _dataset(data: PromptDataModule, context: str, path: str, rows: list[Row], sha256: str) -> Dataset:
    path = concealed(path)
    name = re.split(r"[:/]", path)[-1]
    columns = [{"name": key, "type": TYPES.get(type(value), "object")} for key, value in rows[0].items()]
    part = "train" if context == "training" else context
    counts = {"num_rows": len(rows), "prompts_used": data.counts[part]}
    counts |= {name: data.counts[f"{name}_{part}"] for name in ("dropped", "truncated")}
    source = {"path": path, "split": data.config.split} if data.config.source == "hub" else {"path": path}
    schema, profile = json.dumps({"mlflow_colspec": columns}), json.dumps(counts)
    return Dataset(name, sha256[:DIGEST_LENGTH], data.config.source, json.dumps(source), schema, profile)


def log_student(logger: RunLogger, folder: Path, step: int, data: PromptDataModule) -> None:
    """Enter the student, exported to a folder after so many steps, in MLflow's table of models: without its weights."""
    of = dataset_inputs(data)[-1].dataset
    logger.experiment.enter_student(logger.run_id, str(folder.absolute()), step, of.name, of.digest)


@message
def enter_student(client: RunClient, run_id: str, folder: str, step: int, dataset: str, digest: str) -> None:
    """Make the entry from what MLflow has of the run, unless it is there."""
    run = client.get_run(run_id)
    if any(model.step == step for model in run.outputs.model_outputs):  # type: ignore[union-attr]
        return
    tags = run.data.tags
    shown: dict[str, str] = {
        name: tags[name] for name in ("estimator", "variant", "family", "seed", "teacher") if name in tags
    }
    about = {**shown, "trained_from": tags["student"], "steps": str(step), "folder": folder}
    name = re.sub(NOT_IN_NAMES, "-", f"{tags.get('variant', tags['estimator'])} seed {tags['seed']}")
    model = client.create_logged_model(run.info.experiment_id, name, run_id, params=about)
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    client.set_tag(run_id, "exported_student", folder)
    # With the time at which the run got them: MLflow takes them for the model, and for the run they are no new points.
    MlflowClient.log_batch(client, run_id, metrics=[
        Metric(of.key, of.value, of.timestamp, of.step, model.model_id, dataset, digest, run_id)
        for of in run.data._metric_objs if of.key.startswith(("val/", "cost/"))
    ])  # fmt: skip


def log_medians(logger: RunLogger, perf: Mapping[str, float], step: int) -> None:
    """Add the typical step to the run's `cost/*`, where a table shows of `perf/*` the last step's."""
    names = {"perf/step_s": "cost/median_step_s", "perf/tokens_per_s": "cost/median_tokens_per_s",
             "perf/peak_memory_mb": "cost/peak_memory_mb"}  # fmt: skip
    for one in logger.loggers:
        one.log_metrics({cost: perf[name] for name, cost in names.items() if name in perf}, step)
