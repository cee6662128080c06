"""Build optimizers and schedulers by name: any of torch's, those with a short name here, or by path."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler

from lit_opd.config import OptimConfig
from lit_opd.config.limits import as_type
from lit_opd.errors import LintWarning, RunError, UserError, suggest
from lit_opd.optim.muon import MuonWithAdamW
from lit_opd.optim.rounding import StochasticAdamW, warn_of_lost_steps
from lit_opd.plugins import import_object

__all__ = ["NonFiniteStepError", "build_optimizer", "build_scheduler", "play_schedule"]

# What a step without closure, metric or sparse gradients cannot drive, and the base classes.
UNUSABLE = {"LBFGS", "SparseAdam", "Optimizer", "ReduceLROnPlateau", "LRScheduler"}

MUON = "Muon"

FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}

# Optimizers of others' and of this package that a name without a path means.
SHORT_NAMES = {
    "StochasticAdamW": f"{StochasticAdamW.__module__}:StochasticAdamW",
    **{name: f"bitsandbytes.optim:{name}" for name in ("AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedLion8bit")},
}


class NonFiniteStepError(RunError):
    """A loss or gradient that was not finite, before the optimizer moved."""

    def __init__(
        self, loss: float, grad_norm: float, step: int, batch: int, prompt: str, not_finite: Sequence[str] = ()
    ) -> None:
        remedy = "Lower optim.lr, set optim.clip_norm, or bound the estimator's log-ratio."
        if not_finite:  # the models whose own log-probabilities are at fault
            whose = " and the ".join(not_finite)
            remedy = f"Log-probabilities of the {whose} are not finite: {remedy} Or set {not_finite[0]}.dtype=float32."
        super().__init__(
            f"loss {loss}, gradient norm {grad_norm} at optimizer step {step}, rollout batch {batch} (first prompt "
            f"{prompt!r}). The weights are those of before this step. {remedy}"
        )


def build_optimizer(
    config: OptimConfig, parameters: Iterable[Parameter], outer: Collection[Parameter] = ()
) -> Optimizer:
    """Build the optimizer `torch.optim.<name>`, or the one that a path names, over the trainable parameters.

    Args:
        config: the section `optim`.
        parameters: of the student.
        outer: those of `outer_matrices`, which Muon leaves to AdamW.

    Raises:
        UserError: no such optimizer, or it refuses the keywords.
    """
    name = SHORT_NAMES.get(config.name, config.name)
    if name.startswith("bitsandbytes") and importlib.util.find_spec("bitsandbytes") is None:
        remedy = 'Run: pip install "lit_opd[quantization]"'
        raise UserError("optim.name", f"bitsandbytes, which has {config.name}", "no such package", remedy)
    cls: Any = MuonWithAdamW if name == MUON else _member("optim.name", torch.optim, name, Optimizer, SHORT_NAMES)
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise UserError("student", "trainable parameters", "none", "Unfreeze some, or set student.lora.")
    try:
        if cls in (MuonWithAdamW, getattr(torch.optim, MUON, None)):
            optimizer = _build_muon(config, trainable, outer)
        else:
            optimizer = cls(trainable, lr=config.lr, **_fused(cls, trainable, config.kwargs), **config.kwargs)
    except (TypeError, ValueError) as error:
        expected = f"keywords of {name if ':' in name else f'torch.optim.{name}'}"
        raise UserError("optim.kwargs", expected, str(error), "Correct them.") from error
    if cls is not StochasticAdamW and any(p.element_size() == 2 for p in trainable):
        warn_of_lost_steps(optimizer, config.warmup_steps)
    return optimizer


def _build_muon(config: OptimConfig, trainable: list[Parameter], outer: Collection[Parameter]) -> MuonWithAdamW:
    left = {id(weight) for weight in outer}
    matrices = [weight for weight in trainable if weight.ndim == 2 and id(weight) not in left]
    taken = {id(weight) for weight in matrices}
    others = [weight for weight in trainable if id(weight) not in taken]
    if stacked := sum(weight.ndim > 2 for weight in others):
        told = f"optim.name: Muon trains matrices, so that AdamW trains {stacked} weights of more dimensions."
        warnings.warn(told, LintWarning, stacklevel=3)
    given = dict(config.kwargs)
    adamw = as_type("optim.kwargs.adamw", given.pop("adamw", {}), dict[str, Any])
    return MuonWithAdamW(
        matrices, others, lr=config.lr, adamw={**_fused(torch.optim.AdamW, others, adamw), **adamw}, **given
    )


def rehearsal_device(config: OptimConfig) -> torch.device:
    """Choose where to try out an optimizer: bitsandbytes' make no step on a CPU before version 0.50."""
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    eight_bits = SHORT_NAMES.get(config.name, config.name).startswith("bitsandbytes")
    return here if eight_bits and here is not None else torch.device("cpu")


