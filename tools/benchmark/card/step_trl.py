"""G1, TRL: the same steps by its DistillationTrainer, with autocast around its loss and generation by transformers."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
from datasets import Dataset
from trl import DistillationConfig

from tools.benchmark import trl
from tools.benchmark.card.sizes import device_of, make_model, make_prompts, make_tokenizer, sizes_of
from tools.benchmark.processes import answer


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Train for `job["steps"]` steps, and tell what each took."""
    warnings.simplefilter("ignore")
    sizes, device, recorder = sizes_of(job), device_of(job), trl.Recorder()
    rows = sizes.prompts * sizes.completions
    prompts = make_prompts(sizes, sizes.prompts * job["steps"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = DistillationConfig(
            output_dir=folder, max_steps=job["steps"], per_device_train_batch_size=rows, shuffle_dataset=False,
            max_completion_length=sizes.new, temperature=1.0, top_p=1.0, top_k=0, beta=1.0, bf16=True,
            generation_kwargs={"min_new_tokens": sizes.new}, use_cpu=device.type == "cpu", learning_rate=1e-5,
            weight_decay=0.0, max_grad_norm=1.0, lr_scheduler_type="constant", gradient_checkpointing=False, seed=0,
            report_to="none", logging_strategy="no", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = trl.TimedTrainer(
            model=make_model(sizes.student, sizes.vocabulary, device, torch.float32),
            teacher_model=make_model(sizes.teacher, sizes.vocabulary, device, torch.bfloat16, seed=1),
            args=arguments,
            train_dataset=Dataset.from_list(
                [{"prompt": text} for text in prompts for _ in range(sizes.completions)]
            ),
            processing_class=make_tokenizer(sizes.vocabulary),
            callbacks=[recorder],
        )  # fmt: skip
        trainer.recorder, trainer.fixed = recorder, True
        trl.wrap(trainer, recorder.phases)
        trainer.train()
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    return {"steps": recorder.steps, "peak_gb": peak}


if __name__ == "__main__":
    answer(measure)
