"""Say how large a run may be on a device, and which key to change where it does not fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from lit_opd.config import Config
from lit_opd.lab.plan.devices import Device
from lit_opd.lab.plan.phases import Plan, make_plan
from lit_opd.lab.plan.sizes import ModelSizes, sizes_of

__all__ = ["MOST_PROMPTS", "Advice", "advise"]

MOST_PROMPTS = 2**16
_LORA = {"r": 16, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Advice:
    """Limits of a run on a device.

    Attributes:
        micro_batch_tokens: the largest that fits, all else being as configured; None where none does.
        batch_size: the most prompts of a rollout; None where not one fits.
        changes: keys and values that make a run fit which does not, the fewest of a fixed list in its order.
        enough: the changes suffice.
    """

    micro_batch_tokens: int | None
    batch_size: int | None
    changes: tuple[str, ...] = ()
    enough: bool = True


def advise(config: Config, device: Device, sizes: Mapping[str, ModelSizes], plan: Plan) -> Advice:
    """Search for the limits, and for what to change where the plan does not fit."""

    def fits(changed: Config) -> bool:
        return make_plan(changed, device, sizes).fits

    row = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    micro = _largest(lambda rows: fits(_with(config, "optim", micro_batch_tokens=rows * row)), plan.rows)
    prompts = _largest(lambda size: fits(_with(config, "data", batch_size=size)), MOST_PROMPTS)
    limits = None if micro is None else micro * row, prompts
    return Advice(*limits) if plan.fits else Advice(*limits, *_changes(config, device, sizes, limits[0]))


def _largest(fits: Callable[[int], bool], most: int) -> int | None:
    """Find the largest number that fits, where all smaller ones do."""
    if not fits(1):
        return None
    low, high = 1, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _with(config: Config, section: str, **keys: Any) -> Config:
    return replace(config, **{section: replace(getattr(config, section), **keys)})


Step = tuple[str, tuple[str, dict[str, Any]]]


def _changes(
    config: Config, device: Device, sizes: Mapping[str, ModelSizes], micro: int | None
) -> tuple[tuple[str, ...], bool]:
    """Choose one change that suffices, else take in turn those that help until they do, and drop what is not needed."""

    @cache
    def adapted() -> ModelSizes:
        return sizes_of(replace(config.student, lora=_LORA), "student")

    def peak(steps: list[Step]) -> float:
        changed, own = config, dict(sizes)
        for _, (section, keys) in steps:
            changed = _with(changed, section, **keys)
            own |= {"student": adapted()} if "lora" in keys else {}
        return make_plan(changed, device, own).peak

    for step in _steps(config, micro):
        if peak([step]) <= device.usable:
            return (step[0],), True
    taken: list[Step] = []
    for step in _steps(config, micro):
        if peak(taken) > device.usable and peak([*taken, step]) < peak(taken):
            taken.append(step)
    enough = peak(taken) <= device.usable
    for step in taken if enough else ():
        rest = [other for other in taken if other is not step]
        taken = rest if peak(rest) <= device.usable else taken
    return tuple(said for said, _ in taken), enough


def _steps(config: Config, micro: int | None) -> list[Step]:
    """List what saves memory, from what costs nothing to what changes how the student trains."""
    row = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    fewest = micro or row
    steps: list[Step] = []
    if config.optim.micro_batch_tokens > fewest:
        steps.append((f"optim.micro_batch_tokens={fewest}", ("optim", {"micro_batch_tokens": fewest})))
    if config.evaluation.batch_size > config.data.batch_size:
        size = config.data.batch_size
        steps.append((f"evaluation.batch_size={size}", ("evaluation", {"batch_size": size})))
    if config.optim.head_chunk_mib == "auto" or config.optim.head_chunk_mib > 256:
        steps.append(("optim.head_chunk_mib=256", ("optim", {"head_chunk_mib": 256})))
    if not config.student.gradient_checkpointing:
        steps.append(("student.gradient_checkpointing=true", ("student", {"gradient_checkpointing": True})))
    one = config.teacher
    if one.kind == "local" and not config.teachers and one.quantization == "none" and not one.offload:
        steps.append(("teacher.offload=true", ("teacher", {"offload": True})))
    if config.optim.name == "AdamW":
        steps.append(("optim.name=AdamW8bit", ("optim", {"name": "AdamW8bit", "kwargs": {}})))
    if config.data.batch_size > 1:
        steps.append(("data.batch_size=1", ("data", {"batch_size": 1})))
    if config.student.lora is None:
        steps.append(("student.lora={r: 16, target_modules: all-linear}", ("student", {"lora": _LORA})))
    return steps
