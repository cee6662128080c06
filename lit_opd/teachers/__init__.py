"""Teachers: whatever says how probable the student's tokens are."""

from lit_opd.teachers.local import LocalScorer
from lit_opd.teachers.scorer import FULL, SUPPORT, TOKEN, Scorer, Wanted, wanted_by

__all__ = ["FULL", "SUPPORT", "TOKEN", "LocalScorer", "Scorer", "Wanted", "wanted_by"]
