"""Make names and values fit MLflow, which refuses whole calls for one of them, and send a metric's point once.

Why here: keys of a configuration (`rank_pattern` holds regular expressions) and tags of a user may be any text. Every
call of a run's client passes through `RunClient`.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient
from mlflow.utils.validation import (
    MAX_ENTITY_KEY_LENGTH,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
    MAX_TAG_VAL_LENGTH,
)

from lit_opd.errors import concealed

__all__ = ["RunClient", "fit_name", "fit_tags", "fit_value"]


def fit_name(name: str) -> str:
    """Spell a name with what MLflow takes, and end one that had to change with six letters of its hash.

    The hash keeps two names apart that become the same.
    """
    fitting = re.sub(r"[^/\w.\- :]", "_", str(name))
    if posixpath.normpath(fitting) != fitting or fitting.startswith(("/", "..")) or fitting == ".":
        fitting = re.sub(r"[/.]", "_", fitting) or "_"
    if fitting == name and len(name) <= MAX_ENTITY_KEY_LENGTH:
        return fitting
    return f"{fitting[: MAX_ENTITY_KEY_LENGTH - 7]}-{_hash(name)[:6]}"


def fit_value(value: Any, longest: int) -> str:
    """Write a value as text without secrets, cut where it is too long, with a mark that tells two cut ones apart."""
    text = concealed(str(value))
    mark = f"... [{len(text)} characters, sha256 {_hash(text)[:12]}]"
    return text if len(text) <= longest else text[: longest - len(mark)] + mark


def fit_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Make tags fit."""
    return {fit_name(key): fit_value(value, MAX_TAG_VAL_LENGTH) for key, value in tags.items()}


def _hash(text: str) -> str:
    return hashlib.sha256(str(text).encode("utf-8", "surrogatepass")).hexdigest()


class RunClient(MlflowClient):
    """MLflow's client, which takes any name and value, and may be told the same thing twice.

    Where it is `again`, because an earlier process told of a run, points up to a metric's last step are left out.
    """

    def __init__(self, uri: str, again: bool = False) -> None:
        super().__init__(uri)
        self.again = again
        self._last: dict[str, int] | None = None

    def log_batch(
        self, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = (), tags: Sequence[RunTag] = (),
        synchronous: bool | None = None,
    ) -> None:  # fmt: skip
        """Log metrics, parameters and tags, as many as there are."""
        points = [Metric(**dict(metric) | {"key": fit_name(metric.key)}) for metric in metrics]
        points = [metric for metric in points if not self._is_known(run_id, metric)]
        settings = [Param(fit_name(param.key), fit_value(param.value, MAX_PARAM_VAL_LENGTH)) for param in params]
        told = [RunTag(key, value) for key, value in fit_tags({tag.key: tag.value for tag in tags}).items()]
        kinds: tuple[tuple[str, list[Any], int], ...] = (
            ("metrics", points, MAX_METRICS_PER_BATCH),
            ("params", settings, MAX_PARAMS_TAGS_PER_BATCH),
            ("tags", told, MAX_PARAMS_TAGS_PER_BATCH),
        )
        for kind, values, most in kinds:
            for start in range(0, len(values), most):
                part: Any = {kind: values[start : start + most]}
                super().log_batch(run_id, **part)
        if self._last is not None:
            self._last |= {metric.key: metric.step for metric in points}

    def log_metric(
        self, run_id: str, key: str, value: Any, timestamp: int | None = None, step: int | None = None,
        synchronous: bool | None = None, dataset_name: str | None = None, dataset_digest: str | None = None,
        model_id: str | None = None,
    ) -> None:  # fmt: skip
        """Log one point."""
        when = timestamp or int(time.time() * 1000)
        self.log_batch(run_id, [Metric(key, float(value), when, step or 0, model_id, dataset_name, dataset_digest)])

    def log_param(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> None:
        """Log one parameter."""
        super().log_param(run_id, fit_name(key), fit_value(value, MAX_PARAM_VAL_LENGTH))

    def set_tag(self, run_id: str, key: str, value: Any, synchronous: bool | None = None) -> None:
        """Set one tag."""
        super().set_tag(run_id, fit_name(key), fit_value(value, MAX_TAG_VAL_LENGTH))

    def log_table(self, run_id: str, data: Any, artifact_file: str, extra_columns: list[str] | None = None) -> None:
        """Append rows that the table does not hold yet, of which an earlier try or process may have sent some."""
        columns = list(data)
        rows = list(zip(*(data[name] for name in columns), strict=True))
        if any(file.path == artifact_file for file in self.list_artifacts(run_id)):
            with tempfile.TemporaryDirectory() as folder:
                table = json.loads(Path(self.download_artifacts(run_id, artifact_file, folder)).read_text())
            held = {_place(table["columns"], row) for row in table["data"]}
            rows = [row for row in rows if _place(columns, row) not in held]
        if rows:
            new = dict(zip(columns, map(list, zip(*rows, strict=True)), strict=True))
            super().log_table(run_id, new, artifact_file)

    def _is_known(self, run_id: str, metric: Metric) -> bool:
        if self.again and self._last is None:
            # The only way to ask for all at once: the history of each metric is a call.
            self._last = {held.key: held.step for held in self.get_run(run_id).data._metric_objs}
        return self._last is not None and metric.key in self._last and metric.step <= self._last[metric.key]


def _place(columns: Sequence[str], row: Sequence[Any]) -> str:
    """Name what a row tells of: a step and whose completions, or all of it in a table without steps."""
    values = dict(zip(columns, row, strict=True))
    return json.dumps([values["step"], values.get("policy")] if "step" in values else values)
