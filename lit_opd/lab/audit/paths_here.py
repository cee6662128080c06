"""Tell which fast paths a run would take here, as it proves them before its first step.

`auditing` lists it among its checks.
"""

from __future__ import annotations

import torch

from lit_opd.fast_paths import KEY, Verdict
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.models import prove_model, run_by
from lit_opd.rollout import LocalEngine
from lit_opd.runs.verdicts import PASS, WARN, Finding, conclude

__all__ = ["fast_paths"]


def fast_paths(evidence: Evidence) -> Finding:
    """Prove the fast paths on the probe's shapes, and warn of one that fails or computes something else."""
    choice = evidence.config.optim.paths
    if (reason := _why_none(choice, evidence.student.device)) is not None:
        return conclude(PASS, reason)
    verdicts = _verdicts(evidence, choice)
    wrong = [one for one in verdicts if not one.taken and (one.plain_s is None and one.off is not None or one.failed)]
    fix = f"Such a path is left by itself. Set {KEY}=plain to try none, and report the line."
    return conclude(WARN if wrong else PASS, "; ".join(map(str, verdicts)), fix)


def _why_none(choice: str, device: torch.device) -> str | None:
    if choice == "plain":
        return f"{KEY}=plain"
    return "none is tried on a CPU" if choice == "auto" and device.type == "cpu" else None


def _verdicts(evidence: Evidence, choice: str) -> list[Verdict]:
    rollout, config = evidence.rollout, evidence.config
    prompt, length = rollout.prompts.ids_BP.shape[1], config.rollout.max_new_tokens
    engine = LocalEngine(config.rollout.capture)
    verdicts = engine.prove(evidence.student, len(rollout), prompt + length, choice)
    sizes = prompt, length, config.rollout.num_completions, config.optim.micro_batch_tokens
    for model in (evidence.student, evidence.teacher):
        verdicts += prove_model(model, *sizes, choice).values()
        run_by(model, ())  # what else is audited is the plain path
    return [*verdicts, evidence.distiller.prove_head(evidence.distiller.score(rollout)[0], choice)]
