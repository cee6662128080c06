"""Run a model's body over prompts and completions in one of three ways, and choose the way.

Packed rows share their beginnings and need no padding, so the body has less work, but not every architecture can run
packed. The choice is made once a model, from the body's structure and a comparison of hidden states on a few tokens.
`LanguageModel.hidden` calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lit_opd.functional import Head, compute_dtype, upcast
from lit_opd.models.llama import has_hooks, is_tied, llama_hidden, tied_embedding, unlike_llama
from lit_opd.models.packed_attention import packed_layers, unsupported
from lit_opd.models.packing import Layout, gather_rows, layout_of, pack
from lit_opd.types import Rollout

if TYPE_CHECKING:
    from lit_opd.models.language_model import LanguageModel

__all__ = ["Forward", "LlamaForward", "PackedForward", "PaddedForward", "choose_forward", "circumstances", "distance"]

_log = logging.getLogger(__name__)


class Forward(Protocol):
    """A way to run a model's body.

    It keeps nothing of the model, so copies of a model share it.

    Attributes:
        reason: why the body runs this way.
    """

    reason: str

    def hidden(self, model: LanguageModel, rollout: Rollout) -> tuple[Tensor, Head]:
        """Read a rollout, as `LanguageModel.hidden` says."""
        ...


class PaddedForward:
    """The way that any body runs: every row padded to the longest, and nothing shared."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def hidden(self, model: LanguageModel, rollout: Rollout) -> tuple[Tensor, Head]:
        """See `Forward.hidden`."""
        ids_BL = torch.cat([rollout.prompts.ids_BP, rollout.ids_BT], dim=1)[:, :-1]
        mask_BL = torch.cat([rollout.prompts.mask_BP, rollout.real_BT], dim=1)[:, :-1]
        with model.precision():
            hidden_BLH = model.run_body(ids_BL, mask_BL).last_hidden_state
        start = rollout.prompts.ids_BP.shape[1] - 1
        return hidden_BLH[:, start:][rollout.mask_BT], model.head


class PackedForward:
    """A Hugging Face body over packed rows, its attention replaced by one that knows their layout."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def hidden(self, model: LanguageModel, rollout: Rollout) -> tuple[Tensor, Head]:
        """See `Forward.hidden`."""
        layout, predictors_N = layout_of(rollout)
        return gather_rows(self.packed(model, layout), predictors_N), model.head

    def packed(self, model: LanguageModel, layout: Layout) -> Tensor:
        """Compute hidden states [N, H] of the tokens of a layout."""
        body = model.body
        with model.precision(), packed_layers(body):
            inputs = {"input_ids": layout.ids_N[None], "position_ids": layout.positions_N[None], "layout": layout}
            return body(**inputs, use_cache=False).last_hidden_state[0]


class LlamaForward:
    """A body built like Llama's, run over packed rows by this package's own layers."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def hidden(self, model: LanguageModel, rollout: Rollout) -> tuple[Tensor, Head]:
        """See `Forward.hidden`."""
        layout, predictors_N = layout_of(rollout)
        embedding, table = model.body.embed_tokens, model.output_layer.weight
        if not (is_tied(embedding, table) and table.requires_grad):
            return gather_rows(self.packed(model, layout), predictors_N), model.head
        embedded_NH, table = tied_embedding(layout.ids_N, embedding)
        head = replace(model.head, weight_VH=table[: model.vocabulary])
        return gather_rows(self.packed(model, layout, embedded_NH), predictors_N), head

    def packed(self, model: LanguageModel, layout: Layout, embedded_NH: Tensor | None = None) -> Tensor:
        """Compute hidden states [N, H] of the tokens of a layout, which may be embedded already."""
        with model.precision():
            dtype = compute_dtype(model.output_layer.weight[:0])
            return llama_hidden(model.body, layout, dtype, embedded_NH)


def circumstances(body: Any) -> Hashable:
    """Describe what decides how a body can run and may change after it was made: hooks, shards, checkpointing."""
    return has_hooks(body.modules()), any(type(p.data) is not Tensor for p in body.parameters()), _recomputes(body)


def choose_forward(model: LanguageModel) -> Forward:
    """Choose the fastest way that gives a body's own hidden states, and warn where rows must be padded."""
    body = model.body
    # Checkpointed layers run again in the backward pass, when `packed_layers` has put their own attention back.
    if _recomputes(body):
        return PaddedForward("its layers run again in the backward pass (gradient checkpointing)")
    unlike = unlike_llama(body)
    llama = LlamaForward("it is built like Llama")
    unlike = unlike or disagreement(model, llama)
    if unlike is None:
        return llama
    packed = PackedForward(unlike)
    reason = (unsupported(body) if model.takes_positions else "it takes no positions") or disagreement(model, packed)
    if reason is None:
        return packed
    _log.warning("The %s (%s) runs padded, and shares no prompts: %s.", model.key, type(body).__name__, reason)
    return PaddedForward(reason)


@torch.no_grad()
def disagreement(model: LanguageModel, forward: LlamaForward | PackedForward) -> str | None:
    """Say how hidden states of packed rows differ from those of each row alone, None where only by rounding."""
    # Rows of unequal lengths that share a beginning, the longest longer than the attention window of a small model.
    ids = [i % model.vocabulary for i in range(24)]
    rows = [ids, ids[:20] + ids[:2], ids[3:9]]
    with model.evaluating(), torch.autocast(model.device.type, enabled=False):
        layout, paths = pack(rows, model.device)
        try:
            packed_NH = upcast(forward.packed(model, layout))
        except (NotImplementedError, TypeError) as error:
            return str(error)
        for row, path in zip(rows, paths, strict=True):
            row_1L = torch.tensor([row], device=model.device)
            own_LH = upcast(model.run_body(row_1L, torch.ones_like(row_1L, dtype=torch.bool)).last_hidden_state[0])
            off = distance(packed_NH[path], own_LH, exact=packed_NH.dtype == model.output_layer.weight.dtype)
            if off is not None:
                return f"its packed hidden states are off by {off:.2g}"
    return None


def distance(found: Tensor, expected: Tensor, exact: bool) -> float | None:
    """Compute the relative distance of two tensors of hidden states, None where rounding explains it.

    Two ways to run a body add the same numbers in another order. Many layers of bf16 (not `exact`) may amplify that to
    several per cent, whereas a token that sees the wrong keys is off by about its own size.
    """
    off = ((found - expected).norm() / expected.norm()).item()
    return None if off < (1e-3 if exact else 0.25) else off


def _recomputes(body: Any) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in body.modules())
