"""Three ways to run a model's body over prompts and completions, and the choice between them.

Packed rows share their beginnings and need no padding, so they are read with less work; not every architecture can be
run that way. The choice is made once a model, by its structure and by comparing hidden states on a few tokens, and says
its reason. Called by `LanguageModel.hidden`.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lit_opd.functional import Head, compute_dtype, upcast
from lit_opd.models.llama import is_tied, llama_hidden, tied_embedding, unlike_llama
from lit_opd.models.packed_attention import packed_layers, unsupported
from lit_opd.models.packing import Layout, gather_rows, layout_of, pack
from lit_opd.types import Rollout

if TYPE_CHECKING:
    from lit_opd.models.language_model import LanguageModel

__all__ = ["Forward", "LlamaForward", "PackedForward", "PaddedForward", "choose_forward", "circumstances"]

_log = logging.getLogger(__name__)


class Forward(Protocol):
    """A way to run a model's body; it keeps nothing of the model, so copies of a model share it.

    Attributes:
        reason: why the body runs this way.
    """

    reason: str

    def hidden(self, model: LanguageModel, rollout: Rollout) -> tuple[Tensor, Head]:
        """Read a rollout; see `LanguageModel.hidden`."""
        ...


class PaddedForward:
    """Runs any body, with every row padded to the longest and nothing shared."""

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
    """Runs a Hugging Face body over packed rows, with its attention replaced by one that knows their layout."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def hidden(self, model: LanguageModel, rollout: Rollout) -> tuple[Tensor, Head]:
        """See `Forward.hidden`."""
        layout, predictors_N = layout_of(rollout)
        return gather_rows(self.packed(model, layout), predictors_N), model.head

    def packed(self, model: LanguageModel, layout: Layout) -> Tensor:
        """Read the tokens of a layout; returns their hidden states [N, H]."""
        body = model.body
        with model.precision(), packed_layers(body):
            inputs = {"input_ids": layout.ids_N[None], "position_ids": layout.positions_N[None], "layout": layout}
            return body(**inputs, use_cache=False).last_hidden_state[0]


class LlamaForward:
    """Runs bodies built like Llama's by this package's own layers, over packed rows."""

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
        """Read the tokens of a layout, embedded already or not; returns their hidden states [N, H]."""
        with model.precision():
            dtype = compute_dtype(model.output_layer.weight[:0])
            return llama_hidden(model.body, layout, dtype, embedded_NH)


def circumstances(body: Any) -> Hashable:
    """Describe what may change after a model is made and decides how it can run: hooks, shards, checkpointing."""
    parts = list(body.modules())
    heard = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    return heard, any(type(p.data) is not Tensor for p in body.parameters()), _recomputes(body)


def choose_forward(model: LanguageModel) -> Forward:
    """Choose the fastest way that gives a body's own hidden states, and say where rows must be padded."""
    body = model.body
    # Layers that run again in the backward pass would find their own attention put back.
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
    """Compare hidden states of packed rows with those of each row alone; None where they are equal up to rounding."""
    # Rows that share a beginning, of unequal lengths, longer than the window that a small model may have.
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
            off = ((packed_NH[path] - own_LH).norm() / own_LH.norm()).item()
            # The same sums in another order. Many layers of bf16 may grow that to several per cent; a token that sees
            # what it should not, or not what it should, is off by as much as it has.
            if not off < (1e-3 if packed_NH.dtype == model.output_layer.weight.dtype else 0.25):
                return f"its packed hidden states are off by {off:.2g}"
    return None


def _recomputes(body: Any) -> bool:
    return any(getattr(part, "gradient_checkpointing", False) for part in body.modules())
