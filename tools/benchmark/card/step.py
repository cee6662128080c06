"""G1, ours: optimizer steps of full-vocabulary reverse KL, from sampling to AdamW, as a user's script makes them."""

from __future__ import annotations

import logging
import time
import warnings
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_opd import DistillationModule, PromptDataModule
from tools.benchmark.card.sizes import device_of, make_model, make_prompts, make_tokenizer, sizes_of, wait
from tools.benchmark.processes import answer

PHASES = ("rollout_s", "teacher_s", "student_s")


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train for `job["steps"]` steps, and tell what each took."""
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    sizes, device, recorder = sizes_of(job), device_of(job), Recorder()
    student = make_model(sizes.student, sizes.vocabulary, device, torch.float32)
    teacher = make_model(sizes.teacher, sizes.vocabulary, device, torch.bfloat16, seed=1)
    module = DistillationModule(
        student, teacher, "full_vocab", estimator_kwargs={"divergence": "reverse_kl"},
        tokenizer=make_tokenizer(sizes.vocabulary), seed=0,
        rollout={"num_completions": sizes.completions, "min_new_tokens": sizes.new, "max_new_tokens": sizes.new},
        optim={"lr": 1e-5, "paths": job["paths"], "kwargs": {"weight_decay": 0.0}},
    )  # fmt: skip
    rows = [{"prompt": text} for text in make_prompts(sizes, sizes.prompts * job["steps"])]
    data = PromptDataModule(train_rows=rows, batch_size=sizes.prompts, tokenizer=module.tokenizer, seed=0)
    trainer = L.Trainer(
        accelerator="auto" if device.type != "cpu" else "cpu", devices=1, precision="bf16-mixed", callbacks=[recorder],
        max_steps=job["steps"], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {"steps": recorder.steps, "peak_gb": peak, "paths": [str(verdict) for verdict in module.verdicts.values()]}


class Recorder(Callback):
    """Keeps what every step took, from the end of the one before."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._last = 0.0

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Begin to count."""
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        """Count the time of a step, the device's work included."""
        wait(module.device)
        logged = {name: float(trainer.callback_metrics[f"perf/{name}"]) for name in PHASES}
        kl = float(trainer.callback_metrics["train/reverse_kl"])
        self.steps.append({"step_s": time.perf_counter() - self._last, **logged, "reverse_kl": kl})
        self._last = time.perf_counter()


if __name__ == "__main__":
    answer(measure)
