"""Score the student's tokens: by a model in this process, or by anything else that knows their probabilities.

The module builds the scorers of a run here, and `Distiller.score` asks them.
"""

from lit_opd.teachers.build import build_scorers, check_gives, in_process, own_scorer, templates
from lit_opd.teachers.frozen import LocalScorer
from lit_opd.teachers.routed import RoutedScorer
from lit_opd.teachers.scorer import FULL, MERGED, SUPPORT, TOKEN, Scorer, Wanted, wanted_by
from lit_opd.teachers.served import ServedScorer

__all__ = [
    "FULL", "MERGED", "SUPPORT", "TOKEN", "LocalScorer", "RoutedScorer", "Scorer", "ServedScorer", "Wanted",
    "build_scorers", "check_gives", "in_process", "own_scorer", "templates", "wanted_by",
]  # fmt: skip
