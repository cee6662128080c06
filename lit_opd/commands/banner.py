"""Say in five lines what is about to train on what, and where it is recorded.

`fit` prints it before anything is measured, and a dry run with what it found besides.
"""

from __future__ import annotations

import json
import sys

from lit_opd.config import Config
from lit_opd.module import DistillationModule
from lit_opd.runs.assembly import Assembly
from lit_opd.runs.rehearsal import Rehearsal
from lit_opd.tracking import RunLogger

__all__ = ["announce", "banner", "findings"]


def announce(config: Config, made: Assembly, logger: RunLogger) -> None:
    """Print the banner of a run that begins or goes on."""
    print(banner(config, made, logger.run_id), file=sys.stderr, flush=True)


def banner(config: Config, made: Assembly, run_id: str | None = None) -> str:
    """Write the five lines."""
    trainer, module, data = made.trainer, made.module, made.data
    counts, source = data.counts, config.data.path or config.data.source
    steps = f"{trainer.max_steps} steps" if trainer.max_steps > 0 else "until trainer.max_epochs or max_time"
    device = f"{trainer.strategy.root_device}, {trainer.world_size} process{'es' * (trainer.world_size > 1)}"
    begun = f" from {made.checkpoint}" if made.checkpoint else ""
    recorded = f"MLflow experiment {config.tracking.experiment!r}" + (f", run {run_id}" if run_id else "")
    where = "without MLflow" if config.tracking.uri is None else recorded
    lines = {
        "student": f"{config.student.path}, {_size(module)}, {config.student.dtype}",
        "teacher": _teacher(config),
        "estimator": _estimator(module),
        "data": f"{source}: {counts['train']} prompts, {config.data.batch_size} x {config.rollout.num_completions} "
        f"completions a step; {counts['validation']} held out",
        "run": f"{steps}{begun} on {device}, {trainer.precision}; {config.output_dir}, {where}",
    }
    return "\n".join(f"{name:<9}  {said}" for name, said in lines.items())


def _size(module: DistillationModule) -> str:
    parameters = [(p.numel(), p.requires_grad) for p in module.model.parameters()]
    whole, trained = sum(n for n, _ in parameters), sum(n for n, trains in parameters if trains)
    return f"{_count(whole)} parameters, {'all' if trained == whole else _count(trained)} of them train"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.2f}M"


def _teacher(config: Config) -> str:
    if config.teachers:
        return ", ".join(f"{name} ({one.path or one.kind})" for name, one in config.teachers.items())
    one = config.teacher
    if one.kind != "local":
        return f"{one.kind} {one.server or one.path or one.follow}"
    return f"{one.path}, {one.dtype if one.quantization == 'none' else one.quantization}"


def _estimator(module: DistillationModule) -> str:
    estimator = module.estimator
    given = ", ".join(f"{key}={json.dumps(value, default=str)}" for key, value in estimator.kwargs.items())
    aim = estimator.contract.aim or "no declared target"
    return f"{estimator.spec.name}{f' ({given})' if given else ''}: {aim}"


def _compared(config: Config) -> str:
    if config.teacher.least_aligned is not None:
        return "of the student alone: the teacher is compared by spans of text"
    return "the same for student and teacher"


def findings(config: Config, found: Rehearsal) -> str:
    """Write what a dry run found besides: a prompt as it is read, tokens, and fast paths."""
    module, batch = found.made.module, found.batch
    ids = batch.prompts.ids_BP[0][batch.prompts.mask_BP[0]]
    verdicts = [str(verdict) for verdict in module.verdicts.values()]
    lines = {
        "prompt": f"{module.tokenizer.decode(ids)!r}, {len(ids)} tokens",
        "tokens": f"{module.pair.vocabulary} ids, {_compared(config)}",
        "paths": "; ".join(verdicts) or f"the plain ones (optim.paths={config.optim.paths}, {module.device.type})",
    }
    return "\n".join(f"{name:<9}  {said}" for name, said in lines.items())
