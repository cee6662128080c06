"""Lines of correctness: fp32 on the CPU against the accelerator, captured decoding against plain, and repetition."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_opd import estimators
from lit_opd.config import RolloutConfig
from lit_opd.functional import chunk_rows, token_weights
from lit_opd.models import LanguageModel
from lit_opd.objective import student_loss
from lit_opd.rollout import build_engine, uniforms
from lit_opd.teachers import LocalScorer, wanted_by
from lit_opd.types import Rollout, SamplingLaw, ScoredRollout
from tools.benchmark.card.sizes import (
    TINY,
    device_of,
    make_batch,
    make_model,
    make_rollout,
    make_tokenizer,
    sizes_of,
)
from tools.benchmark.processes import answer

ESTIMATORS = ("full_vocab", "token", "sequence", "teacher_topk")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Compare what has to be equal."""
    device = device_of(job)
    torch.set_float32_matmul_precision("highest")
    return {
        "fp32_off": {name: fp32_distance(name, device) for name in ESTIMATORS},
        "repeated": repeated_bits(device),
        "decoded": decoded_alike(job, device),
    }


def gradients(name: str, device: torch.device, rollout: Rollout) -> list[Tensor]:
    """The student's gradients in fp32, its teacher in fp32 too, on the CPU afterwards."""
    tokenizer, estimator = make_tokenizer(TINY.vocabulary), estimators.build(name)
    student = LanguageModel(
        make_model(TINY.student, TINY.vocabulary, torch.device("cpu"), torch.float32).to(device), tokenizer, "student"
    )
    made = make_model(TINY.teacher, TINY.vocabulary, torch.device("cpu"), torch.float32, seed=1).to(device)
    teacher = LanguageModel(made, tokenizer, "teacher", True).freeze()
    rows = chunk_rows(TINY.vocabulary, 256, device)
    scores = LocalScorer(teacher, rows).score(rollout, wanted_by(estimator))
    tokens, sequences = rollout.mask_BT.sum(), torch.tensor(float(len(rollout)), device=device)
    weights_BT = token_weights(rollout.mask_BT, "token_mean", tokens, sequences)
    student_loss(student, ScoredRollout(rollout, {"teacher": scores}), estimator, weights_BT, rows).value.backward()
    return [parameter.grad.cpu() for parameter in student.model.parameters()]


def fp32_distance(name: str, device: torch.device) -> float:
    """How far the whole gradient on the device is from the one on the CPU, relative."""
    pairs = [gradients(name, place, make_rollout(TINY, 2, 32, place)) for place in (torch.device("cpu"), device)]
    own, other = (torch.cat([g.flatten() for g in found]).double() for found in pairs)
    return float((own - other).norm() / own.norm())


def repeated_bits(device: torch.device) -> bool:
    """Whether the same gradient comes out twice to the bit under deterministic algorithms."""
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (gradients("full_vocab", device, make_rollout(TINY, 2, 32, device)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def decoded_alike(job: dict[str, Any], device: torch.device) -> dict[str, float]:
    """The share of tokens that captured and plain decoding write alike, and the largest gap of log-probabilities.

    In bf16 rounding may move a token, after which a row goes another way: only tokens up to there are compared.
    """
    sizes = sizes_of(job)
    model = make_model(sizes.student, sizes.vocabulary, device, torch.bfloat16)
    policy = LanguageModel(model, make_tokenizer(sizes.vocabulary), "student")
    batch = make_batch(sizes, sizes.prompts, device)
    numbers_BT = uniforms((0, 0), batch.draws, sizes.completions, sizes.new // 2).to(device)
    found = []
    for paths in ("plain", job["paths"]):
        engine, law = build_engine(RolloutConfig()), replace(SamplingLaw(), min_new_tokens=sizes.new)
        engine.prove(policy, len(numbers_BT), sizes.prompt + sizes.new, paths)
        found.append(engine.sample(policy, copy.copy(batch), law, sizes.completions, numbers_BT))
    plain, other = found
    alike_BT = (plain.ids_BT == other.ids_BT).long().cumprod(1).bool()
    gap = (plain.sampler_logps_BT - other.sampler_logps_BT).abs()[alike_BT]
    return {"alike": float(alike_BT.float().mean()), "largest_gap": float(gap.max()) if len(gap) else 0.0}


if __name__ == "__main__":
    answer(measure)
