"""Describe what a run begins with: the sections of its models and its prompts.

`load_config` fills and checks them, and the rooms models, teachers and data read them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from lit_opd.config import limits
from lit_opd.config.limits import Section, above, at_least, limited, one_of, one_of_or_path, within
from lit_opd.errors import UserError, choose, suggest

__all__ = ["DataConfig", "FrozenConfig", "StudentConfig", "TeacherConfig", "check_names", "check_schedule"]

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


def _are_addresses(value: Any) -> bool:
    several = value if isinstance(value, list) else [value]
    return value is None or bool(several) and all(re.fullmatch(r"https?://[^/\s]+(/.*)?", str(one)) for one in several)


@dataclass
class TeacherConfig(FrozenConfig):
    """The frozen model to learn from."""

    path: str = ""
    """A model folder or a hub name, with the student's vocabulary. A local teacher needs one, and least_aligned."""
    temperature: float = limited(1.0, above(0))
    """Divides its logits: other than 1, the student learns another distribution than the teacher's."""
    kind: str = limited("local", one_of_or_path("local", "served", "student"))
    """Who scores: local (a model here) | served (a vLLM server) | student, or package.module:name or file.py:name."""
    prompt: str | None = limited(None, within("with {prompt} or a column in braces", lambda v: v is None or "{" in v))
    """What the teacher reads instead of the prompt: a template over the row, as data.prompt_template."""
    reads: dict[str, Any] = field(default_factory=dict)
    """Keys of data with values that are the teacher's alone: system_prompt, examples, chat_template_kwargs."""
    extra_tokens: str = limited("refuse", one_of("refuse", "mask"))
    """Tokens behind the student's last, as newer special tokens: refuse | mask (as if it could not write them)."""
    least_aligned: float | None = limited(None, within("from 0 to 1", lambda v: v is None or 0 <= v <= 1))
    """Of a teacher with another tokenizer: the least share of tokens that are its own too, or null to refuse it."""
    server: Any = limited(None, within("of http://HOST:PORT, or a list of such addresses", _are_addresses))
    """Of a served teacher: its address, as http://127.0.0.1:8000, or several, each of which scores a part."""
    model: str | None = None
    """The name under which a server serves it; null for the only one there is."""
    top_k: int = limited(20, at_least(0))
    """The most probable tokens that a server is asked for at most; 0 for none."""
    key_variable: str | None = None
    """The environment variable that holds the server's key."""
    in_flight: int = limited(32, at_least(1))
    """The most completions that a server is asked to score at once."""
    timeout_s: float = limited(60.0, above(0))
    """The longest wait for an answer of a server; a request without one is sent again."""
    patience_s: float = limited(600.0, at_least(0))
    """For how long a server that fails is asked again, in seconds, before the run ends."""
    canary_every: int = limited(50, at_least(1))
    """Rollouts after which a server scores its probe again, to see whether its weights are the same."""

    follow: str = limited("initial", one_of("initial", "ema", "every", "live", "adapter_off"))
    """The weights of a student as teacher: initial | ema (their average) | every (n-th step's) | live | adapter_off."""
    follow_rate: float = limited(0.01, within("above 0 and at most 1", lambda v: 0 < v <= 1))
    """The share of the student's weights in the moving average after a step."""
    follow_every: int = limited(10, at_least(1))
    """Optimizer steps after which `every` takes the student's weights."""

    @property
    def shown(self) -> dict[str, Any]:
        """Values for keys of `data` that render what the teacher reads, none where that is the student's prompt."""
        return ({} if self.prompt is None else {"prompt_template": self.prompt}) | self.reads

    def check(self, name: str = "") -> None:
        """Check every value, and that a teacher has what its kind needs."""
        super().check(name)
        needed = {"local": "path", "served": "server"}.get(self.kind)
        if needed and not getattr(self, needed):
            remedy = f"Set {name}.{needed} in a config file or as {name}.{needed}=VALUE."
            raise UserError(f"{name}.{needed}", "a value", "nothing", remedy)
        if self.least_aligned is not None and self.kind == "student":
            expected = "null: the student's tokenizer is its own"
            raise UserError(f"{name}.least_aligned", expected, self.least_aligned, "Drop it.")
        if self.least_aligned is not None and not self.path:
            expected = "a folder with the teacher's tokenizer, for teacher.least_aligned"
            raise UserError(f"{name}.path", expected, "nothing", "Name it, or drop teacher.least_aligned.")
        for key in self.reads:
            choose(f"{name}.reads.{key}", str(key), ("system_prompt", "examples", "chat_template_kwargs"))
        if self.kind == "student" and not self.shown and self.temperature == 1:
            expected = "a template, for a student that is its own teacher knows no more unless it reads more"
            raise UserError(f"{name}.prompt", expected, "null", f"Set it, as {name}.prompt='HINT {{prompt}}'.")
        if self.path and (self.kind == "student" or self.kind == "served" and self.least_aligned is None):
            expected = f"nothing for teacher.kind={self.kind}, which reads no folder"
            raise UserError(f"{name}.path", expected, self.path, f"Drop it, or {name}.kind.")
        if self.server and self.kind == "local":
            expected = "served for a teacher with a server"
            raise UserError(f"{name}.kind", expected, "local", f"Set {name}.kind=served, or drop {name}.server.")
        if self.kind == "served" and self.temperature != 1:
            expected = "1 for a served teacher, whose log-probabilities cannot be normalised again"
            raise UserError(f"{name}.temperature", expected, self.temperature, f"Drop it, or use {name}.kind=local.")


