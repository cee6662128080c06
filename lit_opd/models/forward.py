"""Run a model's body over prompts and completions in one of three ways, and choose the way.

Packed rows share their beginnings and need no padding, so the body has less work, but not every architecture can run
packed. The choice is made once a model, from the body's structure and a comparison of hidden states on a few tokens.
`LanguageModel.hidden` calls it.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lit_opd.errors import UserError
from lit_opd.functional import Head, compute_dtype, upcast
from lit_opd.models.llama import has_hooks, is_tied, llama_hidden, tied_embedding, unlike_llama
from lit_opd.models.packed_attention import Attend, attend, packed_layers, unsupported
from lit_opd.models.packing import Layout, gather_rows, layout_of, pack
from lit_opd.types import Rollout

if TYPE_CHECKING:
    from lit_opd.models.language_model import LanguageModel

_log = logging.getLogger(__name__)

# The errors that the bodies of transformers raise when they are tried out with inputs that they do not take.
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


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

    def read(self, model: LanguageModel, rows: list[list[int]]) -> list[Tensor]:
        """Read rows of token ids together, and return the hidden states [L, H] of each."""
        ...


@dataclass
class PaddedForward:
    """The way that any body runs: every row padded to the longest, and nothing shared."""

    reason: str

    def hidden(self, model: LanguageModel, rollout: Rollout) -> tuple[Tensor, Head]:
        """See `Forward.hidden`.

        Rows begin at the first column and padding comes last: a recurrent state, or a position that a body counts by
        column, would otherwise depend on the padding before a row, which is that of its longest neighbour.
        """
        ids_BL = torch.cat([rollout.prompts.ids_BP, rollout.ids_BT], dim=1)[:, :-1]
        mask_BL = torch.cat([rollout.prompts.mask_BP, rollout.real_BT], dim=1)[:, :-1]
        start_B1 = mask_BL.long().argmax(1, keepdim=True)
        columns_L = torch.arange(int(mask_BL.sum(1).amax()), device=ids_BL.device)
        from_BL = (start_B1 + columns_L).clamp(max=ids_BL.shape[1] - 1)
        real_BL = columns_L < mask_BL.sum(1, keepdim=True)
        with model.precision():
            hidden_BLH = model.run_body(ids_BL.gather(1, from_BL), real_BL).last_hidden_state
        row_N, place_N = rollout.mask_BT.nonzero(as_tuple=True)
        return hidden_BLH[row_N, rollout.prompts.ids_BP.shape[1] - 1 + place_N - start_B1[row_N, 0]], model.head

    def read(self, model: LanguageModel, rows: list[list[int]]) -> list[Tensor]:
        """See `Forward.read`."""
        real_BL = torch.arange(max(map(len, rows))) < torch.tensor([[len(row)] for row in rows])
        ids_BL = torch.zeros(real_BL.shape, dtype=torch.long).masked_scatter_(real_BL, torch.tensor(sum(rows, [])))
        hidden_BLH = model.run_body(ids_BL.to(model.device), real_BL.to(model.device)).last_hidden_state
        return [hidden_LH[: len(row)] for hidden_LH, row in zip(hidden_BLH, rows, strict=True)]


@dataclass
class PackedForward:
    """A Hugging Face body over packed rows, its attention replaced by one that knows their layout.

    Attributes:
        reason: why the body runs this way.
        attend: the way to compute attention.
    """

    reason: str
    attend: Attend = attend

    def hidden(self, model: LanguageModel, rollout: Rollout) -> tuple[Tensor, Head]:
        """See `Forward.hidden`."""
        layout, predictors_N = layout_of(rollout)
        return gather_rows(self.packed(model, layout), predictors_N), model.head

    def read(self, model: LanguageModel, rows: list[list[int]]) -> list[Tensor]:
        """See `Forward.read`."""
        layout, paths = pack(rows, model.device)
        packed_NH = self.packed(model, layout)
        return [packed_NH[path] for path in paths]

    def packed(self, model: LanguageModel, layout: Layout) -> Tensor:
        """Compute hidden states [N, H] of the tokens of a layout."""
        body = model.body
        with model.precision(), packed_layers(body, layout):
            inputs = {"input_ids": layout.ids_N[None], "position_ids": layout.positions_N[None]}
            return body(**inputs, layout=layout, attend=self.attend, use_cache=False).last_hidden_state[0]


class LlamaForward(PackedForward):
    """A body built like Llama's, run over packed rows by this package's own layers."""

    def hidden(self, model: LanguageModel, rollout: Rollout) -> tuple[Tensor, Head]:
        """See `Forward.hidden`."""
        embedding, table = model.body.embed_tokens, model.output_layer.weight
        if not (is_tied(embedding, table) and table.requires_grad):
            return super().hidden(model, rollout)
        layout, predictors_N = layout_of(rollout)
        embedded_NH, table = tied_embedding(layout.ids_N, embedding)
        head = replace(model.head, weight_VH=table[: model.vocabulary])
        return gather_rows(self.packed(model, layout, embedded_NH), predictors_N), head

    def packed(self, model: LanguageModel, layout: Layout, embedded_NH: Tensor | None = None) -> Tensor:
        """Compute hidden states [N, H] of the tokens of a layout, which may be embedded already."""
        with model.precision():
            dtype = compute_dtype(model.output_layer.weight[:0])
            return llama_hidden(model.body, layout, dtype, embedded_NH, self.attend)


def circumstances(body: Any) -> Hashable:
    """Describe what decides how a body can run and may change after it was made: hooks, shards, checkpointing."""
    return has_hooks(body.modules()), any(type(p.data) is not Tensor for p in body.parameters()), _recomputes(body)


def choose_forward(model: LanguageModel) -> Forward:
    """Choose the fastest way that gives a body's own hidden states, and warn where rows must be padded.

    Raises:
        UserError: the body reads a row otherwise when other rows stand beside it.
    """
    body = model.body
    llama = LlamaForward("it is built like Llama")
    unlike = unlike_llama(body) or _recomputes_elsewhere(body) or disagreement(model, llama)
    if unlike is None:
        return llama
    packed = PackedForward(unlike)
    reason = (unsupported(body) if model.takes_positions else "it takes no positions") or disagreement(model, packed)
    if reason is None:
        return packed
    _log.warning("The %s (%s) runs padded, and shares no prompts: %s.", model.key, type(body).__name__, reason)
    return _padded(model, reason)


def _padded(model: LanguageModel, reason: str) -> PaddedForward:
    padded = PaddedForward(reason)
    if (found := disagreement(model, padded)) is not None:
        expected = "a model that reads a row alike alone and beside longer rows"
        remedy = "Name another model: what it says of a token depends on the rest of the batch."
        raise UserError(f"{model.key}.path", expected, f"{type(model.body).__name__}: {found}", remedy)
    return padded


@torch.no_grad()
def disagreement(model: LanguageModel, forward: Forward) -> str | None:
    """Say how hidden states of rows read together differ from those of each alone, None where only by rounding."""
    # Rows of unequal lengths that share a beginning, the longest longer than the attention window of a small model.
    ids = [i % model.vocabulary for i in range(24)]
    rows = [ids, ids[:20] + ids[:2], ids[3:9]]
    with model.evaluating(), torch.autocast(model.device.type, enabled=False):
        try:
            together = [upcast(found_LH) for found_LH in forward.read(model, rows)]
        except FAILURES as error:
            return str(error) if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {error}"
        for row, found_LH in zip(rows, together, strict=True):
            row_1L = torch.tensor([row], device=model.device)
            own_LH = upcast(model.run_body(row_1L, torch.ones_like(row_1L, dtype=torch.bool)).last_hidden_state[0])
            exact = not model.is_quantised and found_LH.dtype == model.output_layer.weight.dtype
            off = distance(found_LH, own_LH, exact)
            if off is not None:
                return f"its hidden states of rows read together are off by {off:.2g}"
    return None


def distance(found: Tensor, expected: Tensor, exact: bool) -> float | None:
    """Compute the relative distance of two tensors of hidden states, None where rounding explains it.

    Two ways to run a body add the same numbers in another order. Many layers of bf16 (not `exact`) may amplify that to
    several per cent, whereas a token that sees the wrong keys is off by about its own size.
    """
    off = ((found - expected).norm() / expected.norm()).item()
    return None if off < (1e-3 if exact else 0.25) else off


def _recomputes(part: Any) -> bool:
    return any(getattr(inner, "gradient_checkpointing", False) for inner in part.modules())


def _recomputes_elsewhere(body: Any) -> str | None:
    """Say that a body built like Llama checkpoints in a way that `llama_hidden` would not, None where it does not."""
    own = _recomputes(body) and not any(map(_recomputes, body.layers))
    return "its layers are computed again by code of its own" if own else None
