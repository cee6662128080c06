"""Compute with tensors alone: log-probabilities, divergences, returns, weights and the chunked head."""

from lit_opd.functional.divergences import (
    entropy,
    forward_kl,
    jsd,
    mixed_kl,
    renormalise,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)
from lit_opd.functional.head import (
    Head,
    HiddenDistributions,
    chunk_rows,
    chunks,
    compute_dtype,
    head_logits,
    position_losses,
)
from lit_opd.functional.interpolation import interpolate_logps
from lit_opd.functional.merging import Groups, merge_ids, merge_logps
from lit_opd.functional.precision import log_softmax, upcast
from lit_opd.functional.ratios import banded_ratio, importance_ratio, one_sided_ratio, truncated_ratio
from lit_opd.functional.reductions import masked_mean, token_weights
from lit_opd.functional.returns import k_step_return, leave_one_out_mean, remaining_mean, return_to_go
from lit_opd.functional.sampling import draw, law_logps, sample_tokens
from lit_opd.functional.support import (
    MASSES,
    SUPPORT_DIVERGENCES,
    SUPPORTS,
    choose_support,
    outside_logp,
    support_divergence,
    support_mass,
)
from lit_opd.functional.weighted_divergences import WEIGHTINGS, adaptive_kl, logit_matching, todi

__all__ = [
    "MASSES",
    "SUPPORTS",
    "SUPPORT_DIVERGENCES",
    "WEIGHTINGS",
    "Groups",
    "Head",
    "HiddenDistributions",
    "adaptive_kl",
    "banded_ratio",
    "choose_support",
    "chunk_rows",
    "chunks",
    "compute_dtype",
    "draw",
    "entropy",
    "forward_kl",
    "head_logits",
    "importance_ratio",
    "interpolate_logps",
    "jsd",
    "k_step_return",
    "law_logps",
    "leave_one_out_mean",
    "log_softmax",
    "logit_matching",
    "masked_mean",
    "merge_ids",
    "merge_logps",
    "mixed_kl",
    "one_sided_ratio",
    "outside_logp",
    "position_losses",
    "remaining_mean",
    "renormalise",
    "return_to_go",
    "reverse_kl",
    "sample_tokens",
    "skew_forward_kl",
    "skew_reverse_kl",
    "support_divergence",
    "support_mass",
    "todi",
    "token_weights",
    "truncated_ratio",
    "tvd",
    "upcast",
]
