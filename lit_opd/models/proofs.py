"""Prove the fast paths by which a model reads rows, and let it read by those that were taken.

`ProvenModule` asks before the first step, and the audit to tell. The verdicts are named after path and model.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lit_opd.fast_paths import Verdict
from lit_opd.models import flash_proof, fused_parts
from lit_opd.models.flash import attend_flash
from lit_opd.models.flash_proof import probe_rows, prove_attention
from lit_opd.models.forward import LlamaForward, PackedForward
from lit_opd.models.fused_parts import FUSED, prove_parts
from lit_opd.models.language_model import LanguageModel
from lit_opd.models.layer_parts import PLAIN
from lit_opd.models.packed_attention import attend

__all__ = ["prove_model", "proofs_of", "run_by"]


def proofs_of(model: LanguageModel) -> tuple[str, str]:
    """Name the proofs of a model: of its attention, and of what its layers do besides."""
    return f"{flash_proof.NAME} of the {model.key}", f"{fused_parts.NAME} of the {model.key}"


def prove_model(
    model: LanguageModel, prompt: int, completion: int, count: int, tokens: int, choice: str
) -> dict[str, Verdict]:
    """Prove both on random rows, as `prove_attention` and `prove_parts` say, and give the verdicts by their names.

    Args:
        model: which reads by what is taken from here on.
        prompt: length of a prompt.
        completion: length of a completion.
        count: completions of a prompt.
        tokens: budget of a micro-batch.
        choice: that of `fast_paths.prove`.
    """
    rows = probe_rows(model.vocabulary, prompt, completion, count, tokens)
    found = prove_attention(model, rows, choice), prove_parts(model, tokens, choice)
    return {name: replace(verdict, name=name) for name, verdict in zip(proofs_of(model), found, strict=True)}


def run_by(model: LanguageModel, taken: Collection[str]) -> None:
    """Let a model read by those of its paths whose proofs are named, and by the plain ones otherwise."""
    attention, layers = proofs_of(model)
    if isinstance(model.forward, PackedForward):
        model.forward.attend = attend_flash if attention in taken else attend
    if isinstance(model.forward, LlamaForward):
        model.forward.parts = FUSED if layers in taken else PLAIN
