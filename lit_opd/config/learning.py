"""Describe how a run learns: the sections of sampling, the objective and the optimizer's step.

`load_config` fills and checks them. The module takes them, or mappings of their keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lit_opd.config.limits import (
    Section,
    above,
    as_type,
    at_least,
    auto_or_at_least,
    limited,
    one_of,
    one_of_or_path,
    within,
)
from lit_opd.errors import UserError

__all__ = ["EstimatorConfig", "OptimConfig", "RolloutConfig"]


def groups_of_tokens(key: str, value: Any) -> None:
    """Ask for null, `auto`, or lists of at least two tokens each."""
    if value is None or value == "auto":
        return
    groups = value if isinstance(value, list | tuple) else [None]
    if not all(isinstance(group, list | tuple) and len(group) > 1 for group in groups):
        remedy = f"Set {key}=auto, or as {key}=[[2, 21]]."
        raise UserError(key, "null, auto, or a list of groups of at least two tokens", repr(value), remedy)
    as_type(key, value, list[list[int | str]])


@dataclass
class RolloutConfig(Section):
    """The completions to train on, and how they are made."""

    engine: str = limited("local", one_of_or_path("local", "vllm"))
    """Who samples: local (this process) | vllm (a server), or package.module:name or file.py:name of an engine."""
    server: str | None = None
    """The address of the vLLM server, as http://127.0.0.1:8000."""
    capture: str = limited("auto", one_of("auto", "off"))
    """Sample by replaying a captured graph of a token's work, where device and model allow: auto | off."""
    num_completions: int = limited(1, at_least(1))
    """Completions a prompt."""
    max_new_tokens: int = limited(64, at_least(1))
    """The longest completion, in tokens."""
    min_new_tokens: int = limited(0, at_least(0))
    """The shortest: until then, tokens that end a completion are not sampled."""
    temperature: float = limited(1.0, at_least(0))
    """Divides the student's logits. 1, with top_p 1, top_k 0 and min_p 0, samples from the student itself."""
    top_p: float = limited(1.0, within("in (0, 1]", lambda v: 0 < v <= 1))
    """Sample from the most probable tokens that hold this much probability together."""
    top_k: int = limited(0, at_least(0, " (0 keeps all tokens)"))
    """Sample from this many most probable tokens, or 0 for all."""
    min_p: float = limited(0.0, within("in [0, 1)", lambda v: 0 <= v < 1))
    """Sample from tokens at least this probable, as a share of the most probable one."""
    student_share: float = limited(1.0, within("in [0, 1]", lambda v: 0 <= v <= 1))
    """The share of prompts that the student completes, where the others get demonstrations."""
    student_from: int = limited(0, at_least(0))
    """The rollout, counted from 0, from which the student writes. Before it every prompt gets a demonstration."""
    demonstrations: str = limited("teacher", one_of("teacher", "data"))
    """Who writes demonstrations: teacher | data (data.answer_column)."""

    @property
    def demonstrated(self) -> bool:
        """Tell whether some completions are demonstrations."""
        return self.student_share < 1 or self.student_from > 0

    def check(self, name: str = "") -> None:
        """Check every value, and those that have to agree."""
        super().check(name)
        if self.min_new_tokens > self.max_new_tokens:
            expected, found = f"at most {name}.max_new_tokens ({self.max_new_tokens})", self.min_new_tokens
            raise UserError(f"{name}.min_new_tokens", expected, found, f"Lower it or raise {name}.max_new_tokens.")
        if self.engine == "vllm":
            self._check_served(name)

    def _check_served(self, name: str) -> None:
        """Check that there is a server, and that vLLM has the law."""
        engine = f"with {name}.engine=vllm"
        if not (self.server or "").startswith(("http://", "https://")):
            found = "nothing" if self.server is None else repr(self.server)
            remedy = f"Set {name}.server=http://127.0.0.1:8000; how to start one: lit_opd/rollout/vllm.py."
            raise UserError(f"{name}.server", f"the address of a vLLM server {engine}", found, remedy)
        if self.temperature != 0 and not 0.01 <= self.temperature <= 2:
            remedy = f"Set {name}.temperature=1, or {name}.engine=local."
            raise UserError(f"{name}.temperature", f"0, or from 0.01 to 2, {engine}", self.temperature, remedy)
        if self.min_p > 0 and self.top_p < 1:  # vLLM cuts min_p first, and this library last: two laws
            remedy = f"Set one of the two, or {name}.engine=local."
            raise UserError(f"{name}.min_p", f"0 where {name}.top_p cuts, {engine}", self.min_p, remedy)


@dataclass
class EstimatorConfig(Section):
    """The objective."""

    name: str = "full_vocab"
    """A registered estimator (`python -m lit_opd estimators`), package.module:function or file.py:function."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Its keywords. Another estimator begins with its own defaults."""
    terms: list[Any] = field(default_factory=list)
    """Instead of a name, a weighted sum: a list of {name, weight, kwargs, weighting: {name, kwargs}}."""
    masked_tokens: list[int | str] = field(default_factory=list)
    """Tokens, as text or ids, whose positions are not counted."""
    merged_stops: Any = limited(None, groups_of_tokens)
    """Endings that mean the same and count as one: null | auto (both models' stop tokens) | [[texts or ids], ...]."""
    aggregation: str = limited("token_mean", one_of("token_mean", "sequence_mean", "sequence_sum"))
    """token_mean | sequence_mean | sequence_sum, over all that is counted in an optimizer step."""


@dataclass
class OptimConfig(Section):
    """The optimizer's step."""

    name: str = "AdamW"
    """Any of torch.optim (Muon: hidden matrices, the rest by AdamW), AdamW8bit, StochasticAdamW, or a path of one."""
    lr: float = limited(1e-5, above(0))
    """The learning rate after warm-up."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further keywords of the optimizer, of Muon also adamw: {...}. Another one begins with its own defaults."""
    scheduler: str | None = None
    """Any scheduler of torch.optim.lr_scheduler, or package.module:name or file.py:name of one, or null."""
    scheduler_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keywords of the scheduler. Another one begins with its own defaults."""
    warmup_steps: int = limited(0, at_least(0))
    """Linear warm-up, in optimizer steps."""
    clip_norm: float | None = limited(1.0, above(0, null="no clipping"))
    """The largest gradient norm, or null."""
    updates_per_rollout: int = limited(1, at_least(1))
    """Optimizer steps on the completions of one batch. From the second on they are not the present student's."""
    micro_batch_tokens: int = limited(8192, at_least(1))
    """Rows x longest length of a micro-batch, in tokens."""
    head_chunk_mib: Any = limited("auto", auto_or_at_least(1))
    """Memory for the logits of one chunk, in MiB, or auto: 256 on a CPU, a share of what an accelerator has free."""
    tf32: bool = False
    """Let an accelerator multiply float32 values in TF32, which keeps 10 of their 23 bits: true | false."""
    paths: str = limited("auto", one_of("auto", "plain", "fast"))
    """Fast paths on an accelerator: auto (those that prove themselves before the first step) | plain | fast (all)."""
