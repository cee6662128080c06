"""Rank the tokens on which student and teacher disagree most, and warn of those that are a habit.

`auditing` lists `log_ratios` among its checks, and prints what `rank_tokens` returns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lit_opd.lab.audit.endings import TOO_EARLY, equivalence
from lit_opd.lab.audit.evidence import Evidence
from lit_opd.runs.verdicts import PASS, WARN, Finding, conclude

__all__ = ["TokenRow", "log_ratios", "rank_tokens"]

# A mean log-ratio beyond what a clipped log-ratio may have (arXiv:2603.25562), from more than two occurrences, that is
# a share of the sum worth a word.
_HUGE, _SEEN, _SHARE = 5.0, 3, 0.05
# What became of a student that may learn the teacher's spelling, and of one that is masked; three seeds each.
_MEASURED = ("on the pair of docs/mismatched_pair.md, its ends mended, the mask gave accuracy 0.568 against 0.184 "
             "after 60 steps, and 0.550 against 0.725 after 150.")  # fmt: skip


@dataclass(frozen=True)
class TokenRow:
    """One id over the student's rollouts."""

    id: int
    token: str  # its text in the vocabulary
    count: int  # how often the student wrote it where it counts
    mean: float  # log-ratio, student minus teacher, nats
    error: float  # standard error of that mean; not a number for a single occurrence
    share: float  # of the sum of all ids' absolute summed log-ratios
    expected_id: int  # what the teacher most often found most probable there
    expected: str  # that token
    expected_mass: float  # its mean probability for the teacher, where it was most probable
    stops: bool  # True where it ends a completion of the student
    huge: bool  # True where mean, count and share are beyond what a habit of its own explains


def rank_tokens(evidence: Evidence) -> list[TokenRow]:
    """Rank every id that the student wrote where it counts, the largest mean log-ratio first."""
    readings = evidence.readings
    kept_N, ratio_N = readings.counted_N, readings.log_ratio_N.double()
    places = {int(i): kept_N & (readings.ids_N == i) for i in readings.ids_N[kept_N].unique()}
    total = float(sum(ratio_N[here_N].sum().abs() for here_N in places.values())) or 1.0
    rows = [_row(evidence, i, ratio_N[here_N], here_N, total) for i, here_N in places.items()]
    return sorted(rows, key=lambda row: -row.mean)


def _row(evidence: Evidence, index: int, values: Tensor, here_N: Tensor, total: float) -> TokenRow:
    readings, count = evidence.readings, len(values)
    expected = int(readings.top_ids_N[here_N].mode().values)
    mass = readings.top_logps_N[here_N & (readings.top_ids_N == expected)].exp().mean()
    mean, error = float(values.mean()), float(values.std() / count**0.5) if count > 1 else float("nan")
    share = float(values.sum().abs()) / total
    huge = count >= _SEEN and mean - 2 * error > _HUGE and share > _SHARE
    return TokenRow(
        index, evidence.token(index), count, mean, error, share, expected, evidence.token(expected), float(mass),
        index in evidence.student.stop_ids, huge,
    )  # fmt: skip


def log_ratios(evidence: Evidence) -> Finding:
    """Check that no few ids carry a huge share of what the student is taught.

    Such a token is no mistake of the student's but a habit that the models do not share: another spelling of a tag,
    another end (arXiv:2603.25562, special-token masking).
    """
    rows, stops = rank_tokens(evidence), evidence.student.stop_ids
    # An end that the teacher writes otherwise is mended once the teacher's own ends the student's completions too.
    huge = [r for r in rows if r.huge and not (r.stops and r.expected_id in stops and r.expected_id != r.id)]
    left_out = evidence.readings.ids_N[~evidence.readings.counted_N].unique().tolist()
    masked = f"; left out already: {', '.join(map(evidence.token, left_out))}" if left_out else ""
    if huge:
        named = "; ".join(
            f"{row.token} {row.mean:.1f} ± {row.error:.1f} nats, where the teacher expects {row.expected}"
            for row in huge
        )
        share = sum(row.share for row in huge)
        found = f"{len(huge)} of {len(rows)} ids carry {share:.0%} of the sum: {named}{masked}"
        return conclude(WARN, found, _remedy(evidence, huge), share=share)
    first = next((row for row in rows if row.count >= _SEEN), None)
    if first is None:
        return conclude(PASS, f"no id was written often enough to tell{masked}")
    return conclude(PASS, f"largest mean log-ratio {first.mean:.2f} ± {first.error:.2f} nats, at {first.token}{masked}")


def _remedy(evidence: Evidence, huge: list[TokenRow]) -> str:
    sentences = []
    foreign = set(evidence.teacher.stop_ids) - set(evidence.student.stop_ids)
    expected = {row.expected_id for row in huge if row.stops}
    if expected & foreign:
        sentences.append(equivalence(evidence, sorted(expected & foreign)))
    if expected - foreign:
        sentences.append(TOO_EARLY)
    own = [row for row in huge if not row.stops]
    if own:
        keep = [*map(str, evidence.config.estimator.masked_tokens), *(str(row.id) for row in own)]
        names = ", ".join(row.token for row in own)
        sentences.append("As a stop-gap, in a short run or where the student's spelling must stay, set "
                         f"estimator.masked_tokens=[{','.join(keep)}] so that {names} do not count: "
                         f"{_MEASURED}")  # fmt: skip
    return " ".join(sentences)
