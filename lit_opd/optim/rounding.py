"""Train weights that are kept in bfloat16, whose steps are mostly smaller than what rounding leaves of them.

bfloat16 has 8 significant bits: a weight moves by 0.2 to 0.4 per cent of its size or not at all, and updates of a usual
learning rate are smaller. Rounded up or down at random, with the nearer value the more probable one, they count in the
mean (Gupta et al., 2015, arXiv:1502.02551). `build_optimizer` names the optimizer, and watches others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_opd.errors import LintWarning

__all__ = ["StochasticAdamW", "round_stochastically", "warn_of_lost_steps"]

_DROPPED = 16  # bits of a float32 that a bfloat16 has not
_MOMENTS = ("exp_avg", "exp_avg_sq")
# Weights of a tensor that are looked at, and the share of still ones that is told.
_LOOKED_AT, _MOST_LOST = 2**14, 0.5


def round_stochastically(wide: Tensor, generator: torch.Generator) -> Tensor:
    """Round float32 to one of the two neighbours in bfloat16, so that the mean over draws is the value itself.

    >>> wide = torch.full((1000,), 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    >>> rounded = round_stochastically(wide, torch.Generator().manual_seed(0))
    >>> rounded.dtype, rounded.unique().tolist(), round(rounded.float().mean().item(), 3)
    (torch.bfloat16, [1.0, 1.0078125], 1.002)
    """
    drawn: Any = {"generator": generator, "device": wide.device, "dtype": torch.int32}
    # A float's sign and size have bits of their own, so that the sum moves both signs away from zero.
    bits = wide.view(torch.int32) + torch.randint(1 << _DROPPED, wide.shape, **drawn)
    return bits.bitwise_and_(-1 << _DROPPED).view(torch.float32).bfloat16()


class StochasticAdamW(Optimizer):
    """AdamW of torch, with moments and arithmetic in float32 and weights in bfloat16 rounded stochastically.

    Weights of other dtypes are rounded to the nearest. A weight takes 12 bytes with its gradient and moments, where
    float32 weights take 16. The draws are named by seed, step and parameter: every process rounds alike, and a resumed
    run goes on with the same draws.

    Args:
        params: parameters, or groups of them.
        lr: learning rate.
        betas: of the running averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: share of a weight that is taken off, times the learning rate.
        seed: of the rounding.

    Raises:
        ValueError: a number out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
    ) -> None:
        for name, number in {"lr": lr, "eps": eps, "weight_decay": weight_decay, "seed": seed}.items():
            if number < 0:
                raise ValueError(f"{name} is below 0: {number}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas are not in [0, 1): {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for number, (weight, group) in enumerate(self._weights()):
            if weight.grad is not None:
                self._update(weight, weight.grad.float(), group, number)
        return loss

    def _weights(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((weight, group) for group in self.param_groups for weight in group["params"])

    def _update(self, weight: Tensor, gradient: Tensor, group: dict[str, Any], number: int) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state.update({name: torch.zeros_like(gradient) for name in _MOMENTS}, step=0)
        state["step"] += 1
        mean, square, step = state["exp_avg"], state["exp_avg_sq"], state["step"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        wide = weight.float()  # itself where it is in float32
        wide.mul_(1 - group["lr"] * group["weight_decay"])
        root = square.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        wide.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))
        if weight.dtype == torch.bfloat16:
            seed = np.random.SeedSequence([group["seed"], step, number]).generate_state(1)[0]
            weight.copy_(round_stochastically(wide, torch.Generator(weight.device).manual_seed(int(seed))))
        elif wide is not weight:
            weight.copy_(wide)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a saved state, whose moments stay in float32 where torch would cast them to the weights' dtype."""
        super().load_state_dict(state_dict)
        names = (name for group in state_dict["param_groups"] for name in group["params"])
        for name, (weight, _) in zip(names, self._weights(), strict=True):
            for moment, value in state_dict["state"].get(name, {}).items():
                if moment in _MOMENTS:
                    self.state[weight][moment] = value.to(weight.device, torch.float32, copy=True)


def warn_of_lost_steps(optimizer: Optimizer, steps_before: int) -> None:
    """Have one step of an optimizer measured, the one after `steps_before` of warm-up.

    It warns where most of the weights in 16 bits that have a gradient stay where they are.
    """
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    made = 0

    def before(optimizer: Optimizer, *_: Any) -> None:
        nonlocal made
        made += 1
        if made > steps_before:
            seen.extend((weight, gradient, _some(weight).clone()) for weight, gradient in _narrow(optimizer))

    def after(optimizer: Optimizer, *_: Any) -> None:
        if made <= steps_before or not seen:
            return
        for hook in hooks:
            hook.remove()
        asked = torch.cat([_some(gradient) != 0 for _, gradient, _ in seen])
        still = torch.cat([_some(weight) == old for weight, _, old in seen])
        lost = int((still & asked).sum()) / max(1, int(asked.sum()))
        if lost > _MOST_LOST:
            _tell(lost, seen[0][0].dtype, optimizer.param_groups[0]["lr"], made)
        seen.clear()

    hooks = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]


def _narrow(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    weights = (weight for group in optimizer.param_groups for weight in group["params"])
    return [(one, one.grad) for one in weights if one.grad is not None and one.element_size() == 2]


def _some(values: Tensor) -> Tensor:
    flat = values.detach().flatten()
    return flat[:: max(1, len(flat) // _LOOKED_AT)]


def _tell(lost: float, dtype: torch.dtype, lr: float, step: int) -> None:
    told = f"{lost:.0%} of the weights with a gradient stayed where they were in step {step}"
    why = f"rounding to {str(dtype).removeprefix('torch.')} loses steps of a learning rate of {lr:g}"
    remedy = "Set student.dtype=float32 and trainer.precision=bf16-mixed, or optim.name=StochasticAdamW."
    warnings.warn(f"optim.lr: {told}: {why}. {remedy}", LintWarning, stacklevel=4)
