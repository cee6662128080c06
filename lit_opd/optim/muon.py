"""Train hidden matrices by Muon and all other weights by AdamW, as one optimizer: `optim.name=Muon`.

Muon makes the step of a matrix orthogonal as a whole (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/).
It takes no vectors, and its authors leave embeddings and the output layer to AdamW. By default its step has the root
mean square of AdamW's, so that both take one learning rate (Liu et al., 2025, arXiv:2502.16982). The two factors of a
LoRA adapter are matrices too: the step of each is orthogonal, that of their product is not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from lit_opd.errors import UserError

__all__ = ["MuonWithAdamW", "outer_matrices"]

SCALED_AS_ADAMW = {"adjust_lr_fn": "match_rms_adamw"}


class MuonWithAdamW(Optimizer):
    """torch's Muon for matrices and torch's AdamW for other weights, whose groups and state are this optimizer's own.

    Schedulers, checkpoints and clipping meet one optimizer: Muon's parameter group, then AdamW's.

    Args:
        matrices: 2-D weights of hidden layers.
        others: all other weights.
        lr: learning rate of both.
        adamw: keywords of AdamW, in which `lr` is a learning rate of its own.
        **muon: keywords of Muon.

    Raises:
        UserError: no matrix, a keyword that AdamW refuses, or a torch without Muon.
        TypeError, ValueError: what Muon refuses.
    """

    def __init__(
        self,
        matrices: Sequence[Parameter],
        others: Sequence[Parameter],
        lr: float,
        adamw: Mapping[str, Any] | None = None,
        **muon: Any,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            found, remedy = f"torch {torch.__version__}", "Upgrade torch, or set optim.name=AdamW."
            raise UserError("optim.name", "torch 2.9 or newer, which has Muon", found, remedy)
        if not matrices:
            remedy = "Set optim.name=AdamW."
            raise UserError("optim.name", "matrices of hidden layers that train, for Muon", "none", remedy)
        if muon.get("nesterov") is False and any(matrix.dtype == torch.bfloat16 for matrix in matrices):
            # torch 2.13 orthogonalises what it is given in place where that is in bfloat16: here its own momentum.
            expected = "true for weights in bfloat16, of which torch's Muon would spoil the momentum"
            raise UserError("optim.kwargs.nesterov", expected, "false", "Leave it out.")
        self._parts: list[Optimizer] = [torch.optim.Muon(matrices, lr=lr, **(SCALED_AS_ADAMW | muon))]
        if others:
            self._parts.append(_make_adamw(others, {"lr": lr, **(adamw or {})}))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step of both."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self._parts:
            part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Give both the groups and the state of this optimizer, which a loaded checkpoint makes anew."""
        for part, group in zip(self._parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state


def outer_matrices(model: nn.Module) -> list[Parameter]:
    """List the weights of embeddings, of their adapters and of the output layer, which Muon leaves to AdamW."""
    layers: list[nn.Module] = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    layers += [] if head is None else [head]
    adapters = [weight for name, weight in model.named_parameters() if ".lora_embedding_" in name]
    return [weight for layer in layers for weight in layer.parameters()] + adapters


def _make_adamw(weights: Sequence[Parameter], keywords: dict[str, Any]) -> AdamW:
    try:
        return AdamW(weights, **keywords)
    except (TypeError, ValueError) as error:
        expected = "keywords of torch.optim.AdamW"
        raise UserError("optim.kwargs.adamw", expected, str(error), "Correct them.") from error
