"""Teachers: whatever says how probable the student's tokens are."""

from lit_opd.teachers.build import build_scorers, check_gives, own_scorer
from lit_opd.teachers.local import LocalScorer
from lit_opd.teachers.scorer import FULL, SUPPORT, TOKEN, Scorer, Wanted, wanted_by

__all__ = [
    "FULL", "SUPPORT", "TOKEN", "LocalScorer", "Scorer", "Wanted", "build_scorers", "check_gives", "own_scorer",
    "wanted_by",
]  # fmt: skip
