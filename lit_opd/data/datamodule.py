"""Give every step its prompts, whatever the number of processes and wherever a run was resumed.

`runs.prepare` makes the data module of a configured run, and Lightning's trainer asks it for loaders.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_opd.config import DataConfig, as_section, limits
from lit_opd.data.findings import find_in_prompts
from lit_opd.data.guarded import Guarded, Verifier
from lit_opd.data.prompts import EncodedPrompts, encode_rows, pad_token_id, show
from lit_opd.data.routes import read_routes
from lit_opd.data.rows import Row, check_rows, load_rows
from lit_opd.data.stream import Pick, PromptLoader, PromptStream
from lit_opd.data.verifiers import build_verifier
from lit_opd.errors import LintWarning, UserError, suggest
from lit_opd.types import PromptBatch, Prompts

__all__ = ["PromptDataModule"]


class PromptDataModule(L.LightningDataModule):
    """Prompts for training and validation, from a configured source or from rows given directly.

    Training batches follow `PromptStream`, also after resuming; validation rows come in a fixed order, each exactly
    once over all ranks. Give the module itself to the trainer, which tells it its rank.

    Args:
        config: the `data` section; defaults where not given.
        tokenizer: of the student; by default the `tokenizer` of the LightningModule that is trained.
        train_rows: training rows, or plain prompts, instead of `config.source`.
        validation_rows: the same for validation; without them there is none where `train_rows` are given.
        verifier: called as `verifier(completion, row)`, where `row` is a mapping that holds the answer in a column, or
            a name as in `config.verifier`, which is the default.
        seed: of the order of training rows.
        evaluation_batch_size: validation rows of a batch on each rank.
        context_length: tokens that the model can take; None to leave it unchecked.
        max_new_tokens: tokens that have to fit after each prompt.
        shown: by the name of a scorer, keys of `config` that render what it reads instead of each prompt; by default
            those that the LightningModule that is trained asks for.
        teachers: the names of several teachers, among which `config.teacher_column` chooses for each row; by default
            those of the LightningModule that is trained.
        **data_keys: single keys of `config`, as in `PromptDataModule(source="file", path="prompts.jsonl")`.

    Raises:
        UserError: an unknown key or a value out of its range.
    """

    def __init__(
        self,
        config: DataConfig | None = None,
        *,
        tokenizer: Any = None,
        train_rows: Sequence[Row | str] | None = None,
        validation_rows: Sequence[Row | str] | None = None,
        verifier: Verifier | str | None = None,
        seed: int = 0,
        evaluation_batch_size: int = 64,
        context_length: int | None = None,
        max_new_tokens: int = 0,
        shown: Mapping[str, Mapping[str, Any]] | None = None,
        teachers: Sequence[str] | None = None,
        **data_keys: Any,
    ) -> None:
        super().__init__()
        known = [f.name for f in fields(DataConfig)]
        for key in data_keys:
            if key not in known:
                raise UserError(f"data.{key}", "a known key", "an unknown one", suggest(key, known))
        if isinstance(verifier, str):
            data_keys["verifier"], verifier = verifier, None
        self.config = replace(as_section(DataConfig, config, "data"), **data_keys)
        self.config.check("data")
        self.tokenizer = tokenizer
        name = self.config.verifier if verifier is None else None
        verifier = build_verifier(self.config) if verifier is None else verifier
        self.verifier = None if verifier is None else Guarded(verifier, self.config, name)
        limits.seed("seed", seed)
        limits.at_least(1)("evaluation_batch_size", limits.as_type("evaluation_batch_size", evaluation_batch_size, int))
        self.seed, self.evaluation_batch_size = seed, evaluation_batch_size
        self.context_length, self.max_new_tokens = context_length, max_new_tokens
        self.shown, self.teachers = shown, teachers
        self._given = (train_rows, validation_rows)
        self._loaded_state: dict[str, Any] = {}
        self._looked_at = False

    def setup(self, stage: str | None = None) -> None:
        """Load and encode all prompts and try the verifier, so that every mistake in them shows before the first step.

        Raises:
            UserError: see `load_rows`, `encode_rows`, `PromptStream` and `Guarded.rehearse`; no tokenizer; a prompt
                that leaves too little of the context; `trainer.overfit_batches`, which would not repeat batches here.
        """
        overfit_batches = getattr(self.trainer, "overfit_batches", 0)
        if overfit_batches:
            remedy = f"Repeat a few prompts with data.train_size={self.config.batch_size} instead."
            raise UserError("trainer.overfit_batches", "0", overfit_batches, remedy)
        if self.tokenizer is None:
            self.tokenizer = getattr(getattr(self.trainer, "lightning_module", None), "tokenizer", None)
        if not callable(self.tokenizer):
            found = "none" if self.tokenizer is None else f"{self.tokenizer!r}, a {type(self.tokenizer).__name__}"
            remedy = "Pass tokenizer= or train a module that has one."
            raise UserError("tokenizer", "one to encode prompts with", found, remedy)
        module = getattr(self.trainer, "lightning_module", None)
        if self.shown is None:
            self.shown = getattr(module, "shown", {})
        if self.teachers is None:
            self.teachers = getattr(module, "teachers", ())
        for prompts in (self.train_prompts, self.validation_prompts):
            self._check_context(prompts)
        if stage == "fit":
            self._stream()
        if self.validation_prompts.rows:
            self._validation_picks()
        if not self._looked_at:
            self._look()

    def train_dataloader(self) -> PromptLoader:
        """Make one epoch of training batches, from the first that was not completed."""
        stream = self._stream()
        before = self._loaded_state.get("stream", self._identity())
        changed = [key for key, value in self._identity().items() if before.get(key, value) != value]
        if stream.position and changed:
            told = f"training goes on with batch {stream.position}, but of another sequence of prompts."
            found = f"{', '.join(changed)} changed since the checkpoint was written: {told}"
            rank_zero_warn(found, category=LintWarning)
        return PromptLoader(self.train_prompts, stream, pad_token_id(self.tokenizer))

    def val_dataloader(self) -> PromptLoader | list[Any]:
        """Load this rank's validation rows in order, never padded. Without validation rows there is no loader."""
        if not self.validation_prompts.rows:
            return []
        return PromptLoader(self.validation_prompts, self._validation_picks(), pad_token_id(self.tokenizer))

    def test_dataloader(self) -> PromptLoader | list[Any]:
        """Load the validation rows."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: PromptBatch, device: torch.device, dataloader_idx: int) -> PromptBatch:
        """Move the tensors and leave the rows alone, which may hold anything."""
        prompts, *shown = (Prompts(*(x.to(device) for x in p)) for p in (batch.prompts, *batch.shown.values()))
        routes_BM = None if batch.routes_BM is None else batch.routes_BM.to(device)
        return batch._replace(prompts=prompts, shown=dict(zip(batch.shown, shown, strict=True)), routes_BM=routes_BM)

    def state_dict(self) -> dict[str, Any]:
        """Save how many batches were trained on, and what they were taken from."""
        return {"completed_batches": self.completed_batches, "stream": self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batches of `state`."""
        self._loaded_state = state

    @property
    def completed_batches(self) -> int:
        """Training batches completed over the whole run: the number of the next one.

        With a trainer this is its own count, which a checkpoint restores before it asks for the loader. `processed` and
        not `completed`: while checkpoints are written at the end of a batch, only the former counts that batch, and
        neither counts one that an exception interrupted.
        """
        if self.trainer is None:
            return self._loaded_state.get("completed_batches", 0)
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.total.processed

    def demonstrations(self, rows: Sequence[Row]) -> list[str]:
        """Read the completions that the data holds for the rows, in `data.answer_column`.

        Raises:
            UserError: a row has none.
        """
        column = self.config.answer_column
        if column is None or any(row.get(column) is None for row in rows):
            found, remedy = f"none in {column!r}", "Name the column, or set rollout.demonstrations=teacher."
            raise UserError("rollout.demonstrations", "an answer in every row (data.answer_column)", found, remedy)
        return [str(row[column]) for row in rows]

    @cached_property
    def rows(self) -> tuple[list[Row], list[Row]]:
        """The training and the validation rows, before any prompt is dropped."""
        train, validation = self._given
        if train is None and validation is None:
            return load_rows(self.config)
        return self._named(train, "train_rows"), self._named(validation, "validation_rows")

    @cached_property
    def train_prompts(self) -> EncodedPrompts:
        """The training rows with the ids of their prompts."""
        return self._encoded(self.rows[0])

    @cached_property
    def validation_prompts(self) -> EncodedPrompts:
        """The validation rows with the ids of their prompts."""
        return self._encoded(self.rows[1])

    def _encoded(self, rows: Sequence[Row]) -> EncodedPrompts:
        prompts = encode_rows(rows, self.config, self.tokenizer)
        prompts = show(prompts, self.shown or {}, self.config, self.tokenizer)
        return replace(prompts, routes=read_routes(prompts.rows, self.config.teacher_column, self.teachers or ()))

    @cached_property
    def validation_hashes(self) -> list[str]:
        """Hashes of every validation prompt as the student gets it, as token ids."""
        return [hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16] for ids in self.validation_prompts.ids]

    @cached_property
    def dataset_sha256(self) -> str:
        """Hash of the content and order of all rows."""
        digest = hashlib.sha256()
        for part in self.rows:
            for row in part:
                digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
            digest.update(b"end of part\n")
        return digest.hexdigest()

    @cached_property
    def rendered_sha256(self) -> str:
        """Hash of all prompts as the student gets them: a template may hold the date."""
        ids: list[Any] = [self.train_prompts.ids, self.validation_prompts.ids]
        ids += [prompts.shown for prompts in (self.train_prompts, self.validation_prompts) if prompts.shown]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    @cached_property
    def part_sha256(self) -> tuple[str, str]:
        """Hashes of the content and order of the training rows and of the validation rows."""
        train, validation = (json.dumps(part, sort_keys=True, default=repr).encode() for part in self.rows)
        return hashlib.sha256(train).hexdigest(), hashlib.sha256(validation).hexdigest()

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of prompts that are used, were dropped and were truncated."""
        train, validation = self.train_prompts, self.validation_prompts
        return {
            "train": len(train), "dropped_train": train.dropped, "truncated_train": train.truncated,
            "validation": len(validation), "dropped_validation": validation.dropped,
            "truncated_validation": validation.truncated,
        }  # fmt: skip

    def _named(self, rows: Sequence[Row | str] | None, where: str) -> list[Row]:
        if rows is None:
            return []
        alone = isinstance(rows, str | Mapping) or not isinstance(rows, Iterable)
        for index, row in enumerate([rows] if alone else rows):
            if alone or not isinstance(row, str | Mapping):
                found = f"{rows if row is rows else row!r:.80}, a {type(row).__name__}"
                raise UserError(f"{where}[{index}]", "a list of prompts, or of mappings of columns", found, "Pass one.")
        named = [{self.config.prompt_column: row} if isinstance(row, str) else dict(row) for row in rows]
        check_rows(named, self.config, where)
        return named

    def _place(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _stream(self) -> PromptStream:
        rank, world_size = self._place()
        size, batch_size = len(self.train_prompts), self.config.batch_size
        return PromptStream(size, batch_size, self.seed, rank, world_size, self.completed_batches)

    def _validation_picks(self) -> list[list[Pick]]:
        rank, world_size = self._place()
        size, step = len(self.validation_prompts), self.evaluation_batch_size
        if size < world_size:
            expected, found = f"at least one prompt for each of {world_size} processes", size
            raise UserError("data.validation_size", expected, found, "Raise it or use fewer processes.")
        mine: list[Pick] = [(i, (0, i)) for i in range(rank, size, world_size)]
        return [mine[start : start + step] for start in range(0, len(mine), step)]

    def _look(self) -> None:
        """Try the verifier on the first rows, and tell what is most likely not meant."""
        self._looked_at = True
        for prompts in (self.train_prompts, self.validation_prompts):
            if isinstance(self.verifier, Guarded):
                self.verifier.rehearse(prompts.rows)
        for found in find_in_prompts(self.train_prompts, self.validation_prompts, self.config, self.tokenizer):
            rank_zero_warn(found, category=LintWarning)

    def _identity(self) -> dict[str, Any]:
        hashes = {"rendered_sha256": self.rendered_sha256, "dataset_sha256": self.dataset_sha256}
        return {"seed": self.seed, "data.batch_size": self.config.batch_size, **hashes}

    def _check_context(self, prompts: EncodedPrompts) -> None:
        longest = max((len(ids) for read in (prompts.ids, *prompts.shown.values()) for ids in read), default=0)
        if self.context_length is not None and longest + self.max_new_tokens > self.context_length:
            room = max(self.context_length - self.max_new_tokens, 0)
            expected = f"prompts of at most {room} tokens (context {self.context_length} - {self.max_new_tokens} new)"
            found = f"a prompt longer than the context, of {longest}"
            shorter = f"Set data.max_prompt_tokens={room}. If that is too short: " if room else ""
            remedy = f"{shorter}Lower rollout.max_new_tokens."
            raise UserError("data.max_prompt_tokens", expected, found, remedy)
