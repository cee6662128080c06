"""Run the algorithm under Lightning: sample, score, estimate, step.

Why here: a Lightning module brings devices, precision, processes, checkpoints and callbacks to the `Distiller`'s step.
`runs` makes one of a configuration, and a user's own script makes one of two models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lit_opd import estimators, linter, models
from lit_opd.config import (
    Config,
    DiagnosticsConfig,
    EstimatorConfig,
    EvaluationConfig,
    LintConfig,
    OptimConfig,
    RolloutConfig,
    as_section,
)
from lit_opd.config.limits import seed as check_seed
from lit_opd.data.schedule import check_run, read_schedule, scheduled
from lit_opd.distiller import Distiller
from lit_opd.errors import UserError
from lit_opd.evaluation import EvaluatedModule, tell_left_out
from lit_opd.functional import chunk_rows, upcast
from lit_opd.measures.ledger import teacher_report, teacher_sums
from lit_opd.measures.steps import Seen, not_finite, step_report, token_sums
from lit_opd.optim import NonFiniteStepError, build_optimizer, build_scheduler, outer_matrices, play_schedule
from lit_opd.perf import Stopwatch, peak_memory_mb, phase
from lit_opd.proving import ProvenModule
from lit_opd.rollout import (
    RolloutEngine,
    Verifier,
    build_engine,
    build_source,
    rollout_sums,
    split_updates,
    training_law,
)
from lit_opd.teachers import LocalScorer, Scorer, build_scorers, check_gives, in_process, own_scorer, templates
from lit_opd.types import Need, PromptBatch, ScoredRollout

__all__ = ["DistillationModule", "NonFiniteStepError"]


class DistillationModule(models.Restorable, ProvenModule, EvaluatedModule):  # type: ignore[misc]
    """On-policy distillation of a student from a frozen teacher.

    One `training_step` is one rollout batch: sampled once, scored once, then `optim.updates_per_rollout` optimizer
    updates over micro-batches. Optimization is manual, because automatic accumulation averages micro-batch means,
    which is a different objective.

    Args:
        student: path or hub name, `StudentConfig` or its keys, or a causal language model in memory.
        teacher: path or hub name, `TeacherConfig` or its keys, a causal language model, or any other `Scorer`.
        teachers: several of these by name, instead; `teachers_combined` and `teachers_schedule` as configured.
        estimator: registered name, `module:function`, `file.py:function`, a function, or `EstimatorConfig`.
        estimator_kwargs: the estimator's keywords.
        tokenizer: the student's; needed with a model in memory.
        teacher_tokenizer: the teacher's; by default read from its path, else the student's.
        reference: as the teacher, for an estimator that asks for one; by default the student before training.
        rollout: section of the configuration, or its keys; so are `optim`, `evaluation`, `lint` and `diagnostics`.
        aggregation: `token_mean`, `sequence_mean` or `sequence_sum`.
        masked_tokens: tokens (strings or ids) whose positions are not counted.
        merged_stops: `auto`, or groups of tokens (strings or ids) that the loss counts as one symbol each.
        seed: of everything that is sampled in training.
        engine: samples completions; by default in this process.

    Raises:
        UserError: whatever cannot work, before weights load where that can be known.
    """

    def __init__(
        self,
        student: models.Student,
        teacher: models.Teacher | Scorer | None = None,
        estimator: Any = "full_vocab",
        *,
        estimator_kwargs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        reference: models.Reference = None,
        rollout: RolloutConfig | Mapping[str, Any] | None = None,
        optim: OptimConfig | Mapping[str, Any] | None = None,
        evaluation: EvaluationConfig | Mapping[str, Any] | None = None,
        aggregation: str = "token_mean",
        masked_tokens: Sequence[str | int] = (),
        merged_stops: Any = None,
        seed: int = 0,
        engine: RolloutEngine | None = None,
        lint: LintConfig | Mapping[str, Any] | None = None,
        diagnostics: DiagnosticsConfig | Mapping[str, Any] | None = None,
        teachers: Mapping[str, Any] | None = None,
        teachers_combined: str = "mixture",
        teachers_schedule: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.given = models.to_saved(locals())
        tokenizers = {"tokenizer": tokenizer, "teacher_tokenizer": teacher_tokenizer}
        student, teacher, reference = models.as_models(student, teacher, reference, Scorer, teachers, **tokenizers)
        self.estimator = estimators.build_given(estimator, estimator_kwargs)
        self.rollout_config = as_section(RolloutConfig, rollout, "rollout")
        self.optim_config = as_section(OptimConfig, optim, "optim")
        settings = as_section(EvaluationConfig, evaluation, "evaluation")
        support_size = as_section(DiagnosticsConfig, diagnostics, "diagnostics").support_size
        given = {"aggregation": aggregation, "masked_tokens": masked_tokens, "merged_stops": merged_stops}
        counted = as_section(EstimatorConfig, EstimatorConfig(**given), "estimator")
        check_seed("seed", seed)
        self.law = training_law(self.rollout_config, self.estimator)
        self.engine = build_engine(self.rollout_config, engine)
        allow = as_section(LintConfig, lint, "lint").allow
        checked = (self.estimator, self.rollout_config, self.optim_config, student, teacher)
        linter.check(*checked, masked_tokens=counted.masked_tokens, tokenizer=tokenizer, allow=allow)
        self.teachers, self.schedule = [*(teachers or {})], read_schedule(teachers_schedule or {}, teachers or {})
        self.taught_by = models.taught_by(teacher, teachers_combined, self.schedule)
        self.scorer = own_scorer(teacher, student, tokenizer, teachers_combined)
        if self.scorer is not None:
            check_gives(self.scorer, self.estimator, self.rollout_config, merges=merged_stops is not None)
            tell_left_out(self.scorer, settings)
        # Before any weights load: it imports the user's own yardsticks, which may be misspelt.
        self.begin_evaluations(settings, self.rollout_config.max_new_tokens, support_size)
        local = in_process(teacher, self.scorer)
        self.pair = models.Pair(student, local, self.estimator, reference=reference, **tokenizers)
        self.student, self.model = self.pair.student, self.pair.student.model
        self.teacher = self.distiller = None
        self.aggregation, self.seed, self.shown = aggregation, seed, templates(teacher)
        self.masked_ids = models.token_ids(self.student.tokenizer, counted.masked_tokens, "estimator.masked_tokens")
        self.merged = models.merged_groups(counted.merged_stops, self.pair, self.masked_ids, self.teachers)
        if self.pair.followed is not None:
            self.pair.followed.check_updates(self.optim_config.updates_per_rollout)
        self.seen, self.verdicts = list[Seen](), {}

    @classmethod
    def from_config(cls, config: Config) -> DistillationModule:
        """Make the module that a configuration describes."""
        return cls(
            config.student, None if config.teachers else config.teacher, config.estimator, reference=config.reference,
            rollout=config.rollout, optim=config.optim, evaluation=config.evaluation, lint=config.lint,
            aggregation=config.estimator.aggregation, masked_tokens=config.estimator.masked_tokens,
            merged_stops=config.estimator.merged_stops, diagnostics=config.diagnostics, teachers=config.teachers,
            teachers_combined=config.teachers_combined, teachers_schedule=config.teachers_schedule, seed=config.seed,
        )  # fmt: skip

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        return self.student.tokenizer

    def setup(self, stage: str) -> None:
        """Load teacher and reference, now that the device is known."""
        if self.trainer.precision.startswith("16"):  # manual optimization has no gradient scaler, and fp16 needs one
            expected = "32-true, bf16-mixed or bf16-true"
            raise UserError("trainer.precision", expected, self.trainer.precision, "Use bf16-mixed.")
        if stage == "fit" and Need.REWARDS in self.estimator.needs and self.verifier is None:
            expected, found = f"one, for {self.estimator.spec.name!r} learns from rewards", "none"
            raise UserError("data.verifier", expected, found, "Set data.verifier=package.module:function.")
        check_run(self.schedule, self.trainer, stage)
        self.distiller = self.assemble(self.verifier, with_reference=stage == "fit")

    def assemble(self, verifier: Verifier | None, with_reference: bool = True) -> Distiller:
        """Load the frozen models, now that the device is known, and put the parts of a step together.

        The reference is loaded `with_reference`, where the estimator asks for one.
        """
        rows = chunk_rows(self.pair.vocabulary, self.optim_config.head_chunk_mib, self.device)
        asking = self.estimator if with_reference else estimators.build("token")
        scorers = build_scorers(self.pair, self.scorer, asking, rows, self.device)
        # Only a model in this process can sample too.
        self.teacher = scorers["teacher"].model if isinstance(scorers["teacher"], LocalScorer) else None
        sampling = (self.rollout_config, self.law, self.seed, self.engine)
        source = build_source(*sampling, self.student, self.teacher, self.demonstrations)
        return Distiller(
            self.student, self.estimator, source, scorers, rows, self.optim_config.micro_batch_tokens,
            self.aggregation, self.masked_ids, self.merged, verifier,
        )  # fmt: skip

    def on_train_start(self) -> None:
        """Forget the batch that Lightning counts as begun and that was never made.

        After resuming from a checkpoint of an interrupted step, Lightning goes on to count it as begun. The checkpoint
        after the next batch then looks interrupted too, and what resumes from it is one batch off. A whole batch (begun
        and processed) must stay, for Lightning completes it itself.
        """
        batches: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        if batches.ready > batches.processed:
            batches.reset_on_restart()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Sample, score, estimate and step."""
        watch = Stopwatch(self.device)
        rollout = self.distiller.sample(scheduled(batch, self.schedule, self.progress))
        self.prove(rollout)
        watch.lap("rollout_s")
        parts = self.split(batch)
        updates = self.with_way_back(lambda: [self.distiller.score(rollout, rows, self.progress) for rows in parts])
        self.prove_head(updates)
        watch.lap("teacher_s")
        for update in updates:
            totals = self.with_way_back(partial(self.estimate, update))
            self.distiller.scorers["teacher"].check_update(totals, self.global_step)
            self.step(totals, batch)
        watch.lap("student_s")
        sums = self.total(rollout_sums(rollout, self.verifier))
        report = step_report(totals, sums, watch.seconds, peak_memory_mb(self.device))
        report |= teacher_report(totals, self.teachers) | {"perf/paths": float(len(self.taken))}
        self.log_dict(self.at_step(report), batch_size=1)

    def split(self, batch: PromptBatch) -> list[Tensor]:
        """Divide the rows of the rollout among the optimizer updates."""
        prompts = int(self.total({"prompts": len(batch.rows)})["prompts"])
        completions, updates = self.rollout_config.num_completions, self.optim_config.updates_per_rollout
        return split_updates(batch.places, completions, updates, prompts, self.distiller.whole_prompts)

    @property
    def progress(self) -> float:
        """The share of training that is done, 0 to 1, or 0 where nothing tells how long it will be."""
        steps = self.trainer.estimated_stepping_batches * self.optim_config.updates_per_rollout
        known = [limit for limit in (self.trainer.max_steps, steps) if limit > 0]
        return min(1.0, self.global_step / min(known, default=math.inf))

    @phase("student")
    def estimate(self, update: list[ScoredRollout]) -> dict[str, float]:
        """Accumulate the gradient of one update, leave `seen` for callbacks, and return totals over all processes."""
        self.seen = []
        masks = [micro.rollout.mask_BT for micro in update]
        counts = self.total({"tokens": sum(m.sum() for m in masks), "sequences": sum(m.any(1).sum() for m in masks)})
        # Not `torch.zeros` alone: under bf16-true Lightning makes bf16 torch's default, which cannot count to 257.
        zero = upcast(torch.zeros((), device=self.device).to(self.dtype))
        tokens, sequences, total = zero + counts["tokens"], zero + counts["sequences"], zero.clone()
        for number, micro in enumerate(update, start=1):
            weights_BT = self.distiller.weights(micro.rollout.mask_BT, tokens, sequences)
            with self.gradients_kept_local(number < len(update)):
                loss = self.distiller.estimate(micro, weights_BT)
                self.seen.append((micro.rollout, loss.stats))
                # DistributedDataParallel averages over processes; this loss is already a share of the global count.
                self.manual_backward(loss.value * self.trainer.world_size)
            total += loss.value.detach()
        return self.total({"loss": total, **token_sums(self.seen), **teacher_sums(self.seen, self.teachers)}) | counts

    @phase("optimizer")
    def step(self, totals: dict[str, float], batch: PromptBatch) -> None:
        """Make one optimizer step, unless the loss or the gradient is not finite.

        Raises:
            NonFiniteStepError: naming the batch. No weight has moved then.
        """
        optimizer: Any = self.optimizers()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        norm = torch.nn.utils.clip_grad_norm_(trainable, self.optim_config.clip_norm or torch.inf)
        totals["grad_norm"] = float(norm)
        if not (math.isfinite(totals["grad_norm"]) and math.isfinite(totals["loss"])):
            optimizer.zero_grad()
            prompt = self.tokenizer.decode(batch.prompts.ids_BP[0][batch.prompts.mask_BP[0]])
            found = totals["loss"], totals["grad_norm"], self.global_step, batch.batch, prompt
            raise NonFiniteStepError(*found, not_finite(self.seen))
        optimizer.step()
        optimizer.zero_grad()
        if self.pair.followed is not None:
            self.pair.followed.learned(self.global_step)
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            scheduler.step()

    def configure_optimizers(self) -> Any:
        """Build the optimizer and the scheduler, which may be any of torch, by name."""
        optimizer = build_optimizer(self.optim_config, self.model.parameters(), outer_matrices(self.model))
        scheduler = build_scheduler(self.optim_config, optimizer)
        return optimizer if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes: frozen weights are where they came from, the random state is not."""
        frozen = {f"model.{name}" for name in models.frozen_names(self.model)}
        checkpoint["state_dict"] = {n: value for n, value in checkpoint["state_dict"].items() if n not in frozen}
        checkpoint |= models.random_state(self.device)
        checkpoint["hyper_parameters"], checkpoint["taught_by"] = self.given, self.taught_by
        checkpoint["scorer"] = {} if self.scorer is None else self.scorer.state()
        if self.pair.followed is not None:
            checkpoint["teacher"] = self.pair.followed.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put frozen weights back, so that the checkpoint is complete again, the random state, and this schedule."""
        models.check_taught_by(checkpoint, self.taught_by)
        if self.scorer is not None:
            self.scorer.load_state(checkpoint.get("scorer", {}))
        checkpoint["state_dict"] = self.state_dict() | checkpoint["state_dict"]
        models.restore_random_state(checkpoint)
        if self.pair.followed is not None:
            self.pair.followed.load_state(checkpoint["teacher"])
        play_schedule(self.configure_optimizers(), checkpoint)

    def demonstrations(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], int]:
        """Read the completions that the data holds for the rows, as only a `PromptDataModule` does, and their end."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "demonstrations"):
            raise UserError("rollout.demonstrations", "prompts of a PromptDataModule", "none", "Set it to teacher.")
        return data.demonstrations(rows), self.student.end_of_completion(data.config.chat)
