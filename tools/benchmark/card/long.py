"""G2: long completions. The student's forward pass, loss and backward pass, and the teacher's scores.

Beside them stands what a body of transformers takes with causal attention of torch, forward and backward, plus the
products of the two heads: no implementation can do with less work than that, apart from better kernels. A student with
linear attention in three of four layers has a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lit_opd import estimators
from lit_opd.fast_paths import Verdict
from lit_opd.functional import chunk_rows, token_weights
from lit_opd.models import LanguageModel, prove_attention, prove_parts
from lit_opd.objective import prove_head, student_loss
from lit_opd.teachers import LocalScorer, wanted_by
from lit_opd.types import Rollout, ScoredRollout
from tools.benchmark.card.sizes import (
    Sizes,
    device_of,
    make_hybrid,
    make_model,
    make_rollout,
    make_tokenizer,
    peak_gib,
    product_seconds,
    seconds,
    sizes_of,
)
from tools.benchmark.processes import answer

Make = Callable[..., Any]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Measure every number of rows and tokens, with gradient checkpointing and without."""
    sizes, device = sizes_of(job), device_of(job)
    sides = sizes.long[:1] if job["quick"] else sizes.long
    cases = [("dense", *side, checkpointed) for side in sides for checkpointed in (False, True)]
    cases += [] if job["quick"] else [("hybrid", *sizes.long[-1], True)]
    found = []
    for kind, rows, tokens, checkpointed in cases:
        make = make_hybrid if kind == "hybrid" else make_model
        rollout = make_rollout(sizes, rows, tokens, device)
        row = {"model": kind, "rows": rows, "tokens": tokens, "checkpointed": checkpointed}
        try:
            row |= ours(sizes, device, rollout, checkpointed, job["paths"], make)
            row |= theirs(sizes, device, rows, tokens, checkpointed, make)
        except (ImportError, torch.OutOfMemoryError) as error:
            row["failed"] = str(error).splitlines()[0]
        found.append(row)
    return {"rows": found}


def ours(
    sizes: Sizes, device: torch.device, rollout: Rollout, checkpointed: bool, paths: str, make: Make
) -> dict[str, Any]:
    """Time the teacher's scores and the student's part of a step."""
    tokenizer, estimator = make_tokenizer(sizes.vocabulary), estimators.build("full_vocab", divergence="reverse_kl")
    model = make(sizes.student, sizes.vocabulary, device, torch.float32)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    student = LanguageModel(model, tokenizer, "student")
    teacher = LanguageModel(
        make_model(sizes.teacher, sizes.vocabulary, device, torch.bfloat16, seed=1), tokenizer, "teacher", True
    ).freeze()
    rows, verdicts = chunk_rows(sizes.vocabulary, "auto", device), list[Verdict]()
    scorer, wanted = LocalScorer(teacher, rows), wanted_by(estimator)
    ids = torch.cat([rollout.prompts.ids_BP, rollout.ids_BT], dim=1).tolist()
    with torch.autocast(device.type, torch.bfloat16):
        for reader in (student, teacher):
            verdicts += [prove_attention(reader, ids, paths), prove_parts(reader, len(ids) * len(ids[0]), paths)]

    def score() -> Any:
        with torch.autocast(device.type, torch.bfloat16):
            return scorer.score(rollout, wanted)

    scores = score()
    with torch.autocast(device.type, torch.bfloat16):
        verdicts.append(prove_head(student, ScoredRollout(rollout, {"teacher": scores}), estimator, rows, paths))
    fused = verdicts[-1].taken
    tokens, sequences = rollout.mask_BT.sum(), torch.tensor(float(len(rollout)), device=device)
    weights_BT = token_weights(rollout.mask_BT, "token_mean", tokens, sequences)

    def learn() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            micro = ScoredRollout(rollout, {"teacher": scores})
            student_loss(student, micro, estimator, weights_BT, rows, fused).value.backward()

    learn()
    return {
        "teacher_s": seconds(score, device, tries=3, warm_up=1),
        "student_s": seconds(learn, device, tries=3, warm_up=1),
        "student_gib": peak_gib(learn, device),
        "paths": [str(verdict) for verdict in verdicts],
    }


def theirs(
    sizes: Sizes, device: torch.device, rows: int, tokens: int, checkpointed: bool, make: Make
) -> dict[str, Any]:
    """Time the body of transformers, forward and backward, and the products of both heads."""
    model = make(sizes.student, sizes.vocabulary, device, torch.float32)
    model.config._attn_implementation = "sdpa"
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    ids_BL = torch.randint(4, sizes.vocabulary, (rows, tokens), device=device)

    def learn() -> None:
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            model.model(input_ids=ids_BL, use_cache=False).last_hidden_state.sum().backward()

    learn()
    positions, width, wide = rows * tokens, sizes.student.hidden_size, sizes.teacher.hidden_size
    products = product_seconds(
        device, (positions, width, sizes.vocabulary), (positions, wide, sizes.vocabulary),
        (positions, sizes.vocabulary, width), (sizes.vocabulary, positions, width),
    )  # fmt: skip
    body = seconds(learn, device, tries=3, warm_up=1)
    return {"body_s": body, "products_s": products, "body_gib": peak_gib(learn, device)}


if __name__ == "__main__":
    answer(measure)
