"""Sum up a training step: numbers from values that are at hand once it is done.

Why here: a run compares with another only if both measure the same. The module calls `token_sums` and `step_report` at
every step, the callback `StepDiagnostics` the others now and then. Advantages here are teacher minus student
log-probability of the sampled token, in nats, whatever the estimator makes of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_opd.types import FinishReason, Rollout

# A micro-batch, and the per-position values [N] of `models.student_loss` at its counted tokens.
Seen = tuple[Rollout, Mapping[str, Tensor]]

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
QUARTERS = 4
# By quarter of the longest completion, the mass of a support only where the estimator has one.
BY_QUARTER = ("advantage", "student_nll", "teacher_nll", "student_mass")


def token_sums(seen: Sequence[Seen]) -> dict[str, Tensor]:
    """Sum values over the counted tokens that the student wrote, for the means that every step logs.

    Returns:
        `own`: how many; `kl`: of the estimator's KL; `entropy`: of minus the student's log-probability, whose mean
        estimates its entropy; `gap`: sampler minus student log-probability, in nats; `student_mass`: of the student's
        probability of what the estimator compares, where that is a support; `aligned`: how many tokens the teacher
        has too, where it reads others.
    """
    sums: dict[str, Tensor] = {}
    for rollout, stats in seen:
        own_N, student_N = rollout.counted(rollout.own_mask_BT), stats["student_logps"]
        values = {"kl": stats["kl"], "entropy": -student_N, "gap": stats["sampler_logps"] - student_N}
        values |= {name: stats[name] for name in ("student_mass", "aligned") if name in stats}
        if rollout.has_demonstrations:  # else all are the student's, and choosing them would wait for the device
            values = {name: value[own_N] for name, value in values.items()}
        sums = {name: value.sum() + sums.get(name, 0) for name, value in ({"own": own_N} | values).items()}
    return sums


def not_finite(seen: Sequence[Seen]) -> list[str]:
    """Name the models whose log-probabilities of sampled tokens are not all finite, where a step's loss is not."""
    models = ("teacher", "student")
    return [name for name in models if not all(stats[f"{name}_logps"].isfinite().all() for _, stats in seen)]


def step_report(
    update: Mapping[str, float], rollout: Mapping[str, float], seconds: Mapping[str, float], peak_mb: float
) -> dict[str, float]:
    """Name the metrics that every step logs, which but for a support's mass and aligned tokens are those of all runs.

    The update has `loss`, `grad_norm` and what `token_sums` gives, the rollout what `rollout_sums` gives. All phases
    together take the seconds of the step. A mean over nothing, in a step whose completions are all demonstrations, is
    not a number: a key that were left out would keep the value of the step before in Lightning's records.
    """
    tokens, rows, step_s = update["own"] or math.nan, rollout["rows"] or math.nan, sum(seconds.values())
    return {
        "train/loss": update["loss"],
        "train/reverse_kl": update["kl"] / tokens,
        "train/entropy": update["entropy"] / tokens,
        "train/grad_norm": update["grad_norm"],
        **({"train/student_mass": update["student_mass"] / tokens} if "student_mass" in update else {}),
        **({"train/aligned_frac": update["aligned"] / tokens} if "aligned" in update else {}),
        **{f"rollout/{name}": value / rows for name, value in rollout.items() if name != "rows"},
        "rollout/sampler_gap": update["gap"] / tokens,
        "perf/tokens_per_s": rollout["length"] / step_s,
        **{f"perf/{phase}": value for phase, value in seconds.items()},
        "perf/step_s": step_s,
        "perf/peak_memory_mb": peak_mb,
    }


