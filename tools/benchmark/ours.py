"""One process of lit_opd: trains for a few steps and prints what each took."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_opd import DistillationModule, PromptDataModule
from lit_opd.config import StudentConfig, TeacherConfig
from lit_opd.objective import chunks
from lit_opd.types import PromptBatch
from tools.benchmark.phases import Phases
from tools.benchmark.processes import answer, peak_mb, resident_mb


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says; see `workloads.make_job`."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    imports_mb, recorder = resident_mb(), Recorder(job["batches"])
    module, data = build(job)
    recorder.phases.wrap(chunks, "position_losses", "head_s")
    recorder.phases.wrap_optimizer()
    trainer = L.Trainer(
        accelerator="cpu", precision="bf16-mixed", max_steps=job["steps"], callbacks=[recorder], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        limit_val_batches=0, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    return {"steps": recorder.steps, "imports_mb": imports_mb, "peak_mb": peak_mb(), "threads": torch.get_num_threads()}


def build(job: dict[str, Any]) -> tuple[DistillationModule, PromptDataModule]:
    """Module and data of a job; what it does not say has our default."""
    workload = job["workload"]
    optim = {"lr": job["lr"], "clip_norm": job["clip_norm"], "kwargs": {"weight_decay": 0.0, "fused": True}}
    if workload["micro_batch_tokens"] is not None:
        optim["micro_batch_tokens"] = workload["micro_batch_tokens"]
    module = DistillationModule(
        StudentConfig(path=job["student"], dtype="float32"),
        TeacherConfig(path=job["teacher"], dtype="bfloat16"),
        "full_vocab",
        estimator_kwargs={"divergence": "reverse_kl"},
        rollout={
            "num_completions": workload["completions"],
            "min_new_tokens": workload["min_new_tokens"],
            "max_new_tokens": workload["max_new_tokens"],
        },
        optim=optim,
        seed=job["seed"],
    )
    data = PromptDataModule(
        train_rows=job["questions"], batch_size=workload["prompts"], chat=True, seed=job["seed"],
        tokenizer=module.tokenizer,
    )  # fmt: skip
    return module, data


class Recorder(Callback):
    """Keeps what every step took.

    Args:
        batches: the questions that each step must see.
    """

    def __init__(self, batches: list[list[str]]) -> None:
        self.phases, self.batches, self.steps = Phases(), batches, []
        self._last = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin to count."""
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Count the time since the last step's end: with the loading of data and whatever the loop does."""
        now = time.perf_counter()
        step = len(self.steps)  # not batch_idx, which begins again with every epoch
        if [row[trainer.datamodule.config.prompt_column] for row in batch.rows] != self.batches[step]:
            raise RuntimeError(f"step {step} saw other prompts than the other side does")
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        inner, rows = self.phases.take(), len(batch.rows) * module.rollout_config.num_completions
        self.steps.append({
            "step_s": now - self._last,
            "rollout_s": logged["perf/rollout_s"],
            "teacher_s": logged["perf/teacher_s"],
            "student_s": logged["perf/student_s"] - sum(inner.values()),
            **inner,
            "tokens": round(logged["rollout/length"] * rows),
            "completions": rows,
            "reverse_kl": logged["train/reverse_kl"],
        })  # fmt: skip
        self._last = time.perf_counter()


if __name__ == "__main__":
    answer(measure)
