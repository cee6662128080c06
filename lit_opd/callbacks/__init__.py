"""Callbacks: one behaviour a file."""

from lit_opd.callbacks.interrupt import SaveOnInterrupt
from lit_opd.callbacks.progress import StepProgress

__all__ = ["SaveOnInterrupt", "StepProgress"]
