"""Name what is measured in one table, and fill it.

Evaluations, callbacks and reports read it, so that a number has one name. `register_measure` adds a user's own.
"""

from lit_opd.measures.custom import register_measure
from lit_opd.measures.table import Measure, describe, in_order

__all__ = ["Measure", "describe", "in_order", "register_measure"]
