"""Say how the runs of a comparison were made: models, data, rates, versions, commit, machine.

`digest` calls this. What the variants differ in is said of each of them.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version

import torch

from lit_opd.lab.compare.collect import TRAINING_DATA, RunResult

__all__ = ["how_it_was_made"]

PACKAGES = ("lit_opd", "torch", "lightning", "transformers")
SETTINGS = {
    "student": ("student.path",),
    "teacher": ("teacher.path", "teacher.model"),
    "data": ("data.source", "data.path", "data.split"),
    "prompts a step x completions": ("data.batch_size", "rollout.num_completions"),
    "longest completion": ("rollout.max_new_tokens",),
    "learning rate": ("optim.lr",),
    "optimizer": ("optim.name",),
}
DIGITS = 10  # of a hash


def how_it_was_made(finished: Sequence[RunResult]) -> dict[str, str]:
    """Describe runs by what all of them have, or each of the values where they differ.

    The machine and the versions are those of this process, which writes the report.
    """
    if not finished:
        return {}
    told = {title: _values(finished, keys) for title, keys in SETTINGS.items()}
    told["hash of the data"] = _listed(run.settings.get(TRAINING_DATA, "")[:DIGITS] for run in finished)
    told["commit"] = _listed(run.commit[:DIGITS] for run in finished)
    told["software"] = ", ".join([f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in PACKAGES)])
    told["machine"] = _machine()
    return {title: value for title, value in told.items() if value}


def _values(finished: Sequence[RunResult], keys: Sequence[str]) -> str:
    return _listed(" ".join(run.settings[key] for key in keys if run.settings.get(key)) for run in finished)


def _listed(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(value for value in values if value))


def _machine() -> str:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = torch.cuda.get_device_name() if accelerator is not None and accelerator.type == "cuda" else str(accelerator)
    device = f", {torch.accelerator.device_count()} x {name}" if accelerator is not None else ""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{device}"
