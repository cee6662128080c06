"""The sign test: does one optimizer step bring the student nearer, by the exact divergence on the same prefixes?"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_opd import estimators
from lit_opd.estimators.full import DIVERGENCES
from lit_opd.functional import log_softmax
from lit_opd.functional.head import Stats
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.findings import FAIL, PASS, WARN, Finding
from lit_opd.lab.audit.gradients import cosine, gradient, group_gradients
from lit_opd.lab.audit.positions import compare_positions
from lit_opd.models import LanguageModel
from lit_opd.optim import build_optimizer, build_scheduler

__all__ = ["divergence_on_probe", "sign_test"]

_MET = 1e-5  # nats: student and teacher are the same as far as fp32 can tell
_SHORT = 1 / 16
_CLEAR = 3.0  # standard errors
_STUCK = 0.9  # share of weights


def sign_test(evidence: Evidence) -> Finding:
    """Whether the run's first optimizer step lowers the divergence that the estimator aims at, on its own batch.

    The step is made on a copy: no weight of the student moves. Where the estimator declares no divergence, what the
    reverse KL does is only told.
    """
    target, name, keywords = _aim(evidence)
    before = divergence_on_probe(evidence, name, keywords)
    label = name.replace("_", " ")
    if before < _MET:
        return Finding("sign test", PASS, f"nothing to lower: {label} is {before:.1e} nats a token already")
    trial = evidence.with_student(_copy(evidence.student))
    start = [p.detach().clone() for p in trial.parameters]
    _step(trial)
    after = divergence_on_probe(trial, name, keywords)
    exact = evidence.with_estimator(estimators.build("full_vocab", divergence=name, **keywords))
    alike = cosine(gradient(evidence), gradient(exact))
    found = f"one step takes {label} from {before:.5f} to {after:.5f} nats a token on its batch; cosine with the exact "
    found += f"gradient {alike:.2f}"
    numbers = {"before": before, "after": after, "cosine": alike}
    if after < before:
        return Finding("sign test", PASS, found, numbers=numbers)
    held = _held(trial.parameters, start)
    if held > _STUCK:
        dtype = str(trial.parameters[0].dtype).removeprefix("torch.")
        found += f"; {held:.1%} of the weights are the same after it, for the step is below the rounding of {dtype}"
        fix = "Keep the weights in float32 (student.dtype=float32, trainer.precision=bf16-mixed), or raise optim.lr."
        return Finding("sign test", WARN, found, fix, numbers | {"held": held})
    if target is None:
        return Finding("sign test", PASS, f"{found}; the estimator aims elsewhere", numbers=numbers)
    with torch.no_grad():
        for parameter, origin in zip(trial.parameters, start, strict=True):
            parameter.lerp_(origin, 1 - _SHORT)
    shorter = divergence_on_probe(trial, name, keywords)
    return _risen(evidence, exact, target == name, found, numbers | {"shorter": shorter})


def _risen(evidence: Evidence, exact: Evidence, is_local: bool, found: str, numbers: dict[str, float]) -> Finding:
    """What to say of a step after which the divergence is no lower."""
    along = _along(evidence, exact)
    numbers |= {"along_exact": along}
    found += f", {along:+.1f} standard errors from being square to it"
    if is_local and along < -_CLEAR:
        fix = ("The gradient points uphill: look for a wrong sign in the estimator, or in estimator.kwargs. Check it: "
               "python -m lit_opd check NAME.")  # fmt: skip
        return Finding("sign test", FAIL, found, fix, numbers)
    if along > _CLEAR or numbers["shorter"] < numbers["before"]:
        fix = "The step is too long: lower optim.lr, or set optim.warmup_steps."
        return Finding("sign test", WARN, found, fix, numbers)
    fix = "The batch may be too small for this estimator: raise data.batch_size or rollout.num_completions."
    return Finding("sign test", WARN, found, fix, numbers)


def divergence_on_probe(evidence: Evidence, name: str, keywords: dict[str, float]) -> float:
    """The exact mean divergence a counted token of the student's rollout, nats, prefixes held fixed.

    Args:
        evidence: both models, the teacher at its temperature, and the rollout.
        name: one of those of `functional.divergences`.
        keywords: its own.
    """

    def compare(logits_cV: Tensor, teacher_cV: Tensor, part: slice) -> Stats:
        return {"divergence": DIVERGENCES[name](log_softmax(logits_cV), teacher_cV, **keywords)}

    stats = compare_positions(evidence.student, evidence.teacher, evidence.rollout, evidence.rows, compare)
    return float(stats["divergence"].double().mean())


def _aim(evidence: Evidence) -> tuple[str | None, str, dict[str, float]]:
    """The estimator's target, the local divergence to watch, and its keywords."""
    estimator = evidence.estimator
    registered = estimator.spec.name in estimators.names()
    # What is not registered declares nothing; it is asked about the reverse KL, which it most likely means.
    target = estimator.contract.target if registered else "reverse_kl"
    name = target if target is not None and target in DIVERGENCES else "reverse_kl"
    wanted = {"jsd": ("teacher_weight", 0.5), "skew_reverse_kl": ("skew", 0.1), "skew_forward_kl": ("skew", 0.1)}
    keywords = {}
    if name in wanted:
        key, default = wanted[name]
        keywords[key] = float(estimator.keywords.get(key, default))
    known = target in DIVERGENCES or target == "sequence_reverse_kl"
    return (target if known else None), name, keywords


def _copy(student: LanguageModel) -> LanguageModel:
    other = LanguageModel(copy.deepcopy(student.model), student.tokenizer, student.key)
    other.vocabulary = student.vocabulary
    return other


def _step(trial: Evidence) -> None:
    """The first optimizer step of a run, warm-up and clipping as configured."""
    optim = trial.config.optim
    for parameter, value in zip(trial.parameters, gradient(trial), strict=True):
        parameter.grad = value
    torch.nn.utils.clip_grad_norm_(trial.parameters, optim.clip_norm or torch.inf)
    optimizer = build_optimizer(optim, trial.student.model.parameters())
    build_scheduler(optim, optimizer)
    optimizer.step()


def _held(parameters: Sequence[Tensor], start: Sequence[Tensor]) -> float:
    """The share of the weights with a gradient that a step left as they were, bit for bit."""
    held, pushed = 0, 0
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            here = parameter.grad != 0
            pushed += int(here.sum())
            held += int((here & (parameter == origin)).sum())
    return held / pushed if pushed else 0.0


def _along(evidence: Evidence, exact: Evidence) -> float:
    """How far the groups' gradients point along the exact one on average, in standard errors of that average."""
    direction_F = group_gradients(exact).mean(0)
    inner_G = (group_gradients(evidence) @ direction_F).double()
    return float(inner_G.mean() / (inner_G.std() / len(inner_G) ** 0.5).clamp(min=1e-30))
