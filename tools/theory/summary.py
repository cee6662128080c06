"""What came out of `control`: where students end, how their variances compare, and what changes with the settings.

Ours, as the paper does not say: a target counts as reached where the whole 95% interval of the mean distance lies below
`REACHED`, a tenth of the way from start to target.

Shapes: as in `policy`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from statistics import geometric_mean

import torch
from control import FRESH, Comparison, Settings, noise, train_teachers
from policy import TASKS, Parameters, Trajectories, gaussian, outputs, roll_out
from torch import Tensor

REACHED = 0.5
Z95 = 1.96


def measure(main: Settings) -> dict[str, dict]:
    """Compare the gammas, then see what the outcome depends on.

    `learning_rate` and `horizon` repeat the comparison with smaller ones. `large_batch` is gamma = 1 alone, with 16
    times the trajectories, so a sixteenth of the variance, for a quarter of the iterations. `warm_start` goes on from
    the students of the first gamma, for half of the iterations.
    """
    teachers = train_teachers(main)
    found, students = compare(main, teachers)
    few = replace(main, gammas=(0.0, 0.5, 1.0))
    short = replace(few, horizon=main.horizon // 2)
    lower = replace(few, learning_rate=0.3 * main.learning_rate)
    large = replace(main, gammas=(1.0,), batch=16 * main.batch, iterations=main.iterations // 4)
    warm = replace(main, gammas=(0.0, 1.0), iterations=main.iterations // 2)
    first_students = [tensor[: len(main.seeds)] for tensor in students]
    return {
        "main": found,
        "learning_rate": compare(lower, teachers)[0],
        "horizon": compare(short, train_teachers(short))[0],
        "large_batch": compare(large, teachers)[0],
        "warm_start": compare(warm, teachers, first_students)[0],
    }


def compare(settings: Settings, teachers: Parameters, start: Parameters | None = None) -> tuple[dict, Parameters]:
    """Train students, from `start` on; return what came out, and the students."""
    comparison = Comparison(settings, teachers)
    students, probes = comparison.distil(start)
    ends = evaluate(comparison, students)
    names = ("variance", "variance_same_student")
    found = {
        "settings": asdict(settings),
        "teacher_distance": teacher_distance(settings, teachers),
        "reached": reached(ends, settings.gammas),
        "ratios_at_start": variance_ratios(probes[:1], names[0]),
        "ratios_second_half": {name: variance_ratios(probes[len(probes) // 2 :], name) for name in names},
        "ends": ends,
        "probes": probes,
    }
    return found, students


def evaluate(comparison: Comparison, students: Parameters) -> list[dict]:
    """Where fresh trajectories end, with 95% intervals over trajectories; one entry for each task and run."""
    settings, found = comparison.settings, []
    generators = settings.generators(FRESH)
    runs = [(gamma, seed) for gamma in settings.gammas for seed in settings.seeds]
    for task in TASKS:
        trajectories = comparison.sample(students, task, generators, settings.fresh)
        distance_NB = (trajectories.ends_NB - task.target).abs()
        half_N = Z95 * distance_NB.std(1) / math.sqrt(settings.fresh)
        kl_N = gaussian_kl(students, comparison.teachers_of(task), trajectories).mean((1, 2))
        columns = (trajectories.ends_NB.mean(1), distance_NB.mean(1), half_N, kl_N)
        for (gamma, seed), end, mean, half, kl in zip(runs, *(c.tolist() for c in columns), strict=True):
            where = {"end": end, "distance": mean, "low": mean - half, "high": mean + half}
            found.append({"gamma": gamma, "seed": seed, "task": task.name, **where, "reverse_kl_per_step": kl})
    return found


def gaussian_kl(students: Parameters, teachers: Parameters, trajectories: Trajectories) -> Tensor:
    """Reverse KL of the next move at every visited position, [N, B, T], nats."""
    features_NBF = trajectories.features_NBTF.flatten(1, 2)
    (mean, std), (teacher_mean, teacher_std) = (gaussian(outputs(nets, features_NBF)) for nets in (students, teachers))
    kl = (teacher_std / std).log() + (std.square() + (mean - teacher_mean).square()) / (2 * teacher_std.square()) - 0.5
    return kl.view_as(trajectories.moves_NBT)


def teacher_distance(settings: Settings, teachers: Parameters) -> list[float]:
    """Mean distance from the target at the end, of each teacher."""
    tasks = list(TASKS) * len(settings.seeds)
    generators = settings.generators(FRESH, len(TASKS))
    trajectories = roll_out(teachers, tasks, noise(generators, settings.fresh, settings.horizon))
    return (trajectories.ends_NB - torch.tensor([[task.target] for task in tasks])).abs().mean(1).tolist()


def reached(ends: list[dict], gammas: tuple[float, ...]) -> dict[str, str]:
    """For every gamma, how many targets were reached of all, one for each seed and task."""
    of_gamma = {gamma: [end["high"] <= REACHED for end in ends if end["gamma"] == gamma] for gamma in gammas}
    return {f"{gamma:g}": f"{sum(found)} of {len(found)}" for gamma, found in of_gamma.items()}


def variance_ratios(probes: list[dict], name: str) -> list[list[float]]:
    """Variance of each gamma over that of the first, geometric mean over probes, [gammas, seeds]."""
    gammas, seeds = (range(len(side)) for side in (probes[0][name], probes[0][name][0]))
    return [[geometric_mean(probe[name][g][s] / probe[name][0][s] for probe in probes) for s in seeds] for g in gammas]
