"""The local engine: a decode loop over a key-value cache."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional import draw, head_logits, law_logps
from lit_opd.functional.head import compute_dtype
from lit_opd.models import LanguageModel
from lit_opd.types import FinishReason, PromptBatch, Rollout, SamplingLaw

__all__ = ["LocalEngine"]


class LocalEngine:
    """Samples with the model at hand, in this process."""

    @torch.no_grad()
    def sample(
        self, policy: LanguageModel, batch: PromptBatch, law: SamplingLaw, num_completions: int, uniforms_BT: Tensor
    ) -> Rollout:
        """Complete every prompt; see `RolloutEngine.sample`. Prompts are prefilled once for all their completions."""
        # No dropout: the sampler must be the law that the log-probabilities are of.
        with policy.evaluating(), policy.precision(cache_casts=True):
            ids_BT, logps_BT, mask_BT, stopped_B = _decode(policy, batch, law, num_completions, uniforms_BT)
        rows_B = torch.arange(len(batch.prompt_ids_BP), device=ids_BT.device).repeat_interleave(num_completions)
        return Rollout(
            prompt_ids_BP=batch.prompt_ids_BP[rows_B],
            prompt_mask_BP=batch.prompt_mask_BP[rows_B],
            completion_ids_BT=ids_BT,
            completion_mask_BT=mask_BT,
            mask_BT=mask_BT,
            sampler_logps_BT=logps_BT,
            finish_B=torch.where(stopped_B, FinishReason.STOP, FinishReason.LENGTH),
            law=law,
            prompt_index_B=rows_B,
        )


def _decode(
    policy: LanguageModel, batch: PromptBatch, law: SamplingLaw, num_completions: int, uniforms_BT: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids, log-probabilities and mask [B, T], and which rows met a stop token [B]."""
    (rows, length), device = uniforms_BT.shape, uniforms_BT.device
    stop_ids = torch.tensor(policy.stop_ids, device=device)
    ids_BT = torch.full((rows, length), policy.pad_id, device=device)
    # The dtype said, here as elsewhere: under bf16-true torch's default is bf16.
    logps_BT = torch.zeros((rows, length), dtype=torch.float32, device=device)
    mask_BT = torch.zeros((rows, length), dtype=torch.bool, device=device)
    running_B = torch.ones(rows, dtype=torch.bool, device=device)
    hidden_BH, cache = _prefill(policy, batch, num_completions)
    head = policy.head.to(compute_dtype(hidden_BH))  # cast once, not at every token
    seen_BL = batch.prompt_mask_BP.repeat_interleave(num_completions, dim=0)
    steps = 0
    for t in range(length):
        forbidden = stop_ids if t < law.min_new_tokens else None
        logps_BV = law_logps(head_logits(hidden_BH, head), law, forbidden)
        token_B = draw(logps_BV, uniforms_BT[:, t])
        ids_BT[:, t] = torch.where(running_B, token_B, policy.pad_id)
        logps_BT[:, t] = torch.where(running_B, logps_BV.gather(-1, token_B[:, None]).squeeze(-1).float(), 0.0)
        mask_BT[:, t] = running_B
        running_B = running_B & ~torch.isin(token_B, stop_ids)
        steps = t + 1
        if steps == length or not running_B.any():
            break
        seen_BL = torch.cat([seen_BL, mask_BT[:, t, None]], dim=1)
        output = policy.run_body(ids_BT[:, t, None], seen_BL, cache, use_cache=True)
        hidden_BH, cache = output.last_hidden_state[:, -1], output.past_key_values
    return ids_BT[:, :steps], logps_BT[:, :steps], mask_BT[:, :steps], ~running_B


def _prefill(policy: LanguageModel, batch: PromptBatch, num_completions: int) -> tuple[Tensor, object]:
    output = policy.run_body(batch.prompt_ids_BP, batch.prompt_mask_BP, use_cache=True)
    hidden_BH, cache = output.last_hidden_state[:, -1], output.past_key_values
    if num_completions > 1:
        cache.batch_repeat_interleave(num_completions)
        hidden_BH = hidden_BH.repeat_interleave(num_completions, dim=0)
    return hidden_BH, cache
