"""Score the student's tokens: by a model in this process, or by anything else that knows their probabilities.

The module builds the scorers of a run here, and `Distiller.score` asks them.
"""

from lit_opd.teachers.aligned import AlignedScorer, check_share
from lit_opd.teachers.build import build_scorers, check_gives, in_process, own_scorer, templates
from lit_opd.teachers.frozen import LocalScorer
from lit_opd.teachers.routed import RoutedScorer
from lit_opd.teachers.scorer import FULL, MERGED, SUPPORT, TOKEN, Scorer, Wanted, wanted_by
from lit_opd.teachers.served import ServedScorer
from lit_opd.teachers.spans import TextSpans

__all__ = [
    "FULL", "MERGED", "SUPPORT", "TOKEN", "AlignedScorer", "LocalScorer", "RoutedScorer", "Scorer", "ServedScorer",
    "TextSpans", "Wanted", "build_scorers", "check_gives", "check_share", "in_process", "own_scorer",
    "templates", "wanted_by",
]  # fmt: skip