def observed_tokens(seen: Sequence[Seen], horizon: int) -> dict[str, Tensor]:
    """Collect the tokens of an update that the student wrote and that count, one value each.

    Returns:
        [tokens] of `advantage`, `student_nll`, `teacher_nll` (nats), `sampler_log_ratio` (student minus sampler),
        `quarter` (of the horizon, 0 to 3), `stops` (1 where the student ended its completion), and of `clipped`,
        `student_mass` and `teacher_mass` where there are any.
    """
    parts = [_tokens_of(rollout, stats, horizon) for rollout, stats in seen]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _tokens_of(rollout: Rollout, stats: Mapping[str, Tensor], horizon: int) -> dict[str, Tensor]:
    mask_BT = rollout.mask_BT
    own_N = rollout.own_mask_BT[mask_BT]
    row_N, position_N = torch.nonzero(mask_BT).unbind(1)
    last_B = rollout.real_BT.sum(1) - 1
    stopped_B = rollout.finish_B == FinishReason.STOP
    student_N, teacher_N = stats["student_logps"], stats["teacher_logps"]
    values = {
        "advantage": teacher_N - student_N,
        "student_nll": -student_N,
        "teacher_nll": -teacher_N,
        "sampler_log_ratio": student_N - stats["sampler_logps"],
        "quarter": (position_N * QUARTERS // horizon).clamp(max=QUARTERS - 1),
        "stops": stopped_B[row_N] & (position_N == last_B[row_N]),
        **{name: stats[name] for name in ("clipped", "student_mass", "teacher_mass") if name in stats},
    }
    return {name: value[own_N].double() for name, value in values.items()}


def token_numbers(tokens: Mapping[str, Tensor]) -> dict[str, float]:
    """Sum up the tokens that `observed_tokens` collects, over all processes, in a few numbers.

    `advantage/*`: quantiles, mean, standard deviation, skew, and the share of the sum of absolute values that the
    largest 1% of tokens hold. `position/*_q1` to `q4`: means by quarter of the horizon. `rollout/sampler_ess`: the
    effective share of the tokens, (sum w)^2 / (n sum w^2) with w the student's over the sampler's probability (Kong,
    1992). `stop/log_ratio`: student minus teacher at stop tokens that the student wrote. `train/clipped_frac`,
    `train/teacher_mass` and `train/student_mass_min` where the estimator clips, or compares a support.

    Returns:
        By name; what has no token to be read from is left out.
    """
    if not len(tokens["advantage"]):
        return {}
    numbers = _advantages(tokens["advantage"])
    for name in BY_QUARTER:
        if name in tokens:
            numbers |= _by_quarter(f"train_position/{name}", tokens[name], tokens["quarter"])
    weights = tokens["sampler_log_ratio"].exp()
    numbers["rollout/sampler_ess"] = weights.sum() ** 2 / (len(weights) * weights.square().sum())
    numbers["rollout/sampler_gap_max"] = tokens["sampler_log_ratio"].abs().amax()
    stops = tokens["stops"] > 0
    if stops.any():
        numbers["stop/log_ratio"] = -tokens["advantage"][stops].mean()
    if "clipped" in tokens:
        numbers["train/clipped_frac"] = tokens["clipped"].mean()
    if "student_mass" in tokens:
        numbers["train/teacher_mass"] = tokens["teacher_mass"].mean()
        numbers["train/student_mass_min"] = tokens["student_mass"].amin()
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))


def _advantages(values: Tensor) -> dict[str, Tensor]:
    ends = quantiles(values, (0.0, *QUANTILES, 1.0))
    names = ("min", *(f"q{round(100 * q):02d}" for q in QUANTILES), "max")
    centred, sizes = values - values.mean(), values.abs()
    deviation = centred.square().mean().sqrt()
    largest = sizes.topk(max(1, len(values) // 100)).values.sum()
    tiny = torch.finfo(values.dtype).tiny
    shape = {
        "mean": values.mean(),
        "std": deviation,
        "skew": centred.pow(3).mean() / deviation.pow(3).clamp(min=tiny),
        "top1_share": largest / sizes.sum().clamp(min=tiny),
    }
    return {f"advantage/{name}": value for name, value in (shape | dict(zip(names, ends, strict=True))).items()}


def quantiles(values_N: Tensor, shares: Sequence[float]) -> Tensor:
    """Compute quantiles of any number of values, where `torch.quantile`, which interpolates alike, refuses 2^24."""
    ranked_N = values_N.sort().values
    ranks_S = torch.tensor(shares, dtype=torch.float64, device=values_N.device) * (len(values_N) - 1)
    below_S, above_S = ranks_S.floor(), ranks_S.ceil()
    return ranked_N[below_S.long()].lerp(ranked_N[above_S.long()], (ranks_S - below_S).to(values_N.dtype))


def _by_quarter(name: str, values: Tensor, quarter: Tensor) -> dict[str, Tensor]:
    index = quarter.long()
    sums = values.new_zeros(QUARTERS).index_add(0, index, values)
    counts = torch.bincount(index, minlength=QUARTERS)
    means = sums / counts
    return {f"{name}_q{i + 1}": means[i] for i, count in enumerate(counts.tolist()) if count}


def gradient_noise(optimizer: torch.optim.Optimizer) -> tuple[float, float] | None:
    """Estimate signal and noise of the gradient from the running moments that Adam and its kin keep anyway.

    With m and v the debiased moments of gradients g = G + noise of total variance S, E sum v = |G|^2 + S and E |m|^2 =
    |G|^2 + c S, where c = (1 - b1) (1 + b1^t) / ((1 + b1) (1 - b1^t)) after t steps. Solved for both, S / |G|^2 times
    the batch size is the simple noise scale (arXiv:1812.06162), here of the gradients that reached the optimizer, after
    clipping, over as many steps as the moments remember.

    Returns:
        Estimates of |G|^2 and of S, which can come out negative; None before the second step, or where the optimizer
        keeps no such moments.
    """
    signal = noise = 0.0
    found = False
    for group in optimizer.param_groups:
        states = [state for p in group["params"] if "exp_avg_sq" in (state := optimizer.state.get(p, {}))]
        steps = float(states[0]["step"]) if states else 0.0
        if steps < 2 or "betas" not in group:
            continue
        first, second = group["betas"]
        m2 = (_norm([s["exp_avg"] for s in states], 2) / (1 - first**steps)) ** 2
        v = _norm([s["exp_avg_sq"] for s in states], 1) / (1 - second**steps)
        share = (1 - first) * (1 + first**steps) / ((1 + first) * (1 - first**steps))
        signal, noise, found = signal + (m2 - share * v) / (1 - share), noise + (v - m2) / (1 - share), True
    return (signal, noise) if found else None


def _norm(tensors: list[Tensor], order: int) -> float:
    norm: Any = torch.nn.utils.get_total_norm(tensors, order)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
