"""Look at what goes wrong between two models as far as their tokenizers and configurations tell.

None of it needs weights: `prepare_data` warns of it before every run, and `lab.audit` lists it among its findings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from os.path import commonprefix  # of any sequences
from typing import Any

import torch

from lit_opd.config import Config, DataConfig, TeacherConfig
from lit_opd.data import render
from lit_opd.errors import UserError
from lit_opd.models import end_of_turn, load_tokenizer, read_model_config, read_stop_ids
from lit_opd.runs.verdicts import FAIL, PASS, WARN, Finding, conclude

__all__ = [
    "AS_ONE", "chat_template", "equivalence", "first_look", "local_teachers", "router_loss", "small_steps", "spell",
    "stop_tokens",
]  # fmt: skip

_CONVERSATION = [
    {"role": "user", "content": "How much is 2 + 3?"},
    {"role": "assistant", "content": "2 + 3 = 5"},
    {"role": "user", "content": "And 4 more?"},
]
_WEIGHT = 0.02  # the standard deviation that most models are initialised with
AS_ONE = "Or let it keep its own: estimator.merged_stops=auto counts both as one in the loss. "
_ALIKE = "Choose a teacher of the student's family, or train the student on the teacher's format first."


def first_look(config: Config, student: Any) -> dict[str, Finding]:
    """Check what the student's tokenizer, the teacher's and configurations tell, item by item."""
    model_config = read_model_config(config.student, "student")
    own = read_stop_ids(config.student, student, model_config)
    turn = end_of_turn(student) if config.data.chat else None
    looks = {"router's loss": router_loss(model_config), "small steps": small_steps(config)}
    other: set[int] = set()
    alike = {key: one for key, one in local_teachers(config).items() if one.least_aligned is None}
    for key, section in alike.items():
        teacher, name = load_tokenizer(section, key), key.partition(".")[2]
        other |= set(read_stop_ids(section, teacher, read_model_config(section, key)))
        looks[f"chat template {name}".strip()] = chat_template(student, teacher, config.data)
    merged = config.estimator.merged_stops is not None
    return looks | {"stop tokens": stop_tokens(student, own, other if alike else own, turn, merged)}


def local_teachers(config: Config) -> dict[str, TeacherConfig]:
    """List the sections of teachers that are read from a folder, by their keys."""
    several = {f"teachers.{name}": section for name, section in config.teachers.items()}
    return {key: one for key, one in (several or {"teacher": config.teacher}).items() if one.kind == "local"}


def chat_template(student: Any, teacher: Any, data: DataConfig) -> Finding:
    """Check that both tokenizers render a conversation alike, to the same ids."""
    if not data.chat:
        return conclude(PASS, "not used (data.chat=false)")
    own = render({data.prompt_column: _CONVERSATION}, data, student)
    try:
        other = render({data.prompt_column: _CONVERSATION}, data, teacher)
    except UserError:
        found = "the teacher's tokenizer has none that takes a conversation, and the teacher reads the student's"
        return conclude(WARN, found, "Choose a teacher that was trained on conversations.")
    if own != other:
        at = len(commonprefix([own, other]))
        found = (f"a conversation differs from character {at}: the student reads {own[at : at + 20]!r}, the teacher "
                 f"expects {other[at : at + 20]!r}")  # fmt: skip
        return conclude(WARN, found, f"The teacher reads the student's rendering. {_ALIKE}")
    if spell(student, own) != spell(teacher, own):
        return conclude(WARN, "a conversation is rendered alike, but to other ids", _ALIKE)
    return conclude(PASS, "a conversation is rendered alike, to the same ids")


def stop_tokens(
    tokenizer: Any, own: Collection[int], other: Collection[int], turn: int | None, merged: bool = False
) -> Finding:
    """Check that what ends the teacher's completions, and a turn of the chat, ends the student's.

    The tokens are the student's own, the teacher's (other), and the one with which the student's chat template ends a
    turn, if there is one. The tokenizer is the student's. Endings may be `merged` in the loss.
    """

    def names(ids: Collection[int]) -> str:
        return ", ".join(repr(tokenizer.convert_ids_to_tokens(index)) for index in sorted(ids)) or "none"

    if not own:
        fix = "Name one as eos_token_id in the student's generation_config.json."
        return conclude(FAIL, "the student has none, and never ends", fix)
    if turn is not None and turn not in own:
        found = f"{names(own)} for the student, whose chat template ends a turn with {names([turn])}"
        return conclude(WARN, found, equivalence(names, own, [turn]))
    if set(own) == set(other):
        return conclude(PASS, f"{names(own)} for both")
    found = f"{names(own)} for the student, {names(other)} for the teacher"
    if set(other) <= set(own):
        return conclude(PASS, f"{found}: the student's include them")
    if merged:
        return conclude(PASS, f"{found}: the loss merges endings (estimator.merged_stops)")
    return conclude(WARN, found, equivalence(names, own, sorted(set(other) - set(own)), AS_ONE))


def router_loss(model_config: Any) -> Finding:
    """Tell where a mixture of experts asks for a loss of its own, which is no part of any objective here."""
    asked = model_config.get_text_config()
    if not getattr(asked, "output_router_logits", False):
        return conclude(PASS, "none is asked for")
    names = {name: value for name, value in asked.to_dict().items() if "loss_coef" in name and value}
    terms = ", ".join(f"{name}={value}" for name, value in names.items()) or "its usual coefficient"
    found = f"the student's config.json asks for the router's auxiliary loss ({terms}), which is left out"
    fix = "Set output_router_logits to false there, and watch that the experts stay balanced."
    return conclude(WARN, found, fix)


def small_steps(config: Config) -> Finding:
    """Tell where a step of the learning rate is lost when a weight of usual size is rounded."""
    whole = str(config.trainer.get("precision", "")) in ("bf16-true", "bf16")
    # peft keeps adapters in fp32, as long as the trainer does not convert them.
    dtype = "bfloat16" if whole else config.student.dtype if config.student.lora is None else "float32"
    kept = _WEIGHT * torch.finfo(getattr(torch, dtype)).eps / 2
    found = f"a weight of {_WEIGHT} in {dtype} moves by {kept:.0e} or not at all, and optim.lr is {config.optim.lr:g}"
    fix = ("Keep the weights in float32 (student.dtype=float32, trainer.precision=bf16-mixed), set "
           "optim.name=StochasticAdamW, or raise optim.lr.")  # fmt: skip
    lost = config.optim.lr < kept and config.optim.name != "StochasticAdamW"
    return conclude(WARN if lost else PASS, found, fix)


def equivalence(
    names: Callable[[Collection[int]], str], own: Collection[int], ids: Sequence[int], otherwise: str = ""
) -> str:
    """Say how to let these stop tokens end the student's completions too, and what to do otherwise."""
    named = ", ".join(f"{index} ({names([index])})" for index in ids)
    return (f"Let either ending stop the student: add {named} to eos_token_id in its generation_config.json, as "
            f"{[*own, *ids]}. {otherwise}Do not mask a stop token: nothing would teach it to stop.")  # fmt: skip


def spell(tokenizer: Any, text: str) -> list[int]:
    """Encode a text as it stands."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
