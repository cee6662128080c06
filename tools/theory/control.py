"""Bias against variance of gamma, on the two mirrored control tasks of arXiv:2603.25562.

A point goes from +2 to -3 (left) or from -2 to +3 (right). A teacher for each task is trained by REINFORCE. One student
is distilled from both, one task an iteration, in turn, by the score function with discounted returns of log-ratios.
Runs differ in gamma and in the seed; those of one seed have the same teachers, initial student and random numbers.

The paper leaves open, and these are ours: the horizon; the width, activation and std of `policy`; Adam and its learning
rates; a teacher's reward (minus the squared distance from the target at the end, less its mean over the batch) and its
iterations; and how often the variance is probed.

Shapes: as in `policy`, and M micro-batches; the N runs are ordered by gamma first and by seed second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from policy import (
    OUTPUTS,
    TASKS,
    Parameters,
    Task,
    Trajectories,
    initial,
    last_hidden,
    log_density,
    move_logps,
    roll_out,
)
from torch import Tensor

from lit_opd.functional import return_to_go

MICRO_BATCHES = 8


@dataclass(frozen=True)
class Settings:
    """One comparison of gammas."""

    gammas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    seeds: tuple[int, ...] = (42, 43, 2026)
    horizon: int = 20
    batch: int = 64
    learning_rate: float = 1e-3
    iterations: int = 2000
    teacher_learning_rate: float = 1e-3
    teacher_iterations: int = 1000
    probe_every: int = 50
    fresh: int = 1000

    def generators(self, purpose: int, tasks: int = 1) -> list[torch.Generator]:
        """Random numbers for one purpose: a generator for each seed, or for each seed and task."""
        numbers = [100 * seed + 10 * purpose + task for seed in self.seeds for task in range(tasks)]
        return [torch.Generator().manual_seed(number) for number in numbers]


# What random numbers are for: no two purposes share any.
INITIAL, TEACHERS, TRAINING, PROBE, FRESH = range(5)


def train_teachers(settings: Settings) -> Parameters:
    """Train a teacher for every seed and task by REINFORCE; seeds first, tasks second."""
    generators = settings.generators(TEACHERS, len(TASKS))
    tasks = list(TASKS) * len(settings.seeds)
    targets_N1 = torch.tensor([[task.target] for task in tasks])
    parameters = [tensor.requires_grad_() for tensor in initial(generators)]
    adam = torch.optim.Adam(parameters, lr=settings.teacher_learning_rate)
    for _ in range(settings.teacher_iterations):
        trajectories = roll_out(parameters, tasks, noise(generators, settings.batch, settings.horizon))
        reward_NB = -(trajectories.ends_NB - targets_N1).square()
        advantage_NB = reward_NB - reward_NB.mean(1, keepdim=True)
        step(adam, -advantage_NB[..., None] * move_logps(parameters, trajectories))
    return [tensor.detach() for tensor in parameters]


def noise(generators: list[torch.Generator], batch: int, horizon: int, copies: int = 1) -> Tensor:
    """Standard normal numbers, [copies * generators, batch, horizon]; the copies are equal."""
    return torch.stack([torch.randn(batch, horizon, generator=g) for g in generators]).repeat(copies, 1, 1)


def step(adam: torch.optim.Adam, loss_NBT: Tensor) -> None:
    """Step on the mean over trajectories of the loss summed over time; the networks do not touch one another."""
    adam.zero_grad()
    loss_NBT.sum(2).mean(1).sum().backward()
    adam.step()


def credits_of(log_ratio_NBT: Tensor, gammas: tuple[float, ...]) -> Tensor:
    """Discounted returns of log-ratios, each run's with its own gamma, [N, B, T], nats."""
    parts = zip(log_ratio_NBT.chunk(len(gammas)), gammas, strict=True)
    return torch.cat([return_to_go(part.flatten(0, 1), gamma).view_as(part) for part, gamma in parts])


def log_ratios(student: Parameters, teachers: Parameters, trajectories: Trajectories) -> tuple[Tensor, Tensor]:
    """Student's log-densities with gradient, and student minus teacher without, [N, B, T], nats."""
    student_logps_NBT = move_logps(student, trajectories)
    with torch.no_grad():
        return student_logps_NBT, student_logps_NBT - move_logps(teachers, trajectories)


