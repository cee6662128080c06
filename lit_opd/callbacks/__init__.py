"""Watch, record and guard a run while Lightning trains, one behaviour a file.

`runs.lightning_trainer` puts them into a trainer. They hand their values to tracking, which alone knows MLflow.
"""

from lit_opd.callbacks.collapse import WatchCollapse
from lit_opd.callbacks.conflict import TeacherGradients
from lit_opd.callbacks.diagnostics import StepDiagnostics
from lit_opd.callbacks.figures import EvaluationFigures
from lit_opd.callbacks.interrupt import SaveOnInterrupt
from lit_opd.callbacks.lines import StepLines
from lit_opd.callbacks.pace import KeepPace
from lit_opd.callbacks.profile import ProfileSteps
from lit_opd.callbacks.progress import StepProgress
from lit_opd.callbacks.speed import StepSpeed

__all__ = [
    "EvaluationFigures",
    "KeepPace",
    "ProfileSteps",
    "SaveOnInterrupt",
    "StepDiagnostics",
    "StepLines",
    "StepProgress",
    "StepSpeed",
    "TeacherGradients",
    "WatchCollapse",
]
