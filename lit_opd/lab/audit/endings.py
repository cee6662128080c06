"""Check that both models end a completion with the same token.

`auditing` lists both checks. `ranking` proposes the remedies here too.
"""

from __future__ import annotations

import torch

from lit_opd.lab.audit.evidence import Evidence
from lit_opd.models import end_of_turn
from lit_opd.runs.first_look import AS_ONE
from lit_opd.runs.first_look import equivalence as let_either_stop
from lit_opd.runs.first_look import stop_tokens as compare_ends
from lit_opd.runs.verdicts import FAIL, PASS, WARN, Finding, conclude, graded

__all__ = ["TOO_EARLY", "equivalence", "stop_tokens", "teacher_at_ends"]

_LITTLE, _NOTHING = 0.1, 1e-3
TOO_EARLY = "The student stops where the teacher goes on, which training unlearns."


def stop_tokens(evidence: Evidence) -> Finding:
    """Check that tokenizers, configs and generation configs of both models name the same stop tokens."""
    student, teacher = evidence.student, evidence.teacher
    turn = end_of_turn(student.tokenizer) if evidence.config.data.chat else None
    merged = evidence.config.estimator.merged_stops is not None
    return compare_ends(student.tokenizer, student.stop_ids, teacher.stop_ids, turn, merged)


def teacher_at_ends(evidence: Evidence) -> Finding:
    """Check that the teacher, where the student ended, gives mass to any of the student's stop tokens."""
    readings, rows = evidence.readings, len(evidence.rollout)
    stops = torch.tensor(evidence.student.stop_ids, dtype=torch.long)
    end_N = torch.isin(readings.ids_N, stops)
    count = int(end_N.sum())
    if not count:
        fix = "Raise rollout.max_new_tokens, or train the student to stop first."
        return conclude(WARN, f"none of {rows} completions ended", fix)
    mass = float(readings.stop_logps_N[end_N].median().exp())
    found = f"at {count} ends of {rows} completions the teacher gives the student's stop tokens a median mass of "
    found, verdict, fix = f"{found}{mass:.2g}", graded(mass, _LITTLE, _NOTHING), TOO_EARLY
    # An end that the models share says nothing of how the teacher ends where it ends otherwise.
    others_M = readings.top_ids_N[end_N & ~torch.isin(readings.top_ids_N, stops)]
    foreign = False
    if verdict != PASS and len(others_M):
        favourite = int(others_M.mode().values)
        name, foreign = evidence.token(favourite), favourite in evidence.teacher.stop_ids
        found += f", and at {int((others_M == favourite).sum()) / count:.0%} of them expects {name}"
        fix = equivalence(evidence, [favourite]) if foreign else (
            f"{TOO_EARLY} Should {name} end the teacher's completions, name it as eos_token_id in the teacher's "
            "generation_config.json.")  # fmt: skip
    if verdict == FAIL and not foreign:  # training unlearns it
        verdict = WARN
    return conclude(verdict, found, fix, ends=count, median_stop_mass=mass)


def equivalence(evidence: Evidence, ids: list[int]) -> str:
    """Say how to let these stop tokens of the teacher end the student's completions too."""
    return let_either_stop(lambda some: ", ".join(map(evidence.token, some)), evidence.student.stop_ids, ids, AS_ONE)
