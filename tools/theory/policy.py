"""Gaussian policies on a line: many small networks at once, each with its own parameters and its own random numbers.

A policy moves a point by s' = s + delta, delta ~ N(mean, std), where a network makes mean and std from the task's id,
the position and the time. The network has three linear layers of width `WIDTH`, so 4,022 parameters, and tanh between
them; std is softplus of its second output plus `SMALLEST_STD`, without which log-densities have no upper bound.

Shapes: N networks, B trajectories, T steps, F features (3), H width, O outputs (2).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

WIDTH = 60
FEATURES, OUTPUTS = 3, 2
SMALLEST_STD = 0.1


class Task(NamedTuple):
    """Where a point starts and where it should end."""

    name: str
    id: float
    start: float
    target: float


TASKS = (Task("left", -1.0, 2.0, -3.0), Task("right", 1.0, -2.0, 3.0))
Parameters = list[Tensor]


class Trajectories(NamedTuple):
    """Moves drawn from policies: features [N, B, T, F], moves [N, B, T] and final positions [N, B]."""

    features_NBTF: Tensor
    moves_NBT: Tensor
    ends_NB: Tensor


def initial(generators: list[torch.Generator]) -> Parameters:
    """Weights [N, in, out] and biases [N, 1, out] of three layers, uniform within 1 / sqrt(in)."""
    sizes = ((FEATURES, WIDTH), (WIDTH, WIDTH), (WIDTH, OUTPUTS))
    shapes = [(fan_in, shape) for fan_in, out in sizes for shape in ((fan_in, out), (1, out))]
    networks = [[(2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in) for fan_in, shape in shapes]
                for generator in generators]  # fmt: skip
    return [torch.stack(tensors) for tensors in zip(*networks, strict=True)]


def last_hidden(parameters: Parameters, features_NBF: Tensor) -> Tensor:
    """What the last layer sees, [N, B, H]."""
    hidden_NBH = torch.baddbmm(parameters[1], features_NBF, parameters[0]).tanh()
    return torch.baddbmm(parameters[3], hidden_NBH, parameters[2]).tanh()


def outputs(parameters: Parameters, features_NBF: Tensor) -> Tensor:
    """Mean, and std before `gaussian` makes it positive, [N, B, O]."""
    return torch.baddbmm(parameters[5], last_hidden(parameters, features_NBF), parameters[4])


def gaussian(outputs_O: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation from the two outputs, the last dimension."""
    return outputs_O[..., 0], SMALLEST_STD + softplus(outputs_O[..., 1])


def log_density(outputs_O: Tensor, moves: Tensor) -> Tensor:
    """Log-density of moves, nats."""
    mean, std = gaussian(outputs_O)
    return -((moves - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2


def move_logps(parameters: Parameters, trajectories: Trajectories) -> Tensor:
    """Log-density of every move of trajectories under policies, [N, B, T], nats."""
    found = outputs(parameters, trajectories.features_NBTF.flatten(1, 2))
    return log_density(found.view(*trajectories.moves_NBT.shape, OUTPUTS), trajectories.moves_NBT)


@torch.no_grad()
def roll_out(parameters: Parameters, tasks: list[Task], noise_NBT: Tensor) -> Trajectories:
    """Let every policy move along its task.

    Args:
        parameters: of N policies.
        tasks: one for each of them.
        noise_NBT: standard normal; a move is its mean plus its std times this.

    Returns:
        Trajectories without gradient.
    """
    N, B, T = noise_NBT.shape
    ids_NB = torch.tensor([[task.id] for task in tasks]).expand(N, B)
    position_NB = torch.tensor([[task.start] for task in tasks]).expand(N, B)
    features, moves = [], []
    for step in range(T):
        time_NB = torch.full((N, B), step / T)
        features.append(torch.stack([ids_NB, position_NB, time_NB], dim=-1))
        mean_NB, std_NB = gaussian(outputs(parameters, features[-1]))
        moves.append(mean_NB + std_NB * noise_NBT[..., step])
        position_NB = position_NB + moves[-1]
    return Trajectories(torch.stack(features, dim=2), torch.stack(moves, dim=2), position_NB)
