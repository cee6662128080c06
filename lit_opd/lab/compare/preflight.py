"""Check all runs of a comparison before the first of them starts, and before any weights load.

`command` calls this: a mistake in the last variant would otherwise show hours later.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_opd.config import load_config, to_flat
from lit_opd.data import PromptDataModule
from lit_opd.errors import UserError
from lit_opd.lab.compare.grid import Run, within
from lit_opd.measures.custom import load_measures
from lit_opd.runs.folder import RunFolder
from lit_opd.runs.lightning_trainer import build_trainer
from lit_opd.runs.prepare import prepare_data
from lit_opd.tracking import MlflowClient, MlflowException

__all__ = ["check_recorded", "check_runs"]


def check_runs(runs: Sequence[Run], may_differ: Sequence[str] = ()) -> None:
    """Prepare every variant once as `fit` would, and look at what earlier runs left behind.

    Prompts may differ where `may_differ` has a key of the data.
    """
    prepared = [(run, _prepare(run)) for run in runs if run.seed == runs[0].seed]
    first, base = prepared[0]
    for run, data in prepared:
        if data.validation_hashes != base.validation_hashes and not any(within(k, ("data",)) for k in may_differ):
            expected = f"the validation prompts of {first.variant!r}, token by token"
            remedy = "Give them the same data and the same tokenizer."
            raise UserError(f"variants.{run.variant}", expected, "others", remedy)
    for run in runs:
        _check_folder(run)


def check_recorded(runs: Sequence[Run], client: MlflowClient) -> None:
    """Look up in MLflow every run that was begun, and refuse to go on with one that is lost there."""
    for run in runs:
        known = RunFolder(run.folder).read_notes().get("mlflow_run_id")
        if known is None:
            continue
        try:
            lost = "which was deleted there" if client.get_run(known).info.lifecycle_stage == "deleted" else None
        except MlflowException as error:
            lost = error.message
        if lost:
            found, remedy = f"{known}, {lost}", f"Restore it, or delete {str(run.folder)!r} to make that run anew."
            raise UserError("output_dir", f"the MLflow run of {run.name!r} in tracking.uri", found, remedy)


def _prepare(run: Run) -> PromptDataModule:
    try:
        build_trainer(run.config, RunFolder(run.folder))
        # Into the table of measures of this process too, whose report asks it for titles and directions.
        load_measures(run.config.evaluation.measures)
        return prepare_data(run.config)
    except UserError as error:
        raise UserError(f"variants.{run.variant}: {error.key}", error.expected, error.found, error.remedy) from error


def _check_folder(run: Run) -> None:
    file = RunFolder(run.folder).config
    if not file.is_file():
        return
    held, wanted = to_flat(load_config([file])), to_flat(run.config)
    for key in sorted(held.keys() | wanted.keys()):
        if held.get(key) != wanted.get(key) and not within(key, ("tracking",)):
            found = f"one in {str(run.folder)!r} with {key} {held.get(key)!r} instead of {wanted.get(key)!r}"
            remedy = "Set output_dir=NEW, or delete that run's folder to make it anew."
            raise UserError("output_dir", "a new folder, or runs of this comparison", found, remedy)
