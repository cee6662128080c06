"""Describe what a run begins with: the sections of its models and its prompts.

`load_config` fills and checks them, and the rooms models, teachers and data read them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from lit_opd.config import limits
from lit_opd.config.limits import Section, above, at_least, limited, one_of, one_of_or_path, within
from lit_opd.errors import UserError

__all__ = ["DataConfig", "FrozenConfig", "StudentConfig", "TeacherConfig"]

DTYPE = one_of("float32", "bfloat16", "float16", "float64")


@dataclass
class StudentConfig(Section):
    """The model that learns."""

    path: str = MISSING
    """A model folder or a hub name, where `${lit_opd:NAME}` is a path inside the package."""
    dtype: str = limited("float32", DTYPE)
    """Of the weights that train: float32 | bfloat16 | float16 | float64."""
    gguf_file: str | None = None
    """A GGUF file in the folder, to read the weights from."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model's folder."""
    gradient_checkpointing: bool = False
    """Compute activations twice, to hold fewer of them."""
    dropout: str = limited("none", one_of("none", "keep"))
    """none | keep: in training, as the model's configuration says. The sampler never has any."""
    lora: dict[str, Any] | None = None
    """Keywords of peft.LoraConfig, to train adapters only, or null to train all weights."""


@dataclass
class FrozenConfig(Section):
    """A frozen model, or, as a reference without a path, the student before training."""

    path: str | None = None
    """A model folder or a hub name."""
    dtype: str = limited("bfloat16", DTYPE)
    """Of its weights: float32 | bfloat16 | float16 | float64."""
    gguf_file: str | None = None
    """A GGUF file in the folder, to read the weights from."""
    trust_remote_code: bool = False
    """Run Python code that lies in the model's folder."""
    quantization: str = limited("none", one_of("none", "8bit", "4bit"))
    """none | 8bit | 4bit, by bitsandbytes."""
    offload: bool = False
    """Keep its weights, but for the output layer, off the accelerator while it neither scores nor samples."""

    def check(self, name: str = "") -> None:
        """Check every value, and that a quantised model is not offloaded too."""
        super().check(name)
        if self.offload and self.quantization != "none":
            expected = "false for a quantised model, whose weights stay where they were loaded"
            raise UserError(f"{name}.offload", expected, True, f"Drop it, or {name}.quantization.")


@dataclass
class TeacherConfig(FrozenConfig):
    """The frozen model to learn from."""

    path: str = ""
    """A model folder or a hub name, with the student's vocabulary. Only a local teacher needs one."""
    temperature: float = limited(1.0, above(0))
    """Divides its logits: other than 1, the student learns another distribution than the teacher's."""
    kind: str = limited("local", one_of_or_path("local"))
    """Who scores: local (a model in this process), or package.module:name or file.py:name of a scorer."""

    def check(self, name: str = "") -> None:
        """Check every value, and that a local teacher has a path."""
        super().check(name)
        if self.kind == "local" and not self.path:
            raise UserError(
                f"{name}.path", "a value", "nothing", f"Set {name}.path in a config file or as {name}.path=VALUE."
            )


@dataclass
class DataConfig(Section):
    """The prompts, where they come from, and how an answer is judged."""

    source: str = limited("file", one_of("file", "hub", "reasoning_gym", "function"))
    """file | hub | reasoning_gym | function."""
    path: str | None = None
    """What the source reads: a file, a data set, a task, or package.module:function or file.py:function."""
    validation_path: str | None = None
    """A file of validation prompts, or null to hold some of the others out."""
    split: str = "train"
    """Of a data set on the hub."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keywords of the source."""
    prompt_column: str = "prompt"
    """The column that holds the prompt."""
    answer_column: str | None = "answer"
    """The column that holds the right answer, or a demonstration."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template."""
    system_prompt: str | None = limited(
        None, within("other than the word None: nothing is null", lambda v: v != "None")
    )
    """The system message of a chat."""
    examples: list[dict[str, str]] = field(default_factory=list)
    """Worked turns of a chat, before the prompt: a list of {user: ..., assistant: ...}."""
    prompt_template: str = limited("{prompt}", within("with {prompt} or a column in braces", lambda v: "{" in v))
    """The text around a prompt, in which braces may also name other columns."""
    train_size: int | None = limited(None, at_least(1, null="all"))
    """Prompts to train on, or null for all."""
    validation_size: int = limited(256, at_least(1))
    """Held-out prompts, never trained on."""
    validation_seed: int = limited(0, limits.seed)
    """Of which prompts are held out."""
    max_prompt_tokens: int = limited(512, at_least(1))
    """The longest prompt."""
    overlong: str = limited("drop", one_of("drop", "truncate", "error"))
    """What happens to longer prompts: drop | truncate (their end stays) | error."""
    last_assistant_turn: str = limited("refuse", one_of("refuse", "drop", "continue"))
    """What happens to conversations that end with the assistant: refuse | drop (its turn) | continue (its turn)."""
    batch_size: int = limited(8, at_least(1))
    """Prompts a step, over all processes."""
    verifier: str | None = None
    """Judges a completion from 0 to 1: exact | last_number | math | reasoning_gym, or a function (completion, row)."""
    verifier_seconds: float | None = limited(60.0, above(0, null="no limit"))
    """The longest that the verifier may take for a completion, in the main thread, or null for no limit."""
    on_verifier_error: str = limited("stop", one_of("stop", "zero"))
    """Where the verifier raises, takes too long or gives no number from 0 to 1: stop | zero (reward 0, counted)."""
