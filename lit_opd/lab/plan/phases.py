"""Add up the bytes of a run by part, phase by phase of a step.

A phase begins with what stays in memory for the whole run. Rows are taken to be as long as the configuration lets them
get, so that a plan that fits holds for every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from lit_opd import estimators
from lit_opd.config import Config, TeacherConfig
from lit_opd.functional.fused_head import fused_rows
from lit_opd.lab.plan.activations import FLASH, MASKED, Pass, kept, passing
from lit_opd.lab.plan.devices import Device
from lit_opd.lab.plan.optimizers import state_bytes
from lit_opd.lab.plan.sizes import BYTES, ModelSizes, sizes_of
from lit_opd.objective.chunks import why_plain
from lit_opd.rollout.captured import width_bucket
from lit_opd.teachers.scorer import Wanted, wanted_by
from lit_opd.types import Need

__all__ = ["Plan", "make_plan"]

# bitsandbytes keeps a scale in float32 for each 64 numbers in 4 bits, and for each row of a matrix in 8 bits.
_QUANTISED = {"8bit": 1.0, "4bit": 0.5 + 4 / 64}
# Working memory of the head by `auto`, in MiB, as `functional.head` has it: on a CPU, the most elsewhere, and the share
# of what is free there; and the copies of logits in float32 that it holds.
_CPU_MIB, _MOST_MIB, _SHARE, _COPIES = 256, 4096, 16, 10
_MIB = 2**20
Parts = dict[str, float]


@dataclass(frozen=True)
class Plan:
    """The bytes of a run on a device.

    Attributes:
        device: what it is planned for.
        phases: by name, the bytes of each part that is in memory at the peak of the phase.
        work: what the student reads at once in training.
        rows: completions of a rollout.
        notes: what was assumed.
    """

    device: Device
    phases: dict[str, Parts]
    work: Pass
    rows: int
    notes: tuple[str, ...] = ()

    @property
    def peaks(self) -> dict[str, float]:
        """The bytes of each phase."""
        return {name: sum(parts.values()) for name, parts in self.phases.items()}

    @property
    def peak(self) -> float:
        """The most bytes that the run needs at once."""
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        """True where the device holds it."""
        return self.peak <= self.device.usable

    @property
    def token_step_s(self) -> float | None:
        """Compute the least seconds of a decoded token, which reads weights and cache once, or None."""
        read = sum(self.phases["sampling"].get(part, 0.0) for part in ("decoder's copy of the weights", "decode cache"))
        return read / self.device.bandwidth if self.device.bandwidth and read else None


def make_plan(config: Config, device: Device, sizes: Mapping[str, ModelSizes] | None = None) -> Plan:
    """Plan a run, reading no more than `config.json` of its models, or their sizes where these are given.

    Raises:
        UserError: a model's configuration cannot be read, or the optimizer refuses its keywords.
    """
    return _Planner(config, device, sizes or model_sizes(config)).plan()


def model_sizes(config: Config) -> dict[str, ModelSizes]:
    """Count the sizes of the models in this process: student, teachers and reference, by their keys."""
    named: dict[str, Any] = {"student": config.student, **_local(config)}
    return {key: sizes_of(section, key) for key, section in named.items()}


def _local(config: Config) -> dict[str, TeacherConfig]:
    several = {f"teachers.{name}": one for name, one in config.teachers.items()} or {"teacher": config.teacher}
    local: dict[str, TeacherConfig] = {key: one for key, one in several.items() if one.kind == "local"}
    if Need.REFERENCE in estimators.build_from(config.estimator).needs:
        section: Any = config.reference
        given = dict(vars(section)) | ({} if section.path else {"path": config.student.path})
        local["reference"] = TeacherConfig(**given)
    return local


class _Planner:
    def __init__(self, config: Config, device: Device, sizes: Mapping[str, ModelSizes]) -> None:
        self.config, self.device, self.sizes = config, device, sizes
        self.student, self.frozen = sizes["student"], _local(config)
        self.prompt, self.length = config.data.max_prompt_tokens, config.rollout.max_new_tokens
        self.rows = config.data.batch_size * config.rollout.num_completions
        precision = str(config.trainer.get("precision") or "32-true")
        self.whole = {"bf16-true": 2, "bf16": 2, "64-true": 8, "64": 8}.get(precision)
        self.weight = self.whole or BYTES[config.student.dtype]
        self.trained = self.weight if self.whole or not self.student.rank else max(self.weight, 4)  # peft: in float32
        self.compute = 2 if precision == "bf16-mixed" else self.weight
        self.fast = device.accelerated and config.optim.paths != "plain"
        self.captured = self.fast and config.rollout.capture == "auto" and config.rollout.engine == "local"

    def plan(self) -> Plan:
        """Add up every phase."""
        phases = {"sampling": self.sampling(self.config.rollout.num_completions, self.rows)}
        if self.frozen:
            phases["teacher"] = self.scoring()
        phases["student"], phases["optimizer"] = self.training(), self.stepping()
        phases["evaluation"] = self.evaluating()
        return Plan(self.device, phases, self.work(self.micro_rows), self.rows, tuple(self.notes()))

    @property
    def micro_rows(self) -> int:
        """Rows of the largest micro-batch."""
        update = -(-self.rows // self.config.optim.updates_per_rollout)
        return max(1, min(update, self.config.optim.micro_batch_tokens // (self.prompt + self.length)))

    def work(self, rows: int, residual: int | None = None, compute: int | None = None, key: str = "student") -> Pass:
        """Describe a pass over rows, the student's unless another precision is given."""
        compute = compute or self.compute
        flash = self.fast and compute == 2 and self.sizes[key].unlike is None
        completions = self.config.rollout.num_completions if self.sizes[key].unlike is None else 1
        kind = FLASH if flash else MASKED
        return Pass(rows, self.prompt, self.length, completions, residual or self.weight, compute, kind,
                    repeats=self.device.accelerated, lean=self.fast and self.sizes[key].unlike is None)  # fmt: skip

    # What stays

    @cached_property
    def stays(self) -> Parts:
        """Bytes that are in memory for the whole run, between the phases too."""
        frozen = self.student.weights - self.student.trainable
        parts: Parts = {"student's weights": self.trained * self.student.trainable + self.weight * frozen}
        resting = {key: self.weights_of(key) for key in self.frozen if not self.frozen[key].offload}
        several = [size for key, size in resting.items() if key.startswith("teachers.")]
        parts["teacher's weights"] = resting.get("teacher", 0) + max(several, default=0)  # one of several at a time
        parts["reference's weights"] = resting.get("reference", 0)
        away = [key for key, one in self.frozen.items() if one.offload]
        parts["heads of offloaded models"] = sum(BYTES[self.frozen[key].dtype] * self.sizes[key].head for key in away)
        itself = [one for one in (self.config.teachers or {"": self.config.teacher}).values() if one.kind == "student"]
        if itself and itself[0].follow not in ("live", "adapter_off"):
            parts["teacher's weights"] += self.trained * self.student.trainable
        dtype = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[self.trained]
        hidden = 1.0 if self.student.rank else self.student.projections / self.student.trainable
        parts["optimizer's state"] = state_bytes(self.config.optim, dtype, hidden) * self.student.trainable
        if self.captured:
            parts |= self.decoder("student", self.rows)
        return parts

    def weights_of(self, key: str) -> float:
        """Count the bytes of a frozen model."""
        section, sizes = self.frozen[key], self.sizes[key]
        own = BYTES[section.dtype]
        small = _QUANTISED.get(section.quantization, own)
        return small * sizes.projections + own * (sizes.weights - sizes.projections)

    def decoder(self, key: str, rows: int) -> Parts:
        """Count what sampling keeps for rows: weights as it multiplies by them, keys and values."""
        if self.config.rollout.engine != "local":
            return {}
        own, (rows_out, length_out) = key == "student", self.held_out
        sizes, captured = self.sizes[key], self.captured and own
        compute = self.compute if own else BYTES[self.frozen[key].dtype]
        longest, copied = self.length, own and (compute != self.weight or sizes.rank > 0)
        if captured:  # one cache serves rollouts and evaluations, and keeps the largest size it had
            rows, longest = max(rows, rows_out), max(longest, length_out)
        width = self.prompt + longest
        joined = sizes.layers * (sizes.hidden * (sizes.mixed + 2 * sizes.keys) + 2 * sizes.hidden * sizes.inner)
        copy = compute * (sizes.projections + sizes.head if captured or copied else joined)
        cache = 2 * sizes.layers * rows * (width_bucket(width) if captured else width) * sizes.keys * compute
        return {"decoder's copy of the weights": copy, "decode cache": cache}

    @property
    def held_out(self) -> tuple[int, int]:
        """Rows of an evaluation's batch, and the longest of their completions."""
        own = self.config.evaluation
        return own.batch_size * own.num_completions, own.max_new_tokens or self.length

    # The phases

    def sampling(self, completions: int, rows: int) -> Parts:
        """Read the prompts, then decode."""
        held = self.stays | self.decoder("student", rows)
        logits = rows * self.student.vocabulary * (self.compute + 3 * 4)
        prompts = replace(self.work(rows // completions), length=1, completions=1)
        return held | {"a step's logits, or prompts": max(logits, passing(self.student, prompts))}

    @property
    def wanted(self) -> Wanted:
        """Tell what the estimator asks of the teacher."""
        return wanted_by(estimators.build_from(self.config.estimator))

    def scores(self) -> float:
        """Count the bytes of a rollout's scores, which live until the student has read them."""
        tokens = self.rows * self.length
        if not self.wanted.full:
            return tokens * (4 + 12 * self.wanted.support)
        return tokens * max((self.sizes[k].hidden * BYTES[one.dtype] for k, one in self.frozen.items()), default=0)

    def scoring(self) -> Parts:
        """Have every frozen model read a micro-batch."""
        found: list[Parts] = []
        for key, section in self.frozen.items():
            own = BYTES[section.dtype]
            back = {"weights brought back": self.weights_of(key)} if section.offload else {}
            layer = passing(self.sizes[key], self.work(self.micro_rows, own, own, key))
            most = max(layer, 0 if self.wanted.full else self.chunk())
            found.append(self.stays | back | {"scores": self.scores(), "a layer at work, or a chunk": most})
        return max(found, key=lambda parts: sum(parts.values()))

    def training(self) -> Parts:
        """Read a micro-batch with the student, and its head in chunks."""
        sizes, work = self.student, self.work(self.micro_rows)
        recomputed = self.config.student.gradient_checkpointing
        several = self.micro_rows * self.config.optim.updates_per_rollout < self.rows
        return self.stays | {
            "scores": self.scores(),
            "gradients": self.trained * sizes.trainable if several else 0,
            "activations": kept(sizes, work, recomputed, self.trained),
            **self.head(work),
        }

    def head(self, work: Pass) -> Parts:
        """Count what the head needs: a copy of its weight to multiply by, its gradient, a chunk's logits."""
        sizes = self.student
        learns = sizes.trainable == sizes.weights
        cast = self.compute * sizes.head if self.compute != self.weight else 0
        gradient = max(4, self.weight) * sizes.head if learns else 0
        states = work.counted * sizes.hidden * (2 * work.residual + (work.compute if cast else 0))
        return {"head's weight and gradient": cast + gradient, "head's inputs": states,
                "a chunk of the head": self.trained_chunk()}  # fmt: skip

    def chunk(self) -> float:
        """Tell the working memory of the plain head."""
        chosen = self.config.optim.head_chunk_mib
        if chosen != "auto":
            return int(chosen) * _MIB
        if not self.device.accelerated:
            return _CPU_MIB * _MIB
        loaded = self.stays["student's weights"] + self.stays["teacher's weights"]
        return max(_CPU_MIB, min(_MOST_MIB, (self.device.usable - loaded) // (_SHARE * _MIB))) * _MIB

    def trained_chunk(self) -> float:
        """Tell the working memory of the head in training, which is that of both models' logits where it is fused."""
        own, plain = self.config.estimator, self.chunk()
        several = self.config.teachers or own.merged_stops is not None
        if not self.fast or several or why_plain(estimators.build_from(own)) is not None:
            return plain
        logits = 4 * self.student.vocabulary
        return logits * fused_rows(max(1, int(plain / (_COPIES * logits))), self.student.vocabulary)

    def stepping(self) -> Parts:
        """Move the weights."""
        return self.stays | {"gradients": self.trained * self.student.trainable}

    def evaluating(self) -> Parts:
        """Sample and read held-out prompts, all of a batch at once."""
        own, sizes, (rows, length) = self.config.evaluation, self.student, self.held_out
        work = replace(self.work(rows), length=length, completions=own.num_completions)
        states = work.counted * (sizes.hidden * work.residual + max(
            (self.sizes[k].hidden * BYTES[one.dtype] for k, one in self.frozen.items()), default=0))  # fmt: skip
        read = self.stays | {"scores": states, "a layer at work": passing(sizes, work), "a chunk": self.chunk()}
        logits = {"a step's logits, or prompts": rows * sizes.vocabulary * (self.compute + 3 * 4)}
        found = [read, self.stays | self.decoder("student", rows) | logits]
        for key in [key for key in self.frozen if own.teacher and key != "reference"]:
            mine = {f"{part}, the teacher's": size for part, size in self.decoder(key, rows).items()}
            found.append(self.stays | mine | logits)
        return max(found, key=lambda parts: sum(parts.values()))

    def notes(self) -> list[str]:
        """Say what was assumed."""
        work, longest = self.work(self.micro_rows), self.prompt + self.length
        said = [f"rows of {longest} tokens: data.max_prompt_tokens and rollout.max_new_tokens at their longest"]
        said.append(f"{work.attention}, {'captured' if self.captured else 'plain'} decoding")
        said += [f"the {key} is counted as if it were a Llama: {sizes.unlike}"
                 for key, sizes in self.sizes.items() if sizes.unlike]  # fmt: skip
        if self.config.optim.name.startswith("Paged"):
            said.append("a paged optimizer's state may lie in main memory instead")
        return said
