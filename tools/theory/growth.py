"""How fast does the second moment of a gradient grow with the length T? Exact answers, without sampling.

With r_i the log-ratio of token i, s_i its score and H_i = sum over t <= i of gamma^(i - t) s_t, the estimator with
discounted returns (arXiv:2603.25562) is g = sum over i of r_i H_i. Where |r_i| <= B_r and ||s_i|| <= B_s, the triangle
inequality bounds ||g||^2 by B_r^2 B_s^2 T^2 at gamma = 0 and by B_r^2 B_s^2 (T (T + 1) / 2)^2 at gamma = 1: the orders
T^2 and T^4 of the paper.

**The worst case.** A mirrored pair on two tokens: the student's logits are (b, 0), the teacher's (0, b), at every
position and with the same parameters. Then |r| = b at both tokens. On the completion which repeats token 1, all scores
are one vector and all log-ratios one number, so that both bounds hold with equality: no constants are better.

**What an expectation can reach.** That completion is rare. Given all earlier tokens, a score has mean zero under the
student that drew the token, so scores of different positions are uncorrelated, whatever the student: E||H_i||^2 is at
most B_s^2 times the sum of gamma^2j over j < i, and by Minkowski's inequality E||g||^2 is at most B_r^2 B_s^2 times the
square of the sum over i of the root of that. At gamma = 1 this is of order T^3, not T^4: a student that draws its own
tokens cannot keep up a slope of 4. The mirrored pair has the slopes 2 and 3, so these orders are the best possible.
Where the tokens come from elsewhere, scores have a mean, and the slopes are 2 and 4 in expectation: the same pair, with
tokens of the teacher, shows it. (The paper's uncausal form, all log-ratios times all scores, obeys T^3 for the same
reason: the first factor is at most T B_r, the second has a second moment of at most T B_s^2.)

**Cases.** `worst_completion` and `teacher_samples` use the mirrored pair off-policy, `student_samples` on-policy.
`random` stands for the typical case: random logits, other ones (and other parameters) at each position. `near` is the
same, with a teacher close to the student: log-ratios have nearly mean zero, as late in training.

Tokens of all cases are independent, so that E||g||^2 follows from moments of single tokens by a recursion over T, in
float64. Shapes: V tokens, G parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GAMMAS = (0.0, 0.25, 0.5, 0.75, 1.0)
LENGTHS = tuple(2**n for n in range(9))
FITTED = tuple(length for length in LENGTHS if length >= 16)
MIRROR = 2.0
VOCABULARY = 8
NEAR = 0.1
SEEDS = (42, 43, 2026)


@dataclass(frozen=True)
class TokenLaw:
    """One position: what is drawn, and what a token contributes to the gradient.

    Attributes:
        probs_V: probability of each token under the sampler.
        log_ratio_V: student minus teacher, nats.
        scores_VG: gradient of the student's log-probability of each token.
    """

    probs_V: Tensor
    log_ratio_V: Tensor
    scores_VG: Tensor


@dataclass(frozen=True)
class Case:
    """Positions in order, whether they share their parameters, and the bounds B_r (nats) and B_s."""

    laws: tuple[TokenLaw, ...]
    shared: bool
    largest_log_ratio: float
    largest_score: float


def token_law(student_logits_V: Tensor, teacher_logits_V: Tensor, probs_V: Tensor | None = None) -> TokenLaw:
    """A softmax student whose logits are its parameters; tokens are its own unless `probs_V` says otherwise."""
    student_logps_V = student_logits_V.double().log_softmax(-1)
    log_ratio_V = student_logps_V - teacher_logits_V.double().log_softmax(-1)
    student_probs_V = student_logps_V.exp()
    scores_VG = torch.eye(len(student_probs_V), dtype=torch.float64) - student_probs_V
    return TokenLaw(student_probs_V if probs_V is None else probs_V.double(), log_ratio_V, scores_VG)


def second_moments(laws: Sequence[TokenLaw], gamma: float, shared: bool) -> list[float]:
    """E||g||^2 for completions of the first T positions, for every T from 1 on.

    Adding a token turns H into H' = gamma H + s and g into g' = g + r H'. Expanding the squares leaves products of
    moments of the new token, which is independent of what came before, and of five moments carried along. A name
    below is what stands under the expectation: gH is E<g, H>, rrs is E[r^2 s].

    Args:
        laws: one for each position.
        gamma: discount of the returns.
        shared: whether all positions have the same parameters; otherwise scores of different positions are orthogonal.

    Returns:
        One number for each T.
    """
    mean_H = mean_g = torch.zeros(laws[0].scores_VG.shape[1], dtype=torch.float64)
    HH = gH = gg = torch.zeros((), dtype=torch.float64)
    moments = []
    for law in laws:
        r, rr = law.log_ratio_V @ law.probs_V, law.log_ratio_V.square() @ law.probs_V
        s, rs, rrs = (law.probs_V * law.log_ratio_V**power @ law.scores_VG for power in (0, 1, 2))
        ss, rss, rrss = (law.probs_V * law.log_ratio_V**power @ law.scores_VG.square().sum(1) for power in (0, 1, 2))
        if not shared:  # what would be multiplied below lies in different coordinates
            mean_H, mean_g = torch.zeros_like(mean_H), torch.zeros_like(mean_g)
        gg = gg + gamma**2 * rr * HH + rrss + 2 * gamma * r * gH + 2 * mean_g @ rs + 2 * gamma * mean_H @ rrs
        gH = gamma * gH + gamma**2 * r * HH + rss + mean_g @ s + 2 * gamma * mean_H @ rs
        HH = gamma**2 * HH + ss + 2 * gamma * mean_H @ s
        mean_g = mean_g + gamma * r * mean_H + rs
        mean_H = gamma * mean_H + s
        moments.append(float(gg))
    return moments


def completion_bound(length: int, gamma: float) -> float:
    """The largest ||g||^2 of one completion, in units of B_r^2 B_s^2."""
    return sum(sum(gamma**j for j in range(i)) for i in range(1, length + 1)) ** 2


def on_policy_bound(length: int, gamma: float) -> float:
    """The largest E||g||^2 where the student draws the tokens, in units of B_r^2 B_s^2."""
    return sum(math.sqrt(sum(gamma ** (2 * j) for j in range(i))) for i in range(1, length + 1)) ** 2


def mirrored(probs_V: Tensor | None = None, length: int = LENGTHS[-1]) -> Case:
    """The mirrored pair, with the student's tokens or others."""
    logits_V = torch.tensor([MIRROR, 0.0])
    return _case((token_law(logits_V, logits_V.flip(0), probs_V),) * length, shared=True)


