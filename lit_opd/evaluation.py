"""Evaluate: sample at temperature 1 on fixed prompts and seeds, measure the yardsticks, keep examples to read.

Why here: students of all estimators are measured alike, whatever they were trained on. `DistillationModule` is an
`EvaluatedModule`, which feeds an `Evaluation` with every batch of held-out prompts and logs what it finds.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lit_opd.config import EvaluationConfig
from lit_opd.data.schedule import Schedule, scheduled
from lit_opd.errors import LintWarning
from lit_opd.measures.custom import load_measures
from lit_opd.measures.intervals import Interval
from lit_opd.measures.positions import POSITION_VALUES, Profile, TokenProfile
from lit_opd.measures.table import YARDSTICKS
from lit_opd.measures.yardsticks import PerPrompt, Yardsticks
from lit_opd.models import OF_TOKENS, LanguageModel, measure_yardsticks
from lit_opd.processes import AcrossProcesses
from lit_opd.rollout import (
    EVALUATION_STREAM,
    RolloutEngine,
    Transcript,
    Verifier,
    check_batch,
    failed,
    judge,
    transcribe,
    uniforms,
)
from lit_opd.rollout.proof import check_gap, gap_sums
from lit_opd.teachers import FULL, RoutedScorer, Scorer, Wanted
from lit_opd.types import PromptBatch, Rollout, SamplingLaw

__all__ = ["EvaluatedModule", "Evaluation", "Example", "can_write", "tell_left_out"]


@dataclass(frozen=True)
class Example:
    """A completion to read: texts, reward, and the log-ratio (student minus teacher, nats) of each token."""

    prompt: str
    completion: str
    reward: float | None
    tokens: list[str]
    log_ratios: list[float]


def can_write(teacher: Scorer | None) -> bool:
    """Tell whether prompts can be answered by the teacher, a model where it has no scorer, or by all of several."""
    return teacher is None or (isinstance(teacher, RoutedScorer) and teacher.writes)


def tell_left_out(teacher: Scorer, config: EvaluationConfig) -> None:
    """Warn of what cannot be measured with a teacher that only scores."""
    if config.teacher and not can_write(teacher):
        warnings.warn("evaluation.teacher: left out, for this teacher scores and cannot sample.", LintWarning, 3)
    if FULL not in teacher.gives:
        lost = ", ".join(name for name in YARDSTICKS if name not in OF_TOKENS)
        warnings.warn(f"evaluation: without the teacher's whole distributions, val/* has no {lost}.", LintWarning, 3)


class Evaluation(nn.Module):
    """The yardsticks of one evaluation, accumulated over batches.

    Args:
        config: completions a prompt, seed, pass@k, how many examples to keep.
        max_new_tokens: the longest completion, where `config` names no other.
        support_size: how many of each model's most probable tokens are compared.

    Attributes:
        per_prompt: what the evaluation finished last measured, prompt by prompt.
        profile: the same, token by token; None before the first is finished.
        transcripts: of the same, completion by completion, those of this process.
    """

    def __init__(self, config: EvaluationConfig, max_new_tokens: int, support_size: int = 16) -> None:
        super().__init__()
        self.config, self.support_size = config, support_size
        self.max_new_tokens = config.max_new_tokens or max_new_tokens
        self.measures = load_measures(config.measures)
        self.yardsticks = Yardsticks([*YARDSTICKS, *self.measures], config.pass_at)
        self.examples: list[Example] = []
        self.per_prompt = PerPrompt([], {}, {})
        self.tokens = TokenProfile(self.max_new_tokens, [*POSITION_VALUES, *self.measures])
        self.profile: Profile | None = None
        self.transcripts: list[Transcript] = []
        self._written: list[Transcript] = []

    def add(
        self, policy: LanguageModel, teacher: Scorer, batch: PromptBatch, engine: RolloutEngine,
        verifier: Verifier | None, rows: int,
    ) -> Rollout:  # fmt: skip
        """Sample one batch of prompts with `policy`, the student or the teacher, and measure what it wrote."""
        check_batch(batch)
        count = self.config.num_completions
        numbers_BT = uniforms((self.config.seed, EVALUATION_STREAM), batch.draws, count, self.max_new_tokens)
        device, wanted = batch.prompts.ids_BP.device, Wanted(full=FULL in teacher.gives)
        batch = batch._replace(ended=teacher.ahead(wanted))
        rollout = engine.sample(policy, batch, SamplingLaw(), count, numbers_BT.to(device))
        scores = teacher.score(rollout, wanted)
        values = measure_yardsticks(policy, scores, rollout, rows, self.support_size, self.measures)
        rewards_B = None if verifier is None else judge(policy.tokenizer, batch, rollout, verifier)
        self.yardsticks.update(values, rollout, rewards_B, batch.places, failed(verifier, rollout))
        self.tokens.update(values, rollout)
        self._written += transcribe(policy.tokenizer, batch, rollout, values, rewards_B)
        self._keep_examples(policy, rollout, values["log_ratio"], rewards_B)
        return rollout

    def finish(self) -> tuple[dict[str, Interval], list[Example]]:
        """Compute every metric with its interval, and begin anew.

        Returns:
            The metrics by name, and the examples. `per_prompt`, `profile` and `transcripts` keep the rest.
        """
        self.per_prompt, self.profile = self.yardsticks.compute(), self.tokens.compute()
        self.yardsticks.reset()
        self.transcripts, self._written = self._written, []
        examples, self.examples = self.examples, []
        return self.per_prompt.intervals(), examples

    def to_log(self, prefix: str, results: Mapping[str, Interval]) -> dict[str, float]:
        """Name what is logged: means and ends of intervals under a prefix, and of `val` the means by position."""
        values = {f"{prefix}/{name}": interval.mean for name, interval in results.items()}
        for end in ("low", "high"):
            values |= {f"{prefix}_interval/{name}_{end}": getattr(i, end) for name, i in results.items()}
        # Only of the student on held-out prompts: one name has one meaning along a run.
        return values | (self.profile.curves.summary() if self.profile and prefix == "val" else {})

    def _keep_examples(
        self, policy: LanguageModel, rollout: Rollout, log_ratio_BT: Tensor, rewards_B: Tensor | None
    ) -> None:
        tokenizer = policy.tokenizer
        for row in range(min(len(rollout), self.config.num_examples - len(self.examples))):
            prompt_ids = rollout.prompts.ids_BP[row][rollout.prompts.mask_BP[row]].tolist()
            mask_T = rollout.real_BT[row]
            ids = rollout.ids_BT[row][mask_T].tolist()
            example = Example(
                prompt=tokenizer.decode(prompt_ids),
                completion=tokenizer.decode(ids),
                reward=None if rewards_B is None else float(rewards_B[row]),
                tokens=[tokenizer.decode([i]) for i in ids],
                log_ratios=[round(value, 4) for value in log_ratio_BT[row][mask_T].tolist()],
            )
            self.examples.append(example)


class EvaluatedModule(AcrossProcesses):
    """A Lightning module that measures its student, or the teacher in its place, on held-out prompts.

    Attributes:
        student: the model that is measured.
        teacher: the model in this process that it learns from, None where the teacher only scores.
        distiller: the parts of a step, of which the scorers are asked.
        engine: samples completions.
        evaluation: accumulates one evaluation.
        results: what was measured last, by the prefix it was logged under.
        examples: completions of the last evaluation to read.
        measured_at: optimizer steps done at the last evaluation, None before the first.
        judged: whose completions are measured, `student` or `teacher`.
        schedule: of the weights of several teachers.
    """

    student: LanguageModel
    teacher: Any
    distiller: Any
    engine: RolloutEngine
    schedule: Schedule

    def begin_evaluations(self, config: EvaluationConfig, max_new_tokens: int, support_size: int) -> None:
        """Make the first evaluation, as `Evaluation` says."""
        self.evaluation = Evaluation(config, max_new_tokens, support_size)
        self.results: dict[str, dict[str, Interval]] = {}
        self.examples: list[Example] = []
        self.measured_at: int | None = None
        self.judged = "student"
        self.proved: set[Any] = set()

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Measure the yardsticks on one batch of held-out prompts."""
        batch = scheduled(batch, self.schedule, progress=1.0)  # one yardstick along a run: the weights it ends with
        scorer, rows = self.distiller.scorers["teacher"].untempered(), self.distiller.head_rows
        for name, part in self._shared_out(batch):
            # Not named here: of several teachers one at a time is in memory.
            rollout = self.evaluation.add(self._writer(name), scorer, part, self.engine, self.verifier, rows)
            if self.judged == "student":
                self.prove(rollout)

    def _shared_out(self, batch: PromptBatch) -> Iterable[tuple[str, PromptBatch]]:
        """Say who answers which prompts: the student all, or teachers their own, which they read as they score."""
        scorer = self.distiller.scorers["teacher"]
        if self.judged == "student":
            return [("student", batch)]
        if isinstance(scorer, RoutedScorer):
            return scorer.shared_out(batch)
        return [("teacher", batch._replace(prompts=batch.shown.get("teacher", batch.prompts)))]

    def _writer(self, name: str) -> LanguageModel:
        scorer = self.distiller.scorers["teacher"]
        if self.judged == "student":
            return self.student
        return (scorer.writer(name) if isinstance(scorer, RoutedScorer) else self.teacher).untempered()

    def prove(self, rollout: Rollout) -> None:
        """Compare what the engine recorded with the student's own log-probabilities, before updates and evaluations."""
        stage = self.trainer.state.stage  # training has a law of its own, and modes of its own
        if stage not in self.proved:
            sums = self.total(gap_sums(self.student, rollout, self.distiller.head_rows))
            check_gap(self.student, self.engine, **sums)
            self.proved.add(stage)

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
        self.evaluation.transcripts = self.gathered(self.evaluation.transcripts)
        self.results[prefix], self.measured_at = results, self.global_step
        self.log_dict(self.at_step(self.evaluation.to_log(prefix, results)))

    def at_step(self, values: dict[str, float]) -> dict[str, float]:
        """Place values on the curves by optimizer steps done, and not by batches begun as Lightning would."""
        return values | {"step": float(self.global_step)}

    @contextmanager
    def judging_teacher(self) -> Iterator[None]:
        """Measure the teacher's own completions, which the student is to reach, in evaluations inside."""
        self.judged = "teacher"
        try:
            yield
        finally:
            self.judged = "student"

    @property
    def verifier(self) -> Any:
        """The data module's verifier, which judges completions, or None."""
        return getattr(getattr(self.trainer, "datamodule", None), "verifier", None)
