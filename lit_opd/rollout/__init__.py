"""Get completions to train on or to evaluate, and cut them into updates and micro-batches.

A source completes prompts, most often by an engine that samples from a model. `Distiller` and `evaluate` ask for
rollouts.
"""

from lit_opd.rollout.batching import (
    EVALUATION_STREAM,
    TRAINING_STREAM,
    check_batch,
    micro_batches,
    split_updates,
    uniforms,
)
from lit_opd.rollout.engine import RolloutEngine, build_engine
from lit_opd.rollout.judging import Verifier, completion_texts, failed, judge
from lit_opd.rollout.law import training_law
from lit_opd.rollout.local import LocalEngine
from lit_opd.rollout.proof import check_gap, gap_sums
from lit_opd.rollout.sources import Mixed, RolloutSource, Sampled, Written, build_source
from lit_opd.rollout.statistics import rollout_sums
from lit_opd.rollout.transcripts import Transcript, as_jsonl, transcribe
from lit_opd.rollout.vllm import VllmEngine

__all__ = [
    "EVALUATION_STREAM",
    "TRAINING_STREAM",
    "LocalEngine",
    "Mixed",
    "RolloutEngine",
    "RolloutSource",
    "Sampled",
    "Transcript",
    "Verifier",
    "VllmEngine",
    "Written",
    "as_jsonl",
    "build_engine",
    "build_source",
    "check_batch",
    "check_gap",
    "completion_texts",
    "gap_sums",
    "failed",
    "judge",
    "micro_batches",
    "rollout_sums",
    "split_updates",
    "training_law",
    "transcribe",
    "uniforms",
]
