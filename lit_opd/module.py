"""The algorithm: sample, score, estimate, step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from lit_opd import estimators
from lit_opd.config import Config, EvaluationConfig, OptimConfig, RolloutConfig, as_section
from lit_opd.errors import UserError
from lit_opd.evaluation import Evaluation, Example, judge
from lit_opd.functional import chunk_rows, token_weights
from lit_opd.metrics import Interval
from lit_opd.models import Pair, needs_of, score_teacher, student_loss, support_size_of
from lit_opd.models.pair import Student, Teacher
from lit_opd.optim import build_optimizer, build_scheduler
from lit_opd.perf import Stopwatch, peak_memory_mb
from lit_opd.rollout import LocalEngine, RolloutEngine, micro_batches, rollout_sums, split_updates, uniforms
from lit_opd.types import PromptBatch, Rollout, SamplingLaw, TeacherScores

__all__ = ["DistillationModule", "NonFiniteStepError"]

# Sets the draws of training apart from those of evaluations (1).
TRAINING_STREAM = 0


class NonFiniteStepError(RuntimeError):
    """Loss or gradient was not finite; the optimizer has not moved."""


class ScoredRollout(NamedTuple):
    """A micro-batch with what the teacher and the verifier say of it."""

    rollout: Rollout
    scores: TeacherScores
    rewards_B: Tensor | None


class DistillationModule(L.LightningModule):
    """On-policy distillation of a student from a frozen teacher.

    One `training_step` is one rollout batch: sampled once, scored once, then `optim.updates_per_rollout` optimizer
    updates over micro-batches. Optimization is manual, because automatic accumulation averages micro-batch means,
    which is a different objective.

    Args:
        student: path or hub name, `StudentConfig`, or a causal language model in memory.
        teacher: path or hub name, `TeacherConfig`, or a causal language model in memory.
        estimator: registered name, `module:function`, `file.py:function`, or a function.
        estimator_kwargs: the estimator's keywords.
        tokenizer: the student's; needed with a model in memory.
        teacher_tokenizer: the teacher's; by default read from its path, else the student's.
        rollout: `RolloutConfig` or its keys.
        optim: `OptimConfig` or its keys.
        evaluation: `EvaluationConfig` or its keys.
        aggregation: `token_mean`, `sequence_mean` or `sequence_sum`.
        masked_tokens: tokens (strings or ids) whose positions are not counted.
        seed: of everything that is sampled in training.
        engine: samples completions; by default in this process.

    Raises:
        UserError: whatever cannot work, before weights load where that can be known.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        estimator: Any = "full_vocab",
        *,
        estimator_kwargs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        rollout: RolloutConfig | Mapping[str, Any] | None = None,
        optim: OptimConfig | Mapping[str, Any] | None = None,
        evaluation: EvaluationConfig | Mapping[str, Any] | None = None,
        aggregation: str = "token_mean",
        masked_tokens: Sequence[str | int] = (),
        seed: int = 0,
        engine: RolloutEngine | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.estimator = estimators.build(estimator, **(estimator_kwargs or {}))
        self.rollout_config = as_section(RolloutConfig, rollout, "rollout")
        self.optim_config = as_section(OptimConfig, optim, "optim")
        self.law = self._sampling_law()
        self.pair = Pair(student, teacher, tokenizer, teacher_tokenizer, support_size_of(self.estimator))
        self.student = self.pair.student
        self.model = self.student.model
        self.teacher: Any = None
        self.engine = engine or LocalEngine()
        self.aggregation, self.seed = aggregation, seed
        self.masked_ids = [_token_id(self.student.tokenizer, token) for token in masked_tokens]
        settings = as_section(EvaluationConfig, evaluation, "evaluation")
        self.evaluation = Evaluation(settings, settings.max_new_tokens or self.rollout_config.max_new_tokens)
        self.head_rows = chunk_rows(self.pair.vocabulary, self.optim_config.head_chunk_mib)
        self.results: dict[str, dict[str, Interval]] = {}
        self.examples: list[Example] = []
        self.measured_at: int | None = None
        self.judged = "student"

    @classmethod
    def from_config(cls, config: Config) -> DistillationModule:
        """The module that a configuration describes."""
        return cls(
            config.student, config.teacher, config.estimator.name, estimator_kwargs=config.estimator.kwargs,
            rollout=config.rollout, optim=config.optim, evaluation=config.evaluation, seed=config.seed,
            aggregation=config.estimator.aggregation, masked_tokens=config.estimator.masked_tokens,
        )  # fmt: skip

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        return self.student.tokenizer

    def setup(self, stage: str) -> None:
        """Load the teacher, now that the device is known, and put it there."""
        if self.trainer.precision == "16-mixed":
            raise UserError("trainer.precision", "32-true, bf16-mixed or bf16-true", "16-mixed", "Use bf16-mixed.")
        if self.teacher is None:
            self.teacher = self.pair.load_teacher()
        if not getattr(self.teacher.causal_lm, "quantization_method", None):
            self.teacher.model.to(self.device)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Sample, score, estimate, step."""
        watch = Stopwatch(self.device)
        rollout, rewards_B = self.sample(batch)
        watch.lap("rollout_s")
        updates = [self.score(rollout, rows, rewards_B) for rows in self.split(rollout)]
        watch.lap("teacher_s")
        for update in updates:
            totals = self.estimate(update)
            self.step(totals, batch)
        watch.lap("student_s")
        self.log_dict(self.report(rollout, totals, watch), prog_bar=False, batch_size=1)

    def sample(self, batch: PromptBatch) -> tuple[Rollout, Tensor | None]:
        """Completions of every prompt under the sampling law, and their rewards where the estimator wants them."""
        count, length = self.rollout_config.num_completions, self.rollout_config.max_new_tokens
        numbers_BT = uniforms((self.seed, TRAINING_STREAM), batch.draws, count, length).to(self.device)
        rollout = self.engine.sample(self.student, batch, self.law, count, numbers_BT)
        if self.masked_ids:
            masked_BT = torch.isin(rollout.completion_ids_BT, torch.tensor(self.masked_ids, device=self.device))
            rollout = rollout.uncount(masked_BT)
        wanted = "rewards" in needs_of(self.estimator)
        return rollout, judge(self.student, batch, rollout, self.verifier) if wanted else None

    def split(self, rollout: Rollout) -> list[Tensor]:
        """Row indices of each optimizer update."""
        return split_updates(len(rollout), self.optim_config.updates_per_rollout)

    def score(self, rollout: Rollout, rows: Tensor, rewards_B: Tensor | None) -> list[ScoredRollout]:
        """Micro-batches of the chosen rows, scored by the teacher before any student activation exists."""
        scored = []
        for index in micro_batches(rollout, rows, self.optim_config.micro_batch_tokens):
            micro = rollout.rows(index)
            scores = score_teacher(self.teacher, micro, self.estimator, self.head_rows)
            scored.append(ScoredRollout(micro, scores, None if rewards_B is None else rewards_B[index]))
        return scored

    def estimate(self, update: list[ScoredRollout]) -> dict[str, float]:
        """Accumulate the gradient of one update over its micro-batches; returns totals over all processes."""
        masks = [micro.rollout.mask_BT for micro in update]
        counts = self.total({"tokens": sum(m.sum() for m in masks), "sequences": sum(m.any(1).sum() for m in masks)})
        tokens, sequences = (torch.tensor(counts[name], device=self.device) for name in ("tokens", "sequences"))
        sums = {name: torch.zeros((), device=self.device) for name in ("loss", "kl", "entropy", "gap")}
        for number, (rollout, scores, rewards_B) in enumerate(update, start=1):
            weights_BT = token_weights(rollout.mask_BT, self.aggregation, tokens, sequences)
            with self.gradients_kept_local(number < len(update)):
                loss, stats = student_loss(
                    self.student,
                    rollout,
                    scores,
                    self.teacher.head,
                    self.estimator,
                    weights_BT,
                    self.head_rows,
                    rewards_B,
                )
                # DistributedDataParallel averages over processes; this loss is already a share of the global count.
                self.manual_backward(loss * self.trainer.world_size)
            sums["loss"] += loss.detach()
            sums["kl"] += stats["kl"].sum()
            sums["entropy"] -= stats["student_logps"].sum()
            sums["gap"] += (rollout.sampler_logps_BT[rollout.mask_BT] - stats["student_logps"]).sum()
        return self.total(sums) | counts

    def step(self, totals: dict[str, float], batch: PromptBatch) -> None:
        """One optimizer step; nothing moves where the loss or the gradient is not finite.

        Raises:
            NonFiniteStepError: naming the batch.
        """
        optimizer: Any = self.optimizers()
        limit = self.optim_config.clip_norm
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trainable, torch.inf if limit is None else limit)
        totals["grad_norm"] = float(norm)
        if not (math.isfinite(totals["grad_norm"]) and math.isfinite(totals["loss"])):
            optimizer.zero_grad()
            raise NonFiniteStepError(self.non_finite_message(totals, batch))
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def report(self, rollout: Rollout, totals: dict[str, float], watch: Stopwatch) -> dict[str, float]:
        """The metrics of a step, the same keys whatever the estimator; the `train` ones are of its last update."""
        sums = self.total(rollout_sums(rollout))
        tokens, rows = max(totals["tokens"], 1.0), sums.pop("rows")
        return {
            "train/loss": totals["loss"],
            "train/reverse_kl": totals["kl"] / tokens,
            "train/entropy": totals["entropy"] / tokens,
            "train/grad_norm": totals["grad_norm"],
            **{f"rollout/{name}": value / rows for name, value in sums.items()},
            "rollout/sampler_gap": totals["gap"] / tokens,
            "perf/tokens_per_s": sums["length"] / watch.total,
            **{f"perf/{phase}": seconds for phase, seconds in watch.seconds.items()},
            "perf/step_s": watch.total,
            "perf/peak_memory_mb": peak_memory_mb(self.device),
        }

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Measure the yardsticks on one batch of held-out prompts."""
        policy = self.student if self.judged == "student" else self.teacher
        self.evaluation.add(policy, self.teacher, batch, self.engine, self.verifier, self.head_rows)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log `val/*` (`teacher/*` where the teacher itself was measured), with the ends of every interval."""
        self.finish_evaluation("val" if self.judged == "student" else "teacher")

    def on_test_epoch_end(self) -> None:
        """Log `test/*`."""
        self.finish_evaluation("test")

    def finish_evaluation(self, prefix: str) -> None:
        """Log what was measured under a prefix, and keep it in `results[prefix]`."""
        results, self.examples = self.evaluation.finish()
        self.results[prefix] = results
        self.measured_at = self.global_step
        self.log_dict({f"{prefix}/{name}": interval.mean for name, interval in results.items()})
        for end in ("low", "high"):
            self.log_dict({f"{prefix}_interval/{name}_{end}": getattr(i, end) for name, i in results.items()})

    @contextmanager
    def judging_teacher(self) -> Iterator[None]:
        """Evaluations inside measure the teacher's own completions: what the student is to reach."""
        self.judged = "teacher"
        try:
            yield
        finally:
            self.judged = "student"

    def configure_optimizers(self) -> Any:
        """Any optimizer and scheduler of torch, by name."""
        optimizer = build_optimizer(self.optim_config, self.model.parameters())
        scheduler = build_scheduler(self.optim_config, optimizer)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes: frozen weights are where they came from, the random state is not."""
        frozen = {f"model.{name}" for name, p in self.model.named_parameters() if not p.requires_grad}
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in weights.items() if name not in frozen}
        checkpoint["torch_rng_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put frozen weights back, so that the checkpoint is complete again, and the random state."""
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]
        torch.set_rng_state(checkpoint["torch_rng_state"])

    @property
    def verifier(self) -> Any:
        """What judges completions: the data module's."""
        return getattr(getattr(self.trainer, "datamodule", None), "verifier", None)

    def total(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Sums over all processes, in one exchange."""
        stacked = torch.stack([torch.as_tensor(v, device=self.device).float() for v in values.values()])
        reduced = self.trainer.strategy.reduce(stacked, reduce_op="sum")
        return dict(zip(values, reduced.tolist(), strict=True))

    def gradients_kept_local(self, local: bool) -> AbstractContextManager[None]:
        """Within it, backward passes exchange no gradients between processes; the last micro-batch does it once."""
        strategy = self.trainer.strategy
        return strategy.block_backward_sync() if local and isinstance(strategy, ParallelStrategy) else nullcontext()

    def non_finite_message(self, totals: dict[str, float], batch: PromptBatch) -> str:
        """Which batch failed, and what to try."""
        prompt = self.tokenizer.decode(batch.prompt_ids_BP[0][batch.prompt_mask_BP[0]])
        return (
            f"loss {totals['loss']}, gradient norm {totals['grad_norm']} at optimizer step {self.global_step}, rollout "
            f"batch {batch.draws[0][0]} (first prompt {prompt!r}). The weights are those of before this step. "
            "Lower optim.lr, set optim.clip_norm, or bound the estimator's log-ratio."
        )

    def _sampling_law(self) -> SamplingLaw:
        rollout = self.rollout_config
        if rollout.temperature == 0:
            for _, term in self.estimator.terms:
                if term.spec.needs.startswith("token"):
                    expected = f"above 0 for {term.spec.name!r}, which learns from what it samples"
                    raise UserError("rollout.temperature", expected, 0, "Set rollout.temperature=1.")
        return SamplingLaw(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p, rollout.min_new_tokens)


def _token_id(tokenizer: Any, token: str | int) -> int:
    """The id of one token given as text or id."""
    if isinstance(token, int):
        return token
    ids = tokenizer.convert_tokens_to_ids([token])
    if ids[0] is None or ids[0] == tokenizer.unk_token_id:
        raise UserError("estimator.masked_tokens", "single tokens of the student's tokenizer", repr(token), "Give ids.")
    return int(ids[0])
