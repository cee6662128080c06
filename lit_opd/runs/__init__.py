"""Check a run, build its Lightning trainer, keep its folder, and `train` or `evaluate`.

`commands/` calls it for `fit`, `validate`, `test` and `export`, and `lab/` for the runs and checks of its experiments.
"""

from lit_opd.runs.distillation import Outcome, Results, evaluate, train

__all__ = ["Outcome", "Results", "evaluate", "train"]