def output_gradients(student: Parameters, trajectories: Trajectories, credit_NBT: Tensor) -> Tensor:
    """Gradient of the output layer, weights and bias, of every micro-batch, [N, M, O, H + 1]."""
    N, B, T = credit_NBT.shape
    hidden_NBH = last_hidden(student, trajectories.features_NBTF.flatten(1, 2)).detach()
    outputs_NBO = torch.baddbmm(student[5], hidden_NBH, student[4]).detach().requires_grad_()
    logps_NB = log_density(outputs_NBO, trajectories.moves_NBT.flatten(1))
    (score_NBO,) = torch.autograd.grad(logps_NB.sum(), outputs_NBO)
    weighted_NMBO = (credit_NBT.flatten(1)[..., None] * score_NBO).view(N, MICRO_BATCHES, -1, OUTPUTS)
    ones_NB1 = torch.ones(N, B * T, 1)
    inputs_NMBH = torch.cat([hidden_NBH, ones_NB1], dim=-1).view(N, MICRO_BATCHES, weighted_NMBO.shape[2], -1)
    return weighted_NMBO.transpose(2, 3) @ inputs_NMBH / (B // MICRO_BATCHES)


def micro_batch_variance(gradients_NMOH: Tensor) -> Tensor:
    """Mean over micro-batches of the squared distance from their mean gradient, [N]."""
    return (gradients_NMOH - gradients_NMOH.mean(1, keepdim=True)).square().sum((2, 3)).mean(1)


@dataclass(frozen=True)
class Comparison:
    """Runs of all gammas and seeds, with the teachers of each."""

    settings: Settings
    teachers: Parameters

    @property
    def size(self) -> int:
        """How many runs."""
        return len(self.settings.gammas) * len(self.settings.seeds)

    def teachers_of(self, task: Task) -> Parameters:
        """Each run's teacher of a task."""
        index = TASKS.index(task)
        return [tensor[index :: len(TASKS)].repeat(len(self.settings.gammas), 1, 1) for tensor in self.teachers]

    def sample(self, student: Parameters, task: Task, generators: list[torch.Generator], batch: int) -> Trajectories:
        """Trajectories of every run's student."""
        noise_NBT = noise(generators, batch, self.settings.horizon, copies=len(self.settings.gammas))
        return roll_out(student, [task] * self.size, noise_NBT)

    def distil(self, start: Parameters | None = None) -> tuple[Parameters, list[dict]]:
        """Train all students.

        Args:
            start: a student for each seed; by default a new one.

        Returns:
            The students, and what `probe` found on the way.
        """
        settings, probes = self.settings, []
        training, probing = settings.generators(TRAINING), settings.generators(PROBE)
        start = start or initial(settings.generators(INITIAL))
        student = [tensor.repeat(len(settings.gammas), 1, 1).requires_grad_() for tensor in start]
        adam = torch.optim.Adam(student, lr=settings.learning_rate)
        for iteration in range(settings.iterations):
            if iteration % settings.probe_every == 0:
                probes.append({"iteration": iteration, **self.probe(student, probing)})
            task = TASKS[iteration % len(TASKS)]
            trajectories = self.sample(student, task, training, settings.batch)
            logps_NBT, log_ratio_NBT = log_ratios(student, self.teachers_of(task), trajectories)
            step(adam, credits_of(log_ratio_NBT, settings.gammas) * logps_NBT)
        probes.append({"iteration": settings.iterations, **self.probe(student, probing)})
        return [tensor.detach() for tensor in student], probes

    def probe(self, student: Parameters, generators: list[torch.Generator]) -> dict[str, list]:
        """Variance on fresh trajectories, mean over tasks, [gammas, seeds].

        `variance` is that of each run's own gamma, at its own student; `variance_same_student` is that of each gamma at
        the student of the first gamma, so that only the estimator differs. `distance` is from the target at the end.
        """
        shape = (len(TASKS), len(self.settings.gammas), len(self.settings.seeds))
        own, same, distance = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
        for i, task in enumerate(TASKS):
            trajectories = self.sample(student, task, generators, self.settings.batch)
            _, log_ratio_NBT = log_ratios(student, self.teachers_of(task), trajectories)
            for j, gamma in enumerate(self.settings.gammas):
                credit_NBT = credits_of(log_ratio_NBT, (gamma,))
                variance = micro_batch_variance(output_gradients(student, trajectories, credit_NBT)).view(shape[1:])
                own[i, j], same[i, j] = variance[j], variance[0]
            distance[i] = (trajectories.ends_NB - task.target).abs().mean(1).view(shape[1:])
        names = {"variance": own, "variance_same_student": same, "distance": distance}
        return {name: values.mean(0).tolist() for name, values in names.items()}
