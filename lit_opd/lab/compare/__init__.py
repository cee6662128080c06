"""Compare estimators side by side, on the same prompts, seeds and budget, by one analysis.

The command `compare` makes the runs and reports on them, or reports on runs that MLflow already has.
"""
