"""Pure maths: tensors in, tensors out, torch only."""

from lit_opd.functional.divergences import entropy, forward_kl, jsd, renormalise, reverse_kl
from lit_opd.functional.head import Head, chunk_rows, chunks, head_logits, position_losses
from lit_opd.functional.precision import log_softmax, upcast
from lit_opd.functional.reductions import masked_mean, token_weights
from lit_opd.functional.returns import return_to_go
from lit_opd.functional.sampling import draw, law_logps

__all__ = [
    "Head",
    "chunk_rows",
    "chunks",
    "draw",
    "entropy",
    "forward_kl",
    "head_logits",
    "jsd",
    "law_logps",
    "log_softmax",
    "masked_mean",
    "position_losses",
    "renormalise",
    "return_to_go",
    "reverse_kl",
    "token_weights",
    "upcast",
]
