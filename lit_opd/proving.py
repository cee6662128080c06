"""Prove the fast paths of a run before its first step, and take the plain ones where a fast path fails later.

The parts that have a fast path prove it themselves: the engine its captured steps, models their attention and their
layers, the distiller its head. The module is a `ProvenModule`, which asks them on the shapes of the first batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import lightning as L
import torch

from lit_opd.config import OptimConfig, RolloutConfig
from lit_opd.errors import RunError, UserError
from lit_opd.fast_paths import KEY, Verdict
from lit_opd.models import LanguageModel, proofs_of, prove_model, run_by
from lit_opd.objective import FUSED_HEAD
from lit_opd.rollout import RolloutEngine
from lit_opd.teachers import LocalScorer, RoutedScorer
from lit_opd.types import PromptBatch, ScoredRollout

__all__ = ["ProvenModule"]

_log = logging.getLogger(__name__)
T = TypeVar("T")
Lend = Callable[[str], LocalScorer]


class ProvenModule(L.LightningModule):
    """A Lightning module whose fast paths prove themselves.

    Attributes:
        student: the model that learns.
        distiller: the parts of a step.
        engine: samples completions. One without a method `prove` has no fast path here.
        optim_config, rollout_config: sections of the configuration.
        verdicts: what came of the proofs so far, by their names.
        sampling: names of the engine's, which comes back to its plain loop by itself.
    """

    student: LanguageModel
    distiller: Any
    engine: RolloutEngine
    optim_config: OptimConfig
    rollout_config: RolloutConfig
    verdicts: dict[str, Verdict]
    sampling: frozenset[str] = frozenset()
    _equipped: Any = None

    @property
    def taken(self) -> list[str]:
        """Names of the fast paths that this run takes."""
        return [name for name, verdict in self.verdicts.items() if verdict.taken]

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Prove before the first step."""
        self.prove_models(batch)

    def on_validation_batch_start(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Prove before the first evaluation."""
        self.prove_models(batch)

    on_test_batch_start = on_validation_batch_start

    # Lightning evaluates in inference mode, where no gradient could be compared.
    @torch.inference_mode(False)
    def prove_models(self, batch: PromptBatch) -> None:
        """Prove sampling, attention and layers on the shapes of a batch, once, and equip every new distiller."""
        if self._is_plain or self._equipped is self.distiller:
            return
        rollout, prompt = self.rollout_config, batch.prompts.ids_BP.shape[1]
        prove = partial(
            prove_model, prompt=prompt, completion=rollout.max_new_tokens, count=rollout.num_completions,
            tokens=self.optim_config.micro_batch_tokens, choice=self.optim_config.paths,
        )  # fmt: skip
        if not self.verdicts:
            with self.trainer.precision_plugin.forward_context():
                self._prove_sampling(len(batch.rows) * rollout.num_completions, prompt + rollout.max_new_tokens)
                for model in self._models():
                    self._keep(prove(model))
        scorer = self.distiller.scorers["teacher"]
        if isinstance(scorer, RoutedScorer) and scorer.lend is not None:
            scorer.lend = partial(self._lend, scorer.lend, prove)
        self._equip()

    def _prove_sampling(self, rows: int, width: int) -> None:
        if hasattr(self.engine, "prove"):
            found = self.engine.prove(self.student, rows, width, self.optim_config.paths)
            self.sampling = frozenset(verdict.name for verdict in found)
            self._keep({verdict.name: verdict for verdict in found})

    def _equip(self) -> None:
        """Let the distiller differentiate its head as was proven: every loop of Lightning has it made anew."""
        self.distiller = self._equipped = replace(self.distiller, fused_head=FUSED_HEAD in self.taken)

    @torch.inference_mode(False)
    def _lend(self, lend: Lend, prove: Callable[[LanguageModel], dict[str, Verdict]], name: str) -> LocalScorer:
        """Lend one of several teachers, which proves its paths the first time, and runs by them when it is back."""
        scorer = lend(name)
        if self.verdicts.keys() >= {*proofs_of(scorer.model)}:
            run_by(scorer.model, self.taken)
        else:
            self._keep(prove(scorer.model))
        return scorer

    def prove_head(self, updates: Sequence[Sequence[ScoredRollout]]) -> None:
        """Prove the fused head on scored completions, once."""
        if FUSED_HEAD not in self.verdicts and not self._is_plain:
            self._keep({FUSED_HEAD: self.distiller.prove_head(updates[0][0], self.optim_config.paths)})
            self._equip()

    def with_way_back(self, run: Callable[[], T]) -> T:
        """Run a part of a step that has changed nothing yet, again by the plain paths where a fast one fails.

        Several processes end instead: one of them alone would wait for the others.
        """
        try:
            return run()
        except (UserError, RunError):
            raise
        except Exception as error:  # compilers and kernels fail in classes of their own
            fast = [name for name in self.taken if name not in self.sampling]
            if not fast or self.optim_config.paths == "fast" or self.trainer.world_size > 1:
                raise
            told = next(iter(str(error).splitlines()), "")[:200]
            _log.warning("%s: %s. Goes on without %s.", type(error).__name__, told, ", ".join(fast))
            for model in self._models():
                run_by(model, ())
            for name in fast:
                self.verdicts[name] = replace(self.verdicts[name], taken=False, reason=f"failed: {told}")
            self._equip()
            self.student.model.zero_grad()
            return run()

    @property
    def _is_plain(self) -> bool:
        """True where no path is to be tried: it is not wanted, or this is a CPU, where nobody asked for it."""
        choice = self.optim_config.paths
        return choice == "plain" or (choice == "auto" and self.device.type == "cpu")

    def _models(self) -> list[LanguageModel]:
        """List the models that read whole rows and stay in this process. Of several teachers one at a time is lent."""
        scorers = self.distiller.scorers.values()
        return [self.student, *(scorer.model for scorer in scorers if isinstance(scorer, LocalScorer))]

    def _keep(self, verdicts: Mapping[str, Verdict]) -> None:
        for name, verdict in verdicts.items():
            self.verdicts[name] = verdict
            level = logging.INFO if verdict.taken else logging.WARNING
            _log.log(level, "%s. See %s.", verdict, KEY)
