"""The tokens on which student and teacher disagree most."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_opd.lab.audit.endings import TOO_EARLY, equivalence
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.lab.audit.findings import PASS, WARN, Finding

__all__ = ["TokenRow", "log_ratios", "rank_tokens"]

# A mean log-ratio beyond what a clipped log-ratio may have (arXiv:2603.25562), from more than two occurrences, that is
# a share of the sum worth a word.
_HUGE, _SEEN, _SHARE = 5.0, 3, 0.05
# What became of a student that may learn the teacher's spelling, and of one that is masked; three seeds each.
_MEASURED = ("on the pair of docs/mismatched_pair.md, its ends mended, the mask gave accuracy 0.568 against 0.184 "
             "after 60 steps, and 0.550 against 0.725 after 150.")  # fmt: skip


@dataclass(frozen=True)
class TokenRow:
    """One id over the student's rollouts.

    Attributes:
        id: the id.
        token: as the vocabulary has it.
        count: how often the student wrote it where it counts.
        mean: log-ratio, student minus teacher, nats.
        error: standard error of that mean; not a number for a single occurrence.
        share: of the sum of all ids' absolute summed log-ratios.
        expected_id: what the teacher most often found most probable there.
        expected: that token.
        expected_mass: its mean probability for the teacher, where it was most probable.
        stops: whether it ends a completion of the student.
        huge: mean, count and share are beyond what a habit of its own explains.
    """

    id: int
    token: str
    count: int
    mean: float
    error: float
    share: float
    expected_id: int
    expected: str
    expected_mass: float
    stops: bool
    huge: bool


def rank_tokens(evidence: Evidence) -> list[TokenRow]:
    """Every id that the student wrote where it counts, the largest mean log-ratio first."""
    positions = evidence.positions
    kept_N, ratio_N = positions.counted_N, positions.log_ratio_N.double()
    sums = {int(i): ratio_N[kept_N & (positions.ids_N == i)].sum() for i in positions.ids_N[kept_N].unique()}
    total = float(sum(value.abs() for value in sums.values())) or 1.0
    rows = [_row(evidence, i, ratio_N, kept_N & (positions.ids_N == i), total) for i in sums]
    return sorted(rows, key=lambda row: -row.mean)


def _row(evidence: Evidence, index: int, ratio_N: Tensor, here_N: Tensor, total: float) -> TokenRow:
    positions, values = evidence.positions, ratio_N[here_N]
    expected = int(positions.top_ids_N[here_N].mode().values)
    mass = positions.top_logps_N[here_N & (positions.top_ids_N == expected)].exp().mean()
    mean, error = float(values.mean()), float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
    share = float(values.sum().abs()) / total
    huge = len(values) >= _SEEN and mean - 2 * error > _HUGE and share > _SHARE
    return TokenRow(
        index, evidence.token(index), len(values), mean, error, share, expected, evidence.token(expected), float(mass),
        index in evidence.student.stop_ids, huge,
    )  # fmt: skip


def log_ratios(evidence: Evidence, rows: list[TokenRow] | None = None) -> Finding:
    """Whether a few ids carry a huge share of what the student is taught.

    Such a token is no mistake of the student's but a habit that the models do not share: another spelling of a tag,
    another end (arXiv:2603.25562, special-token masking).

    Args:
        evidence: both models and their rollouts.
        rows: of `rank_tokens`, where they are known.
    """
    rows = rank_tokens(evidence) if rows is None else rows
    # An end that the teacher writes otherwise is mended as soon as its own ends the student's completions too.
    stops = evidence.student.stop_ids
    huge = [
        row for row in rows if row.huge and not (row.stops and row.expected_id in stops and row.expected_id != row.id)
    ]
    masked = _masked(evidence)
    if not huge:
        seen = [row for row in rows if row.count >= _SEEN]
        found = "no id was written often enough to tell"
        if seen:
            found = f"largest mean log-ratio {seen[0].mean:.2f} ± {seen[0].error:.2f} nats, at {seen[0].token}"
        return Finding("log-ratio by id", PASS, found + masked)
    named = "; ".join(f"{row.token} {row.mean:.1f} ± {row.error:.1f} nats, where the teacher expects {row.expected}"
                      for row in huge)  # fmt: skip
    share = sum(row.share for row in huge)
    found = f"{len(huge)} of {len(rows)} ids carry {share:.0%} of the sum: {named}{masked}"
    return Finding("log-ratio by id", WARN, found, _remedy(evidence, huge), {"share": share})


def _remedy(evidence: Evidence, huge: list[TokenRow]) -> str:
    sentences = []
    stops = [row for row in huge if row.stops]
    foreign = set(evidence.teacher.stop_ids) - set(evidence.student.stop_ids)
    ends = sorted({row.expected_id for row in stops} & foreign)
    if ends:
        sentences.append(equivalence(evidence, ends))
    if any(row.expected_id not in foreign for row in stops):
        sentences.append(TOO_EARLY)
    own = [row for row in huge if not row.stops]
    if own:
        keep = [*map(str, evidence.config.estimator.masked_tokens), *(str(row.id) for row in own)]
        names = ", ".join(row.token for row in own)
        sentences.append("As a stop-gap, in a short run or where the student's spelling must stay, set "
                         f"estimator.masked_tokens=[{','.join(keep)}] so that {names} do not count: "
                         f"{_MEASURED}")  # fmt: skip
    return " ".join(sentences)


def _masked(evidence: Evidence) -> str:
    left_out = evidence.positions.ids_N[~evidence.positions.counted_N].unique().tolist()
    return f"; left out already: {', '.join(map(evidence.token, left_out))}" if left_out else ""
