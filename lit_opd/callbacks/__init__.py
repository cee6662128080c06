"""Callbacks: one behaviour a file."""

from lit_opd.callbacks.gamma import ChooseGamma, check_gamma
from lit_opd.callbacks.interrupt import SaveOnInterrupt
from lit_opd.callbacks.progress import StepProgress

__all__ = ["ChooseGamma", "SaveOnInterrupt", "StepProgress", "check_gamma"]