def random_tables(seed: int, distance: float | None = None, length: int = LENGTHS[-1]) -> Case:
    """Standard normal logits at every position; the teacher's are independent, or differ by `distance` times normal."""
    generator = torch.Generator().manual_seed(seed)
    student_TV, other_TV = torch.randn(2, length, VOCABULARY, generator=generator, dtype=torch.float64)
    teacher_TV = other_TV if distance is None else student_TV + distance * other_TV
    return _case(tuple(map(token_law, student_TV, teacher_TV)), shared=False)


def _case(laws: tuple[TokenLaw, ...], shared: bool) -> Case:
    largest_log_ratio = max(float(law.log_ratio_V.abs().max()) for law in laws)
    return Case(laws, shared, largest_log_ratio, max(float(law.scores_VG.norm(dim=1).max()) for law in laws))


def cases() -> dict[str, tuple[Case, ...]]:
    """All cases by name; the random ones once for each of `SEEDS`."""
    return {
        "worst_completion": (mirrored(torch.tensor([0.0, 1.0])),),
        "teacher_samples": (mirrored(torch.tensor([0.0, MIRROR]).softmax(-1)),),
        "student_samples": (mirrored(),),
        "random": tuple(random_tables(seed) for seed in SEEDS),
        "near": tuple(random_tables(seed, NEAR) for seed in SEEDS),
    }


def slope(lengths: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (lengths, values))
    return float((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum())


def measure() -> dict:
    """Second moments over `LENGTHS`, in units of B_r^2 B_s^2, and their slopes over `FITTED`, of all cases."""
    found: dict = {"lengths": LENGTHS, "fitted": (FITTED[0], FITTED[-1]), "cases": {}}
    for name, variants in cases().items():
        rows = []
        for gamma in GAMMAS:
            curves = [_relative_moments(case, gamma) for case in variants]
            slopes = [slope(FITTED, [curve[LENGTHS.index(length)] for length in FITTED]) for curve in curves]
            rows.append({"gamma": gamma, "slopes": slopes, "moments": curves})
        bounds = [{"B_r": case.largest_log_ratio, "B_s": case.largest_score} for case in variants]
        found["cases"][name] = {"bounds": bounds, "rows": rows}
    return found


def _relative_moments(case: Case, gamma: float) -> list[float]:
    unit = (case.largest_log_ratio * case.largest_score) ** 2
    moments = second_moments(case.laws, gamma, case.shared)
    return [moments[length - 1] / unit for length in LENGTHS]
