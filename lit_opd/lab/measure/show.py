"""Print a measurement on the terminal, and record it with its picture in MLflow.

The command `measure` calls both through `commands.experiments`.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lit_opd.config import Config, to_flat
from lit_opd.lab.measure.figure import draw
from lit_opd.lab.measure.result import COLUMNS, Measurement
from lit_opd.tracking import begin_run, git_sha, log_files, log_table, ui_command

__all__ = ["print_measurement", "record"]

NOTES = (
    "bias: norm of (expected gradient - target) over that of the target: the reverse KL at every position with "
    "the prefixes given (local), or that of whole sequences; 0 without an interval for the target itself, and ? where "
    "the target cannot be told from zero with so few prompts: raise measure.prompts_per_unit",
    "signal / noise: squared norm of the expected gradient over the trace of the covariance of one prompt's",
    "top 1%: share of tokens' gradient norms, at the last hidden state, that the largest 1% have",
    "ms, MB: for one unit, teacher, forward and backward, and the most that tensors take meanwhile",
)


OFF_POLICY = (
    "Not sampled by the student's own law (rollout.temperature, top_p, top_k, min_p, min_new_tokens): `local` is at "
    "the sampler's prefixes, and `sequence` is not known\n"
)
SKETCHED = "intervals are those of the units: the sketch's own error is not in them"


def print_measurement(measurement: Measurement) -> None:
    """Print the table, with 95% intervals and what its columns mean."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    shown = [column for column in COLUMNS.values() if column.heading]
    for number, column in enumerate(shown):
        table.add_column(column.heading, justify="right" if number else "left", no_wrap=True)
    for row in measurement.rows:
        table.add_row(*(column.show(column.read(row)) for column in shown))
    kept = "" if measurement.sketch == measurement.coordinates else f", sketched to {measurement.sketch}"
    if measurement.interrupted:
        print(f"Interrupted: {measurement.units} of {measurement.units_asked} units were measured.")
    print(f"Gradients of the same rollouts: {measurement.units} units of {measurement.prompts_per_unit} "
          f"prompts x {measurement.completions} completions, "
          f"{measurement.tokens} tokens; {measurement.coordinates} coordinates{kept}; 95% intervals\n")  # fmt: skip
    if not measurement.on_policy:
        print(OFF_POLICY)
    Console(width=Console(width=1000, markup=False).measure(table).maximum, markup=False).print(table)
    print("\n" + "\n".join((*NOTES, SKETCHED) if kept else NOTES))


def record(config: Config, measurement: Measurement) -> str:
    """Write an MLflow run with the configuration, the numbers, a table and the picture, and return where to look."""
    tags = {"estimator": "measure", **measurement.models, "seed": str(config.seed), **git_sha()}
    logger = begin_run(config, tags)
    logger.log_hyperparams({name: value for name, value in to_flat(config).items() if value not in (None, {}, [])})
    rows = measurement.as_json()["estimators"]
    for row in rows:
        label = re.sub(r"[^\w .:/-]", "_", row["label"])
        logger.log_metrics({f"measure/{label}/{n}": v for n, v in row.items() if isinstance(v, float)})
    log_table(logger, {name: [row[name] for row in rows] for name in rows[0]}, "measure_table.json")
    with tempfile.TemporaryDirectory() as folder:
        picture = draw(measurement, Path(folder) / "measure.png")
        numbers = json.dumps(measurement.as_json(), indent=2, allow_nan=False)
        log_files(logger, {picture.name: picture.read_bytes(), "measure.json": numbers})
    logger.end("KILLED" if measurement.interrupted else "FINISHED")
    return ui_command(config, logger)
