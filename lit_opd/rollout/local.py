"""Sample completions in this process, by a decode loop over the model at hand.

This is the default engine. It needs no server, samples exactly under the recorded law, and takes the fastest decoder
that the model allows.
"""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lit_opd.functional import sample_tokens
from lit_opd.functional.head import compute_dtype
from lit_opd.functional.precision import upcast
from lit_opd.models import LanguageModel
from lit_opd.models.context import check_length
from lit_opd.models.forward import distance
from lit_opd.rollout.decoders import CacheDecoder, Decoder, probe, reads_together
from lit_opd.rollout.fused import FusedDecoder, why_not_fused
from lit_opd.rollout.products import make_product
from lit_opd.types import PromptBatch, Rollout, SamplingLaw

__all__ = ["LocalEngine"]

_log = logging.getLogger(__name__)

# The share of rows that must have finished before they leave the batch: moving the cache costs about as much as a step.
_FINISHED_SHARE = 0.25
# Steps between looks at finished rows on an accelerator, where each look waits for all work in its queue.
_ASK_EVERY = 16


class LocalEngine:
    """The engine that samples in this process."""

    def __init__(self) -> None:
        self._disagreements: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
        self._together: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    @torch.no_grad()
    def sample(
        self, policy: LanguageModel, batch: PromptBatch, law: SamplingLaw, num_completions: int, uniforms_BT: Tensor
    ) -> Rollout:
        """Complete every prompt, as `RolloutEngine.sample` says, reading each once for all its completions."""
        check_length(policy, batch.prompts.ids_BP.shape[1] + uniforms_BT.shape[1])
        # Without dropout, for the recorded log-probabilities are those of the whole model.
        with policy.evaluating(), policy.precision(cache_casts=True):
            decoder = self.decoder(policy, len(uniforms_BT))
            ids_BT, logps_BT, mask_BT, stopped_B = _decode(policy, decoder, batch, law, num_completions, uniforms_BT)
        return Rollout.completed(batch, num_completions, ids_BT, mask_BT, logps_BT, stopped_B, law)

    def decoder(self, policy: LanguageModel, rows: int) -> Decoder:
        """Make the fastest decoder of `rows` rows that the model allows.

        Raises:
            UserError: no decoder continues this model's rows exactly.
        """
        reason = why_not_fused(policy)
        if reason is None:
            if policy.model not in self._disagreements:
                self._disagreements[policy.model] = reason = _disagreement(policy)
                if reason:
                    _log.warning("The %s decodes without the fused path: %s.", policy.key, reason)
            reason = self._disagreements[policy.model]
        if reason is None:
            return FusedDecoder(policy, rows)
        if policy.model not in self._together:
            self._together[policy.model] = reads_together(policy)
        return CacheDecoder(policy, self._together[policy.model])


def _disagreement(policy: LanguageModel) -> str | None:
    """Say how the two decoders differ on a few tokens, None where only by rounding."""
    batch, next_B2 = probe(policy)
    with torch.autocast(policy.device.type, enabled=False):
        fused, cached = FusedDecoder(policy, 4), CacheDecoder(policy)
        pairs = [(fused.prefill(batch, 2, 1), cached.prefill(batch, 2, 1))]
        pairs.append((fused.step(next_B2[:, 0]), cached.step(next_B2[:, 0])))
    found, expected = (upcast(torch.cat(parts)) for parts in zip(*pairs, strict=True))
    off = distance(found, expected, exact=policy.head.weight_VH.dtype == expected.dtype)
    return None if off is None else f"its hidden states would be off by {off:.2g}"


def _decode(
    policy: LanguageModel,
    decoder: Decoder,
    batch: PromptBatch,
    law: SamplingLaw,
    num_completions: int,
    uniforms_BT: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sample token ids, log-probabilities and mask [B, T], and say which rows met a stop token [B]."""
    (rows, length), device = uniforms_BT.shape, uniforms_BT.device
    stop_ids = torch.tensor(policy.stop_ids, dtype=torch.long, device=device)
    ids_BT = torch.full((rows, length), policy.pad_id, device=device)
    # With its dtype, for Lightning's bf16-true makes bf16 torch's default.
    logps_BT = torch.zeros((rows, length), dtype=torch.float32, device=device)
    mask_BT = torch.zeros((rows, length), dtype=torch.bool, device=device)
    stopped_B = torch.zeros(rows, dtype=torch.bool, device=device)
    active_A = torch.arange(rows, device=device)
    hidden_AH = decoder.prefill(batch, num_completions, length)
    head = policy.head.to(compute_dtype(hidden_AH))  # cast once, not at every token
    project = make_product(head.weight_VH, head.bias_V, rows)
    told: set[int] = set()
    for t in range(length):
        forbidden = stop_ids if t < law.min_new_tokens else None
        token_A, logps_A = sample_tokens(
            head.shape_logits(upcast(project(hidden_AH.to(head.weight_VH.dtype)))),
            law,
            uniforms_BT[active_A, t],
            forbidden,
        )
        running_A = ~stopped_B[active_A]
        ids_BT[active_A, t] = torch.where(running_A, token_A, policy.pad_id)
        logps_BT[active_A, t] = torch.where(running_A, logps_A.float(), 0.0)
        mask_BT[active_A, t] = running_A
        stopped_B[active_A] |= torch.isin(token_A, stop_ids)
        if t + 1 == length:
            break
        if device.type == "cpu" or t % _ASK_EVERY == 0:
            _tell(batch, num_completions, told, stopped_B, ids_BT, mask_BT)
            going = torch.nonzero(~stopped_B[active_A]).flatten()
            if not len(going):
                break
            if len(going) <= len(active_A) * (1 - _FINISHED_SHARE) and decoder.keep(going):
                active_A, token_A = active_A[going], token_A[going]
        hidden_AH = decoder.step(token_A)
    _tell(batch, num_completions, told, mask_BT[:, 0], ids_BT, mask_BT)
    steps = int(mask_BT.sum(1).amax())
    return ids_BT[:, :steps], logps_BT[:, :steps], mask_BT[:, :steps], stopped_B


def _tell(batch: PromptBatch, count: int, told: set[int], ended_B: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> None:
    """Tell whoever waits for single completions of each row that has ended, once."""
    if batch.ended is None:
        return
    for row in set(torch.nonzero(ended_B).flatten().tolist()) - told:
        told.add(row)
        batch.ended(batch, row // count, ids_BT[row][mask_BT[row]].tolist())
