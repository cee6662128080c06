"""Freeze the models and a set of rollouts, take every estimator's gradient on each of them, and compare.

The command `measure` calls it through `commands.experiments`.
"""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import lightning as L
import torch
from rich.progress import track
from torch import Tensor

from lit_opd import estimators
from lit_opd.config import Config, EstimatorConfig
from lit_opd.data import PromptDataModule
from lit_opd.data.schedule import scheduled
from lit_opd.distiller import Distiller
from lit_opd.errors import UserError
from lit_opd.estimators import BoundEstimator
from lit_opd.lab.measure.choice import TARGETS, check_supports, chosen_estimators
from lit_opd.lab.measure.moments import FEWEST, UNKNOWN, compare, inner_product, trace_variance
from lit_opd.lab.measure.result import Measurement, Row
from lit_opd.lab.measure.units import allocated_mb, unit_gradient
from lit_opd.measures.sketch import Sketch
from lit_opd.models import LanguageModel
from lit_opd.module import DistillationModule
from lit_opd.runs.bench import set_up
from lit_opd.runs.prepare import check_kinds, name_models, prepare_data
from lit_opd.types import Need, Rollout

__all__ = ["measure"]

TOP_SHARE = 0.01


def measure(config: Config) -> Measurement:
    """Run the microscope as configured. Nothing is trained and nothing is written.

    Ctrl-C ends it, with what the units that were whole by then tell, where they are at least `FEWEST`.
    """
    L.seed_everything(config.seed, verbose=False)
    if config.rollout.demonstrated:
        key, whole = ("student_share", "1") if config.rollout.student_share < 1 else ("student_from", "0")
        expected = f"{whole}: only the student's own completions are measured"
        raise UserError(f"rollout.{key}", expected, getattr(config.rollout, key), "Drop it.")
    check_kinds(config, "measure", "local", "student")
    chosen, size = chosen_estimators(config), config.measure.prompts_per_unit
    data = prepare_data(replace(config, data=replace(config.data, batch_size=size)))
    _check_prompts(config, data)
    module, arithmetic = set_up(_asking(config, chosen), data)
    check_supports(chosen, module.pair.vocabulary)
    parameters = _parameters(config, module.student)
    looked_at, labels = _with_targets(chosen, module.law.is_student)
    sketch = Sketch(parameters, config.measure.sketch, config.seed)
    judged = any(Need.REWARDS in estimator.needs for estimator in looked_at.values())
    units = _units(config, module, data, judged)
    with arithmetic():
        shown = track(units, "units of prompts", config.measure.units, transient=True)
        seen = _look(shown, module.distiller, parameters, looked_at, sketch)
    exact = {key: torch.stack(seen[label].sketches).double() for key, label in labels.items()}
    return Measurement(
        rows=[_row(label, estimator, seen[label], exact, size) for label, estimator in chosen.items()],
        units=len(exact["local"]),
        units_asked=config.measure.units,
        prompts_per_unit=size,
        completions=config.rollout.num_completions,
        tokens=sum(map(len, seen[next(iter(chosen))].norms)),
        coordinates=sketch.coordinates,
        sketch=sketch.size,
        models=name_models(config, module.pair),
        on_policy=module.law.is_student,
    )


def _with_targets(
    chosen: Mapping[str, BoundEstimator], on_policy: bool
) -> tuple[dict[str, BoundEstimator], dict[str, str]]:
    """List all estimators to look at, by label, and the label of each target: a chosen one's where they are the same.

    Of another law's prefixes the local target is exact, and nothing is the gradient of the student's sequences.
    """
    looked_at, labels = dict(chosen), {}
    for key, (name, keywords) in TARGETS.items():
        if key == "local" or on_policy:
            target = estimators.build(name, **keywords)
            same = (label for label, e in chosen.items() if (e.spec, e.keywords) == (target.spec, target.keywords))
            labels[key] = next(same, f"target: {key}")
            looked_at.setdefault(labels[key], target)
    return looked_at, labels


