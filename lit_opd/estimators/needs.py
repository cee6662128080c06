"""Read and write what an estimator needs, and fill a `TokenBatch` with it.

Computing a field costs time and memory, so that an estimator declares what it reads and is given no more. Training
fills the batches of its chunks and sequences by the table `FILLERS`, the oracle and the linter's probes those of their
small models. A new need is a member of `lit_opd.types.Need` beside its field of `TokenBatch`, and a row of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_opd.errors import choose
from lit_opd.functional.divergences import entropy, reverse_kl
from lit_opd.functional.support import choose_support
from lit_opd.types import Need, TokenBatch

__all__ = ["FILLERS", "Filler", "Seen", "check_fits", "fill", "fillings", "needs_of", "read_needs", "write_needs"]


@dataclass(frozen=True)
class Seen:
    """The sources that needs are filled from, None where the caller has nothing, which then stays None in the batch.

    Attributes:
        student_logps_V: the student's log-probabilities [..., V], nats, with grad where it learns.
        teacher_logps_V: the teacher's.
        scored_support: ids and log-probabilities [..., K or more] of the teacher's most probable tokens, largest first,
            where it was asked for no more than these.
        k: how many tokens of each model a support holds.
        support: whose most probable tokens it holds, one of `functional.support.SUPPORTS`.
        reference_logps: log-probabilities of the sampled tokens under the reference model, [...].
        rewards_B: outcome reward of each sequence.
        groups_B: a number for each sequence, the same for completions of one prompt.
    """

    student_logps_V: Tensor | None = None
    teacher_logps_V: Tensor | None = None
    scored_support: tuple[Tensor, Tensor] | None = None
    k: int = 0
    support: str = "teacher"
    reference_logps: Tensor | None = None
    rewards_B: Tensor | None = None
    groups_B: Tensor | None = None

    def both_logps(self) -> tuple[Tensor, Tensor]:
        """Student and teacher log-probabilities of the whole vocabulary."""
        assert self.student_logps_V is not None
        assert self.teacher_logps_V is not None
        return self.student_logps_V, self.teacher_logps_V


class Filler(NamedTuple):
    """The way a need is filled.

    Attributes:
        per: what has a value each: several tokens of a position (only slices of positions can hold so much), a
            `position`, or a `row`, that is a whole sequence.
        values: gives the fields of the `TokenBatch`.
        fields: their names.
        whole: True where the teacher's whole distribution is needed for it.
    """

    per: Literal["token", "position", "row"]
    values: Callable[[Seen], Mapping[str, Tensor | None]]
    fields: tuple[str, ...] = ()
    whole: bool = False


def _support(seen: Seen) -> Mapping[str, Tensor]:
    assert seen.student_logps_V is not None
    student_logps_V = seen.student_logps_V
    check_fits(seen.k, student_logps_V.shape[-1])
    if seen.scored_support is None:
        student, teacher = seen.both_logps()
        ids, mask = choose_support(student.detach(), teacher, seen.k, seen.support)
        teacher_logps = teacher.gather(-1, ids)
    else:  # the teacher's K most probable are the first K of more
        ids, teacher_logps = (values[..., : seen.k] for values in seen.scored_support)
        mask = torch.ones_like(ids, dtype=torch.bool)
    return {
        "support_ids_BTK": ids, "support_mask_BTK": mask, "teacher_support_logps_BTK": teacher_logps,
        "student_support_logps_BTK": student_logps_V.gather(-1, ids),
    }  # fmt: skip


def _full(seen: Seen) -> Mapping[str, Tensor]:
    student, teacher = seen.both_logps()
    return {"student_full_logps_BTV": student, "teacher_full_logps_BTV": teacher}


def _entropy(seen: Seen) -> Mapping[str, Tensor]:
    student, teacher = seen.both_logps()
    return {"student_entropy_BT": entropy(student.detach()), "teacher_entropy_BT": entropy(teacher)}


def _kl(seen: Seen) -> Mapping[str, Tensor]:
    student, teacher = seen.both_logps()
    return {"kl_BT": reverse_kl(student.detach(), teacher)}


FILLERS: dict[Need, Filler] = {
    Need.TOKEN: Filler("position", lambda seen: {}),  # every batch holds the sampled tokens
    Need.SUPPORT: Filler(
        "token",
        _support,
        ("support_ids_BTK", "support_mask_BTK", "teacher_support_logps_BTK", "student_support_logps_BTK"),
    ),
    Need.FULL: Filler("token", _full, ("student_full_logps_BTV", "teacher_full_logps_BTV"), whole=True),
    Need.ENTROPY: Filler("position", _entropy, ("student_entropy_BT", "teacher_entropy_BT"), whole=True),
    Need.KL: Filler("position", _kl, ("kl_BT",), whole=True),
    Need.REWARDS: Filler("row", lambda seen: {"rewards_B": seen.rewards_B}, ("rewards_B",)),
    Need.GROUPS: Filler("row", lambda seen: {"groups_B": seen.groups_B}, ("groups_B",)),
    Need.REFERENCE: Filler(
        "position", lambda seen: {"reference_logps_BT": seen.reference_logps}, ("reference_logps_BT",)
    ),
}
"""By need: in the order in which needs are written."""

_FIRST = (Need.TOKEN, Need.SUPPORT, Need.FULL)


def fill(tokens: TokenBatch, needs: Iterable[Need], seen: Seen) -> TokenBatch:
    """Fill the fields that are asked for into a batch that holds what concerns the sampled tokens.

    Raises:
        ValueError: the support is larger than the vocabulary.
    """
    return replace(tokens, **fillings(needs, seen))  # type: ignore[arg-type]


def fillings(needs: Iterable[Need], seen: Seen) -> dict[str, Tensor]:
    """Compute the fields of a `TokenBatch` and the values that `fill` sets, from the same arguments."""
    found = {name: value for need in needs for name, value in FILLERS[need].values(seen).items()}
    return {name: value for name, value in found.items() if value is not None}


def check_fits(k: int, vocabulary: int) -> None:
    """Refuse a support that is larger than the vocabulary, with a ValueError."""
    if k > vocabulary:
        raise ValueError(f"a support of {k} tokens does not fit into a vocabulary of {vocabulary}")


def needs_of(needs: Iterable[Need], *per: str) -> frozenset[Need]:
    """Select the needs that have a value per `token`, `position` or `row`, as in `Filler`."""
    return frozenset(need for need in needs if FILLERS[need].per in per)


def read_needs(key: str, words: str | Iterable[Need]) -> frozenset[Need]:
    """Read needs as they are declared: `token`, `support` or `full`, with any others after it, such as `token+kl`.

    Raises:
        UserError: an unknown word.
    """
    known = {str(need): need for need in FILLERS}
    first, *others = words.split("+") if isinstance(words, str) else write_needs(frozenset(words)).split("+")
    choose(key, first, _FIRST)
    for other in others:
        choose(key, other, [need for need in known if need not in _FIRST])
    return frozenset(known[word] for word in (first, *others))


def write_needs(needs: frozenset[Need]) -> str:
    """Write needs as they are declared, such as `token+kl`, or `terms` for a sum that has none of its own."""
    return "+".join(need for need in FILLERS if need in needs) or "terms"
