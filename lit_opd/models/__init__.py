"""Load, check and run the language models of a run: student, teacher and reference.

`Pair` checks what the user named and loads it. Scorers, rollout engines and yardsticks run what it loaded.
"""

from lit_opd.models.context import context_length
from lit_opd.models.exporting import export_adapter, export_student
from lit_opd.models.flash_proof import prove_attention
from lit_opd.models.fused_parts import prove_parts
from lit_opd.models.given import Restorable, as_models, check_taught_by, taught_by, to_saved
from lit_opd.models.language_model import LanguageModel
from lit_opd.models.loading import frozen_names, load_frozen, load_student, load_tokenizer, read_model_config
from lit_opd.models.measuring import OF_TOKENS, measure_yardsticks
from lit_opd.models.merged_stops import merged_groups, named_groups
from lit_opd.models.pair import Pair, Reference, Student, Teacher
from lit_opd.models.proofs import proofs_of, prove_model, run_by
from lit_opd.models.randomness import random_state, restore_random_state
from lit_opd.models.stops import end_of_turn, read_stop_ids
from lit_opd.models.vocabulary import shared_vocabulary, token_ids

__all__ = [
    "OF_TOKENS",
    "LanguageModel",
    "Pair",
    "Reference",
    "Restorable",
    "Student",
    "Teacher",
    "as_models",
    "check_taught_by",
    "end_of_turn",
    "export_adapter",
    "export_student",
    "frozen_names",
    "load_frozen",
    "load_student",
    "load_tokenizer",
    "measure_yardsticks",
    "merged_groups",
    "named_groups",
    "context_length",
    "proofs_of",
    "prove_attention",
    "prove_model",
    "prove_parts",
    "random_state",
    "read_model_config",
    "read_stop_ids",
    "restore_random_state",
    "run_by",
    "shared_vocabulary",
    "taught_by",
    "to_saved",
    "token_ids",
]
