"""Do both models end a completion with the same token?"""

from __future__ import annotations

import torch

from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.findings import FAIL, PASS, WARN, Finding

__all__ = ["TOO_EARLY", "equivalence", "stop_tokens", "teacher_at_ends"]

_LITTLE, _NOTHING = 0.1, 1e-3
TOO_EARLY = "The student stops where the teacher goes on, which training unlearns."


def stop_tokens(evidence: Evidence) -> Finding:
    """Whether tokenizers, configs and generation configs of both models name the same stop tokens."""
    own, other = (set(model.stop_ids) for model in (evidence.student, evidence.teacher))
    names = [", ".join(map(evidence.token, sorted(ids))) or "none" for ids in (own, other)]
    if not own:
        return Finding("stop tokens", FAIL, "the student has none, and never ends",
                       "Name one as eos_token_id in the student's generation_config.json.")  # fmt: skip
    if own == other:
        return Finding("stop tokens", PASS, f"{names[0]} for both")
    found = f"{names[0]} for the student, {names[1]} for the teacher"
    if other <= own:
        return Finding("stop tokens", PASS, f"{found}: the student's include them")
    return Finding("stop tokens", WARN, found, equivalence(evidence, sorted(other - own)))


def teacher_at_ends(evidence: Evidence) -> Finding:
    """Whether the teacher, where the student ended, gives mass to any of the student's stop tokens."""
    positions, student = evidence.positions, evidence.student
    stops = torch.tensor(student.stop_ids, dtype=torch.long)
    end_N = torch.isin(positions.ids_N, stops)
    count, rows = int(end_N.sum()), len(evidence.rollout)
    if not count:
        return Finding("teacher at ends", WARN, f"none of {rows} completions ended",
                       "Raise rollout.max_new_tokens, or train the student to stop first.")  # fmt: skip
    mass = float(positions.stop_logps_N[end_N].median().exp())
    found = (
        f"at {count} ends of {rows} completions the teacher gives the student's stop tokens a median mass of {mass:.2g}"
    )
    numbers = {"ends": count, "median_stop_mass": mass}
    if mass >= _LITTLE:
        return Finding("teacher at ends", PASS, found, numbers=numbers)
    # An end that the models share says nothing of how the teacher ends where it ends otherwise.
    others_M = positions.top_ids_N[end_N & ~torch.isin(positions.top_ids_N, stops)]
    if not len(others_M):
        return Finding("teacher at ends", WARN, found, TOO_EARLY, numbers)
    favourite = int(others_M.mode().values)
    agreed = int((others_M == favourite).sum()) / count
    found += f", and at {agreed:.0%} of them expects {evidence.token(favourite)}"
    if favourite in evidence.teacher.stop_ids:
        verdict = FAIL if mass < _NOTHING else WARN
        return Finding("teacher at ends", verdict, found, equivalence(evidence, [favourite]), numbers)
    fix = (f"{TOO_EARLY} Should {evidence.token(favourite)} end the teacher's completions, name it as eos_token_id in "
           "the teacher's generation_config.json.")  # fmt: skip
    return Finding("teacher at ends", WARN, found, fix, numbers)


def equivalence(evidence: Evidence, ids: list[int]) -> str:
    """How to let the teacher's stop tokens end the student's completions too.

    Args:
        evidence: names the tokens.
        ids: stop tokens of the teacher.
    """
    named = ", ".join(f"{index} ({evidence.token(index)})" for index in ids)
    every = [*evidence.student.stop_ids, *ids]
    return (f"Let either ending stop the student: add {named} to eos_token_id in its generation_config.json, as "
            f"{every}. Do not mask a stop token: nothing would teach it to stop.")  # fmt: skip
