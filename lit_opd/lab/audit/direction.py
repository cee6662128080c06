"""Run the sign test: one optimizer step has to bring the student nearer, by the exact divergence on fixed prefixes.

`auditing` lists it among its checks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_opd import estimators
from lit_opd.estimators import BoundEstimator
from lit_opd.estimators.full import DIVERGENCES
from lit_opd.functional import log_softmax, merge_logps
from lit_opd.functional.head import Stats
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.probe_gradients import cosine, gradient, group_gradients
from lit_opd.lab.audit.readings import compare_positions
from lit_opd.models import LanguageModel
from lit_opd.optim import build_optimizer, build_scheduler
from lit_opd.runs.verdicts import FAIL, PASS, WARN, Finding, conclude

__all__ = ["divergence_on_probe", "sign_test"]

_MET = 1e-5  # nats: student and teacher are the same as far as fp32 can tell
_SHORT = 1 / 16
_CLEAR = 3.0  # standard errors
_STUCK = 0.9  # share of weights
# Keywords that an estimator shares with the divergence that it aims at, with their defaults.
_KEYWORDS = {"jsd": ("teacher_weight", 0.5), "skew_reverse_kl": ("skew", 0.1), "skew_forward_kl": ("skew", 0.1)}

_ROUNDED = (
    "Keep the weights in float32 (student.dtype=float32, trainer.precision=bf16-mixed), set "
    "optim.name=StochasticAdamW, or raise optim.lr."
)
_UPHILL = (
    "The gradient points uphill: look for a wrong sign in the estimator, or in estimator.kwargs. Check it: "
    "python -m lit_opd check NAME."
)
_TOO_LONG = "The step is too long: lower optim.lr, or set optim.warmup_steps."
_TOO_FEW = "The batch may be too small for this estimator: raise data.batch_size or rollout.num_completions."


def sign_test(evidence: Evidence) -> Finding:
    """Check that the run's first optimizer step lowers the divergence that the estimator aims at, on its own batch.

    The step is made on a copy: no weight of the student moves. Where the estimator declares no divergence, what the
    reverse KL does is only told.
    """
    target, name, keywords = _aim(evidence.distiller.estimator)
    before, label = divergence_on_probe(evidence, name, keywords), name.replace("_", " ")
    if before < _MET:
        return conclude(PASS, f"nothing to lower: {label} is {before:.1e} nats a token already")
    student = evidence.student
    copied = LanguageModel(copy.deepcopy(student.model), student.tokenizer, student.key)
    copied.vocabulary = student.vocabulary
    trial = evidence.but(student=copied)
    start = [p.detach().clone() for p in trial.parameters]
    _step(trial)
    after = divergence_on_probe(trial, name, keywords)
    exact = evidence.but(estimator=estimators.build("full_vocab", divergence=name, **keywords))
    numbers = {"before": before, "after": after, "cosine": cosine(gradient(evidence), gradient(exact))}
    found = f"one step takes {label} from {before:.5f} to {after:.5f} nats a token on its batch; cosine with the "
    found += f"exact gradient {numbers['cosine']:.2f}"
    if after < before:
        return conclude(PASS, found, "", **numbers)
    held = _held(trial.parameters, start)
    if held > _STUCK:
        dtype = str(trial.parameters[0].dtype).removeprefix("torch.")
        found += f"; {held:.1%} of the weights are the same after it, for the step is below the rounding of {dtype}"
        return conclude(WARN, found, _ROUNDED, **numbers, held=held)
    if target is None:
        return conclude(PASS, f"{found}; the estimator aims elsewhere", "", **numbers)
    with torch.no_grad():
        for parameter, origin in zip(trial.parameters, start, strict=True):
            parameter.lerp_(origin, 1 - _SHORT)
    numbers |= {"shorter": divergence_on_probe(trial, name, keywords), "along_exact": _along(evidence, exact)}
    found += f", {numbers['along_exact']:+.1f} standard errors from being square to it"
    if target == name and numbers["along_exact"] < -_CLEAR:
        return conclude(FAIL, found, _UPHILL, **numbers)
    too_long = numbers["along_exact"] > _CLEAR or numbers["shorter"] < before
    return conclude(WARN, found, _TOO_LONG if too_long else _TOO_FEW, **numbers)


def divergence_on_probe(evidence: Evidence, name: str, keywords: dict[str, float]) -> float:
    """Compute the exact mean divergence a counted token of the student's rollout, nats, prefixes held fixed.

    The divergence is one of `DIVERGENCES`, with its keywords, towards the teacher at its temperature.
    """
    merged = evidence.distiller.merged

    def compare(logits_cV: Tensor, teacher_cV: Tensor, part: slice) -> Stats:
        student_cV, teacher_cV = (merge_logps(logps, merged) for logps in (log_softmax(logits_cV), teacher_cV))
        return {"divergence": DIVERGENCES[name](student_cV, teacher_cV, **keywords)}

    rows = evidence.distiller.head_rows
    stats = compare_positions(evidence.student, evidence.teacher, evidence.rollout, rows, compare)
    return float(stats["divergence"].double().mean())


def _aim(estimator: BoundEstimator) -> tuple[str | None, str, dict[str, float]]:
    """Find the estimator's target, the local divergence to watch, and its keywords."""
    # What is not registered declares nothing. It is asked about the reverse KL, which it most likely means.
    registered = estimator.spec.name in estimators.names()
    target = estimator.contract.target if registered else "reverse_kl"
    name = target if target is not None and target in DIVERGENCES else "reverse_kl"
    keywords = {}
    if name in _KEYWORDS:
        key, default = _KEYWORDS[name]
        keywords[key] = float(estimator.keywords.get(key, default))
    known = target in DIVERGENCES or target == "sequence_reverse_kl"
    return (target if known else None), name, keywords


def _step(trial: Evidence) -> None:
    """Make the first optimizer step of a run, with its warm-up and clipping."""
    optim = trial.config.optim
    for parameter, value in zip(trial.parameters, gradient(trial), strict=True):
        parameter.grad = value
    torch.nn.utils.clip_grad_norm_(trial.parameters, optim.clip_norm or torch.inf)
    optimizer = build_optimizer(optim, trial.student.model.parameters())
    build_scheduler(optim, optimizer)
    optimizer.step()


def _held(parameters: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """Compute the share of the weights with a gradient that a step left as they were, bit for bit."""
    held, pushed = 0, 0
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            here = parameter.grad != 0
            pushed += int(here.sum())
            held += int((here & (parameter == origin)).sum())
    return held / pushed if pushed else 0.0


def _along(evidence: Evidence, exact: Evidence) -> float:
    """Compute how far the groups' gradients point along the exact one, in standard errors of their average."""
    direction_F = group_gradients(exact).mean(0)
    inner_G = (group_gradients(evidence) @ direction_F).double()
    return float(inner_G.mean() / (inner_G.std() / len(inner_G) ** 0.5).clamp(min=1e-30))
