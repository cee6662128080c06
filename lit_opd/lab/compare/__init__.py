"""Estimators side by side: the same prompts, seeds and budget, and paired statistics of what came of it."""