def _fused(cls: Any, trainable: list[Parameter], chosen: Mapping[str, Any]) -> dict[str, bool]:
    """Ask for one kernel for all of a parameter's update, where the optimizer has one and the user did not choose."""
    known = "fused" in inspect.signature(cls.__init__).parameters
    free = not {"fused", "foreach", "differentiable", "capturable"} & set(chosen)
    able = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in trainable)
    return {"fused": True} if known and free and able else {}


def build_scheduler(config: OptimConfig, optimizer: Optimizer) -> Any:
    """Build a linear warm-up, then the scheduler of torch or of a path, or None where neither is set.

    Raises:
        UserError: no such scheduler, or it refuses the keywords.
    """
    parts: list[Any] = []
    if config.warmup_steps:
        start = 1 / (config.warmup_steps + 1)
        parts.append(lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=config.warmup_steps))
    if config.scheduler is not None:
        cls = _member("optim.scheduler", lr_scheduler, config.scheduler, lr_scheduler.LRScheduler)
        try:
            parts.append(cls(optimizer, **config.scheduler_kwargs))
        except (TypeError, ValueError) as error:
            expected = f"keywords of the scheduler {config.scheduler}"
            raise UserError("optim.scheduler_kwargs", expected, str(error), "Correct them.") from error
    if len(parts) < 2:
        return parts[0] if parts else None
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[config.warmup_steps])


def play_schedule(made: Any, checkpoint: dict[str, Any]) -> None:
    """Give a checkpoint the options of a new optimizer and its scheduler, after as many steps as it has made.

    Lightning would go on with the learning rate, the options and the scheduler of the checkpoint, whatever the module
    was made with. What `configure_optimizers` made in other forms than that of `DistillationModule` is left alone.

    Raises:
        UserError: the schedule ends before.
    """
    made = {"optimizer": made} if isinstance(made, Optimizer) else made
    if not isinstance(made, dict):
        return
    scheduler: Any = made.get("lr_scheduler")
    steps = checkpoint["global_step"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: no step of the optimizer between two of the scheduler
            for _ in range(steps if scheduler is not None else 0):
                scheduler.step()
    except ValueError as error:
        expected = f"a schedule that reaches step {steps}, where training goes on"
        raise UserError("optim.scheduler_kwargs", expected, str(error), "Correct them.") from error
    checkpoint["lr_schedulers"] = [] if scheduler is None else [scheduler.state_dict()]
    for state in checkpoint.get("optimizer_states", []):
        for own, group in zip(made["optimizer"].param_groups, state["param_groups"], strict=False):
            group |= own | {"params": group["params"]}


def _member(key: str, home: Any, name: str, base: type, others: Iterable[str] = ()) -> Any:
    if ":" in name:
        found = import_object(key, name)
        if not (isinstance(found, type) and issubclass(found, base)):
            raise UserError(key, f"a class of {base.__module__}.{base.__name__}", name, "Name another.")
        return found
    classes = {n for n, v in vars(home).items() if isinstance(v, type) and issubclass(v, base) and n[0] != "_"}
    known = classes - UNUSABLE
    if name not in known:
        raise UserError(key, f"a class of {home.__name__}", repr(name), suggest(name, known | {*others}))
    return getattr(home, name)
