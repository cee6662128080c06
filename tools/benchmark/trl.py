"""One process of TRL's DistillationTrainer: trains for a few steps and prints what each took.

Of TRL 1.16.0's source, for who wonders whether this is the same work: `beta=1` is KL(student || teacher), as
`ChunkedDivergenceFunction` forms E_student[log p_student - log p_teacher]; temperature 1, `top_k=0`, `top_p=1`,
`min_p=None` and no repetition penalty, which are its defaults, leave the model's distribution as it is, because
Transformers adds no warper for any of them; the loss is the sum over tokens by their number.

`bf16=True` makes Accelerate wrap the forward of the whole model, which sampling uses. The loss calls the body of the
model instead, so that as shipped the student's training forward runs in fp32; `fixed` puts the loss under autocast.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer import distillation_trainer

from tools.benchmark.phases import Phases
from tools.benchmark.processes import answer, peak_mb, resident_mb


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train as the job says; see `workloads.make_job`. `job["fixed"]` puts the loss under autocast."""
    warnings.simplefilter("ignore")
    imports_mb, recorder = resident_mb(), Recorder()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(job, recorder, folder)
        wrap(trainer, recorder.phases)
        trainer.train()
    return {"steps": recorder.steps, "imports_mb": imports_mb, "peak_mb": peak_mb(), "threads": torch.get_num_threads()}


def build(job: dict[str, Any], recorder: Recorder, folder: str) -> TimedTrainer:
    """The trainer of a job; it makes one completion of a prompt, so that a prompt is there once for each of them."""
    workload = job["workload"]
    copies = workload["completions"]
    questions = [question for batch in job["batches"] for question in batch for _ in range(copies)]
    arguments = DistillationConfig(
        output_dir=folder, max_steps=job["steps"], per_device_train_batch_size=workload["prompts"] * copies,
        shuffle_dataset=False, max_completion_length=workload["max_new_tokens"], temperature=1.0, top_p=1.0, top_k=0,
        generation_kwargs={"min_new_tokens": workload["min_new_tokens"]}, beta=1.0, bf16=True, use_cpu=True,
        learning_rate=job["lr"], weight_decay=0.0, max_grad_norm=job["clip_norm"], lr_scheduler_type="constant",
        gradient_checkpointing=False, seed=job["seed"], report_to="none", logging_strategy="no", save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_pretrained(job["student"], dtype=torch.float32),
        teacher_model=AutoModelForCausalLM.from_pretrained(job["teacher"], dtype=torch.bfloat16),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in questions]),
        processing_class=AutoTokenizer.from_pretrained(job["student"]),
        callbacks=[recorder],
    )
    trainer.recorder, trainer.fixed = recorder, job["fixed"]
    return trainer


def wrap(trainer: TimedTrainer, phases: Phases) -> None:
    """Time the parts that are functions; the head's backward is within the student's, and counts for the head."""
    phases.wrap(trainer.accelerator, "backward", "student_s")
    phases.wrap(distillation_trainer, "_chunked_divergence_loss", "head_s")
    phases.wrap(ChunkedDivergenceFunction, "backward", "head_s")
    ChunkedDivergenceFunction.backward = staticmethod(ChunkedDivergenceFunction.backward)
    phases.wrap_optimizer()


class TimedTrainer(DistillationTrainer):
    """The trainer, with the time of its phases taken and, where `fixed`, its loss under autocast."""

    recorder: Recorder
    fixed: bool

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        with self.recorder.phases.timed("rollout_s"):
            completions = super()._generate_single_turn(*args, **kwargs)
        self.recorder.note(tokens=sum(map(len, completions)), completions=len(completions))
        return completions

    def _get_last_hidden_state(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        of_teacher = model is self.accelerator.unwrap_model(self.teacher_model)
        with self.recorder.phases.timed("teacher_s" if of_teacher else "student_s"):
            return super()._get_last_hidden_state(model, *args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss, under autocast where `fixed`."""
        with self.accelerator.autocast() if self.fixed else contextlib.nullcontext():
            loss = super().compute_loss(*args, **kwargs)
        self.recorder.note(reverse_kl=float(loss.detach()))
        return loss


class Recorder(TrainerCallback):
    """Keeps what every step took."""

    def __init__(self) -> None:
        self.phases, self.steps = Phases(), []
        self._last, self._noted = 0.0, {}

    def note(self, **values: float) -> None:
        """What else is to be kept of this step."""
        self._noted |= values

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self._last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Count the time since the last step's end: with the loading of data and whatever the loop does."""
        now = time.perf_counter()
        self.steps.append({"step_s": now - self._last, **self.phases.take(), **self._noted})
        self._last, self._noted = time.perf_counter(), {}


if __name__ == "__main__":
    answer(measure)
