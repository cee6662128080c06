"""Measures: everything that is measured, described once, and the metrics that fill it."""

from lit_opd.measures.table import Measure, describe, in_order

__all__ = ["Measure", "describe", "in_order"]