def check_names(teachers: Mapping[str, Any]) -> None:
    """Refuse names of teachers that are no part of a key or of a metric, and a student that teaches twice.

    Raises:
        UserError: such a name, or several teachers of kind `student`.
    """
    for name in teachers:
        if not re.fullmatch(r"[A-Za-z_][\w-]*", str(name)):
            expected = "names of letters, digits, - and _"
            raise UserError("teachers", expected, repr(name), "Rename it, in data.teacher_column too.")
    own = [name for name, teacher in teachers.items() if getattr(teacher, "kind", None) == "student"]
    if len(own) > 1:
        expected, remedy = "one teacher of kind student at most", "Let data columns fill one template for all rows."
        raise UserError(f"teachers.{own[1]}.kind", expected, f"another, {own[0]}", remedy)


def check_schedule(schedule: Mapping[str, Any], teachers: Sequence[str]) -> None:
    """Refuse a schedule of weights that names no teacher, or gives another thing than two factors.

    Raises:
        UserError: such a name, or such a value.
    """
    for name, factors in schedule.items():
        key = f"teachers_schedule.{name}"
        if name not in teachers:
            expected = f"one of the teachers {', '.join(teachers)}" if teachers else "several teachers"
            raise UserError("teachers_schedule", expected, repr(name), suggest(str(name), teachers))
        if not isinstance(factors, Sequence) or len(factors) != 2:
            expected = "[FACTOR, FACTOR], of its weights before training and at its end"
            raise UserError(key, expected, repr(factors), f"Write e.g. {key}=[1,0].")
        for number, factor in enumerate(factors):
            limits.as_type(f"{key}[{number}]", factor, float)
            at_least(0)(f"{key}[{number}]", factor)


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
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables of the chat template, of the teacher's prompt too, as {enable_thinking: false} for Qwen3."""
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
    teacher_column: str | None = None
    """Of several teachers, a row's: a column with a name or weights by name, or a function (row) that returns one."""
    batch_size: int = limited(8, at_least(1))
    """Prompts a step, over all processes."""
    verifier: str | None = None
    """Judges a completion from 0 to 1: exact | last_number | math | reasoning_gym, or a function (completion, row)."""
    verifier_seconds: float | None = limited(60.0, above(0, null="no limit"))
    """The longest that the verifier may take for a completion, in the main thread, or null for no limit."""
    on_verifier_error: str = limited("stop", one_of("stop", "zero"))
    """Where the verifier raises, takes too long or gives no number from 0 to 1: stop | zero (reward 0, counted)."""
