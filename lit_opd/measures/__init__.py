"""What is measured: one table of names, and the metrics that fill it. `register_measure` adds a user's own."""

from lit_opd.measures.custom import register_measure
from lit_opd.measures.table import Measure, describe, in_order

__all__ = ["Measure", "describe", "in_order", "register_measure"]
