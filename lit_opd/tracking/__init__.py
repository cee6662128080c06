"""Tell MLflow of a run.

Callbacks, runs and commands hand values to this room, the only one that knows MLflow.
"""

from lit_opd.tracking.lineage import log_datasets, log_medians, log_student
from lit_opd.tracking.log import log_files, log_metrics, log_table, log_tag, logger_of
from lit_opd.tracking.record import RunRecord, log_examples
from lit_opd.tracking.run import RunLogger, begin_run, git_sha, ui_command
from lit_opd.tracking.store import MlflowClient, MlflowException, MlflowRun, check_tracking, open_store, send_kept
from lit_opd.tracking.view import offer_view, view_link

__all__ = [
    "MlflowClient", "MlflowException", "MlflowRun", "RunLogger", "RunRecord", "begin_run", "check_tracking", "git_sha",
    "log_datasets", "log_examples", "log_files", "log_medians", "log_metrics", "log_student", "log_table", "log_tag",
    "logger_of", "offer_view", "open_store", "send_kept", "ui_command",
    "view_link",
]  # fmt: skip