def _check_prompts(config: Config, data: PromptDataModule) -> None:
    units, held = config.measure.units, len(data.train_prompts.rows) // config.measure.prompts_per_unit
    if units > held:
        raise UserError("measure.units", f"at most the units of measure.prompts_per_unit prompts in the data ({held})",
                        units, "Lower it, or raise data.train_size.")  # fmt: skip


def _asking(config: Config, chosen: Mapping[str, BoundEstimator]) -> Config:
    """Make the same run with the estimator that asks for most models: one that reads a reference, where any does."""
    tokens = {key: getattr(config.estimator, key) for key in ("masked_tokens", "merged_stops")}
    asking = next((e for e in chosen.values() if Need.REFERENCE in e.needs), estimators.build("full_vocab"))
    section = EstimatorConfig(name=asking.spec.name, kwargs=dict(asking.keywords), **tokens)
    return replace(config, estimator=section)


def _parameters(config: Config, student: LanguageModel) -> list[Tensor]:
    pattern = config.measure.parameters
    chosen: list[Tensor] = [p for n, p in student.model.named_parameters() if p.requires_grad and re.search(pattern, n)]
    if not chosen:
        raise UserError("measure.parameters", "a pattern that trainable parameters match", repr(pattern),
                        "Write a regular expression for names such as model.layers.0.mlp.up_proj.weight.")  # fmt: skip
    return chosen


@dataclass
class _Seen:
    """The gradients of one estimator so far."""

    sketches: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory_mb: float = 0.0


def _look(
    units: Iterable[Rollout],
    distiller: Distiller,
    parameters: Sequence[Tensor],
    looked_at: Mapping[str, BoundEstimator],
    sketch: Sketch,
) -> dict[str, _Seen]:
    """Take the gradients of every unit under every estimator, one unit after the other."""
    seen = {label: _Seen() for label in looked_at}
    try:
        for number, rollout in enumerate(units):
            for label, estimator in looked_at.items():
                take = partial(unit_gradient, distiller.with_estimator(estimator), parameters, rollout)
                if number == 0:
                    seen[label].memory_mb = allocated_mb(take, distiller.student.device)
                unit = take()
                seen[label].sketches.append(sketch(unit.gradients))
                seen[label].norms.append(unit.token_norms_N)
                seen[label].seconds.append(unit.seconds)
    except KeyboardInterrupt:
        whole = min(len(one.seconds) for one in seen.values())
        if whole < FEWEST:
            raise
        for one in seen.values():
            one.sketches, one.norms, one.seconds = one.sketches[:whole], one.norms[:whole], one.seconds[:whole]
    return seen


def _units(config: Config, module: DistillationModule, data: PromptDataModule, judged: bool) -> Iterator[Rollout]:
    """Complete one batch of prompts after the other, with rewards where some estimator asks for them."""
    distiller: Distiller = module.distiller
    for given in itertools.islice(data.train_dataloader(), config.measure.units):
        batch = data.transfer_batch_to_device(given, distiller.student.device, 0)
        rollout = distiller.sample(scheduled(batch, module.schedule, progress=0.0))
        yield distiller.judged(batch, rollout) if judged and rollout.rewards_B is None else rollout


def _row(label: str, estimator: BoundEstimator, seen: _Seen, exact: Mapping[str, Tensor], prompts: int) -> Row:
    """Sum up one estimator. Variances are those of a prompt, and a unit is the mean of some."""
    gradients_nP = torch.stack(seen.sketches).double()
    noise, norms_N = trace_variance(gradients_nP).map(lambda v: v * prompts), torch.cat(seen.norms)
    signal = inner_product(gradients_nP, gradients_nP)
    largest = norms_N.sort(descending=True).values[: max(1, round(TOP_SHARE * len(norms_N)))]
    return Row(
        label=label,
        name=estimator.spec.name,
        family=estimator.spec.family,
        target=estimator.contract.target,
        against={key: compare(gradients_nP, exact[key]) if key in exact else UNKNOWN for key in TARGETS},
        trace_variance=noise.positive(),
        signal_to_noise=signal.map(torch.div, noise).positive(),
        top_share=(largest.sum() / norms_N.sum()).item(),
        seconds=statistics.median(seen.seconds),
        memory_mb=seen.memory_mb,
    )
