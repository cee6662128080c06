"""Print what a run needs of a device's memory, by part and phase, before any weight loads.

The command line calls it for `plan`.
"""

from __future__ import annotations

import json

from lit_opd.commands.json_file import destination
from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import Config
from lit_opd.errors import UserError
from lit_opd.files import write_file
from lit_opd.lab.plan import Advice, Plan, advise, as_json, find_device, make_plan, print_plan
from lit_opd.lab.plan.phases import model_sizes
from lit_opd.lab.plan.plan_page import gigabytes
from lit_opd.runs.lightning_trainer import check_trainer_keys

__all__ = ["plan"]


def plan(config: Config, device: str | None, json_file: str | None) -> None:
    """Plan a run for a named device, or for this machine.

    Raises:
        UserError: it does not fit; the message names the keys to change.
    """
    quiet_libraries()
    file = destination(json_file)
    chosen = find_device(device)
    check_trainer_keys(config)
    sizes = model_sizes(config)
    made = make_plan(config, chosen, sizes)
    advice = advise(config, chosen, sizes, made)
    print_plan(made, advice)
    if file is not None:
        write_file(file, json.dumps(as_json(made, advice), indent=2))
    if not made.fits:
        raise _too_large(made, advice)


def _too_large(made: Plan, advice: Advice) -> UserError:
    phase = max(made.peaks, key=lambda name: made.peaks[name])
    parts = made.phases[phase]
    largest = max(parts, key=lambda part: parts[part])
    found = f"{gigabytes(made.peak)} in the phase {phase}, of which {gigabytes(parts[largest])} {largest}"
    expected = f"at most {gigabytes(made.device.usable)} on {made.device.name}"
    keys = " ".join(advice.changes)
    remedy = f"Set {keys}." if advice.enough else f"Even {keys} is too little: choose smaller models."
    return UserError((advice.changes or ("student.path",))[0].partition("=")[0], expected, found, remedy)
