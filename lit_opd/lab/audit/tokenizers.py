"""Check that both models mean the same by an id, and would write a text with the same ids.

`auditing` calls the first check before weights load, and lists the second among the others.
"""

from __future__ import annotations

from collections.abc import Callable
from os.path import commonprefix  # of any sequences
from typing import Any

from lit_opd.errors import UserError
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.models import shared_vocabulary
from lit_opd.runs.first_look import spell
from lit_opd.runs.verdicts import FAIL, PASS, Finding, conclude, graded

__all__ = ["segmentation", "vocabulary"]

_FEW = 0.01


def vocabulary(
    student: Any, teacher: Any, student_rows: int, teacher_rows: int, extra_tokens: str = "refuse"
) -> Finding:
    """Check that every id is the same token for both tokenizers, with so many rows in the models' output layers."""
    try:
        shared = shared_vocabulary(student, teacher, student_rows, teacher_rows, extra_tokens=extra_tokens)
    except UserError as error:
        own, other = (set(tokenizer.get_vocab().items()) for tokenizer in (student, teacher))
        differing = len({index for _, index in own ^ other})
        found = f"{error.found}; {differing} of {len(own)} ids differ"
        found = found if differing else f"{error.key} has {error.found}"
        return conclude(FAIL, found, error.remedy, differing_ids=differing)
    padding = abs(student_rows - teacher_rows)
    found = f"{len(student.get_vocab())} ids are the same tokens for both"
    if padding:
        found += f"; one output layer has {padding} rows of padding more, which are cut off"
    return conclude(PASS, found, shared_ids=shared)


def segmentation(evidence: Evidence) -> Finding:
    """Check that both tokenizers spell the texts of the student's completions alike."""
    student, teacher, rollout = evidence.student.tokenizer, evidence.teacher.tokenizer, evidence.rollout
    rows = zip(rollout.ids_BT, rollout.real_BT, strict=True)
    texts = [student.decode(ids[mask].tolist()) for ids, mask in rows]
    pairs = [(spell(student, text), spell(teacher, text)) for text in texts]
    unlike = [pair for pair in pairs if pair[0] != pair[1]]
    share = len(unlike) / len(pairs)
    found = f"the tokenizers spell {len(unlike)} of {len(pairs)} completions differently"
    if unlike:
        found += f": {_difference(*unlike[0], evidence.token)}"
    fix = ("Look at the ids ranked below, and mend ends that differ first. To leave out of the count what the teacher "
           "spells otherwise is a stop-gap.")  # fmt: skip
    return conclude(graded(share, _FEW), found, fix, share=share)


def _difference(own: list[int], other: list[int], token: Callable[[int], str]) -> str:
    at = len(commonprefix([own, other]))
    pieces = [" ".join(map(token, ids[at : at + 2])) or "nothing" for ids in (own, other)]
    return f"{pieces[0]} by the student's, {pieces[1]} by the teacher's"
