"""Freeze the models and a set of rollouts, take every estimator's gradient on each of them, and compare."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import lightning as L
import torch
from rich.progress import track
from torch import Tensor

from lit_opd import estimators, models
from lit_opd.config import Config
from lit_opd.data import PromptDataModule
from lit_opd.distiller import Distiller
from lit_opd.errors import UserError
from lit_opd.estimators import BoundEstimator
from lit_opd.functional import chunk_rows
from lit_opd.lab.measure.choice import TARGETS, check_supports, chosen_estimators
from lit_opd.lab.measure.gradients import Specimen, allocated_mb, unit_gradient
from lit_opd.lab.measure.moments import UNKNOWN, compare, inner_product, trace_variance
from lit_opd.lab.measure.result import Measurement, Row
from lit_opd.lab.measure.sketch import Sketch
from lit_opd.rollout import build_engine, build_source, training_law
from lit_opd.runs.lightning_trainer import build_evaluation_trainer
from lit_opd.runs.prepare import check_local_teacher, prepare_data
from lit_opd.teachers import build_scorers
from lit_opd.types import Need, Rollout, SamplingLaw

__all__ = ["measure"]

TOP_SHARE = 0.01

# Fewer give no intervals; the configuration asks for as many, too.
LEAST_UNITS = 4


def measure(config: Config) -> Measurement:
    """Run the microscope as configured; nothing is trained and nothing is written.

    Ctrl-C ends it, with what the units that were whole by then tell, where they are enough for intervals.

    Raises:
        UserError: whatever cannot work.
        KeyboardInterrupt: Ctrl-C before `LEAST_UNITS` units.
    """
    L.seed_everything(config.seed, verbose=False)
    if config.rollout.student_share < 1:
        share = config.rollout.student_share
        raise UserError(
            "rollout.student_share", "1: only the student's own completions are measured", share, "Drop it."
        )
    check_local_teacher(config, "measure")
    chosen = chosen_estimators(config)
    law = training_law(config.rollout, next(iter(chosen.values())))
    # Of another law's prefixes the local target is exact, and nothing here is the gradient of the student's sequences.
    known = {key: TARGETS[key] for key in TARGETS if key == "local" or law.is_student}
    targets = {key: estimators.build(name, **keywords) for key, (name, keywords) in known.items()}
    labels = _labels(targets, chosen)
    looked_at = chosen | {labels[key]: estimator for key, estimator in targets.items() if labels[key] not in chosen}
    data = prepare_data(_of_units(config))
    _check_prompts(config, data)
    trainer = build_evaluation_trainer(config)
    pair, asking = _pair(config, chosen)
    trainer.precision_plugin.convert_module(pair.student.model)
    specimen = _specimen(config, pair, data, law, asking, trainer.strategy.root_device)
    sketch = Sketch(list(specimen.parameters.values()), config.measure.sketch, config.seed)
    units = _units(config, specimen, data, any(Need.REWARDS in e.needs for e in looked_at.values()))
    shown = track(units, "units of prompts", total=config.measure.units, transient=True)
    with trainer.precision_plugin.forward_context():
        seen = _look(shown, specimen, looked_at, sketch)
    exact = {key: torch.stack(seen[label].sketches).double() for key, label in labels.items()}
    return Measurement(
        rows=[_row(label, e, seen[label], exact, config.measure.prompts_per_unit) for label, e in chosen.items()],
        units=len(exact["local"]),
        units_asked=config.measure.units,
        prompts_per_unit=config.measure.prompts_per_unit,
        completions=config.rollout.num_completions,
        tokens=sum(map(len, seen[next(iter(chosen))].norms)),
        coordinates=sketch.coordinates,
        sketch=sketch.size,
        models=pair.names(),
        on_policy=law.is_student,
    )


def _labels(targets: Mapping[str, BoundEstimator], chosen: Mapping[str, BoundEstimator]) -> dict[str, str]:
    """Under which label each target is looked at: that of a chosen estimator which is the same, or one of its own."""
    same = {
        key: [
            label for label, other in chosen.items() if (other.spec, other.keywords) == (target.spec, target.keywords)
        ]
        for key, target in targets.items()
    }
    return {key: found[0] if found else f"target: {key}" for key, found in same.items()}


def _check_prompts(config: Config, data: PromptDataModule) -> None:
    units, held = config.measure.units, len(data.train_prompts.rows) // config.measure.prompts_per_unit
    if units > held:
        raise UserError("measure.units", f"at most the units of measure.prompts_per_unit prompts in the data ({held})",
                        units, "Lower it, or raise data.train_size.")  # fmt: skip


def _pair(config: Config, chosen: Mapping[str, BoundEstimator]) -> tuple[models.Pair, BoundEstimator]:
    """Find the models, and an estimator that asks for a reference where any does."""
    asking = next((e for e in chosen.values() if Need.REFERENCE in e.needs), next(iter(chosen.values())))
    pair = models.Pair(config.student, config.teacher, asking, reference=config.reference)
    check_supports(chosen, pair.vocabulary)
    return pair, asking


def _specimen(
    config: Config, pair: models.Pair, data: PromptDataModule, law: SamplingLaw, asking: BoundEstimator,
    device: torch.device,
) -> Specimen:  # fmt: skip
    student = pair.student.to(device)
    pattern = re.compile(config.measure.parameters)
    parameters = {n: p for n, p in student.model.named_parameters() if p.requires_grad and pattern.search(n)}
    if not parameters:
        raise UserError("measure.parameters", "a pattern that trainable parameters match", repr(pattern.pattern),
                        "Write a regular expression for names such as model.layers.0.mlp.up_proj.weight.")  # fmt: skip
    rows = chunk_rows(pair.vocabulary, config.optim.head_chunk_mib, device)
    scorers = build_scorers(pair, None, asking, rows, device)
    teacher = pair.load("teacher", device)
    source = build_source(
        config.rollout, law, config.seed, build_engine(config.rollout), student, teacher, data.demonstrations
    )
    masked = models.token_ids(student.tokenizer, config.estimator.masked_tokens, "estimator.masked_tokens")
    distiller = Distiller(
        student, estimators.build("full_vocab"), source, scorers, rows, config.optim.micro_batch_tokens,
        masked_ids=masked, verifier=data.verifier,
    )  # fmt: skip
    return Specimen(distiller, parameters)


@dataclass
class _Seen:
    """What one estimator has shown so far."""

    sketches: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory_mb: float = 0.0

    def cut(self, units: int) -> None:
        """Keep the first so many units."""
        self.sketches, self.norms, self.seconds = self.sketches[:units], self.norms[:units], self.seconds[:units]


def _look(
    units: Iterable[Rollout],
    specimen: Specimen,
    looked_at: Mapping[str, BoundEstimator],
    sketch: Sketch,
) -> dict[str, _Seen]:
    """The gradients of every unit under every estimator, one unit after the other."""
    seen = {label: _Seen() for label in looked_at}
    try:
        for number, rollout in enumerate(units):
            for label, estimator in looked_at.items():
                if number == 0:
                    again = partial(unit_gradient, specimen, estimator, rollout)
                    seen[label].memory_mb = allocated_mb(again, specimen.distiller.student.device)
                unit = unit_gradient(specimen, estimator, rollout)
                seen[label].sketches.append(sketch(unit.gradients))
                seen[label].norms.append(unit.token_norms_N)
                seen[label].seconds.append(unit.seconds)
    except KeyboardInterrupt:
        whole = min(len(one.seconds) for one in seen.values())
        if whole < LEAST_UNITS:
            raise
        for one in seen.values():
            one.cut(whole)
    return seen


def _units(config: Config, specimen: Specimen, data: PromptDataModule, judged: bool) -> Iterator[Rollout]:
    """Complete one batch of prompts after the other, with rewards where some estimator asks for them."""
    distiller = specimen.distiller
    for given in itertools.islice(data.train_dataloader(), config.measure.units):
        batch = data.transfer_batch_to_device(given, distiller.student.device, 0)
        rollout = distiller.sample(batch)
        yield distiller.judged(batch, rollout) if judged and data.verifier else rollout


def _of_units(config: Config) -> Config:
    """The same, with batches that are units."""
    return replace(config, data=replace(config.data, batch_size=config.measure.prompts_per_unit))


def _row(label: str, estimator: BoundEstimator, seen: _Seen, exact: Mapping[str, Tensor], prompts: int) -> Row:
    """Everything of one estimator; variances are those of a prompt, and a unit is the mean of some."""
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
