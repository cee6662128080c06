"""Compute what a run needs of a device's memory, before any weight loads.

The command `plan` calls `make_plan` and `print_plan`.
"""

from lit_opd.lab.plan.advice import Advice, advise
from lit_opd.lab.plan.devices import DEVICES, Device, find_device
from lit_opd.lab.plan.phases import Plan, make_plan
from lit_opd.lab.plan.plan_page import as_json, print_plan

__all__ = ["DEVICES", "Advice", "Device", "Plan", "advise", "as_json", "find_device", "make_plan", "print_plan"]
