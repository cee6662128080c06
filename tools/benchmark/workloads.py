"""What is measured: the settings of W1 and W2, their models and their prompts, one for both sides.

Both sides sample at temperature 1 from the untruncated distribution, minimise the reverse KL over the whole vocabulary
(token mean), keep fp32 masters of the student and compute in bf16, hold the teacher in bf16, and step with AdamW
(no weight decay, constant learning rate) after clipping the gradient's norm. Nothing is recomputed in the backward.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import reasoning_gym

from lit_opd.data.stream import PromptStream
from tools.make_smollm2_pair import NUM_LAYERS, check_drop, is_done, make_student

TEACHER, STUDENT = Path("models/smollm2-teacher"), Path("models/benchmark-student")
KEPT_LAYERS = (0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 28, 29)
TASK, TASK_SEED, QUESTIONS = "chain_sum", 1, 64
LEARNING_RATE, CLIP_NORM, SEED = 1e-5, 1.0, 0


@dataclass(frozen=True)
class Workload:
    """One optimizer step.

    Attributes:
        prompts: how many it takes.
        completions: of each prompt.
        min_new_tokens: before which no completion may end.
        max_new_tokens: after which every completion ends.
        micro_batch_tokens: ours alone: tokens of a micro-batch; None for the default.
    """

    prompts: int
    completions: int
    min_new_tokens: int
    max_new_tokens: int
    micro_batch_tokens: int | None = None

    @property
    def rows(self) -> int:
        """Completions of a step."""
        return self.prompts * self.completions


WORKLOADS = {"w1": Workload(8, 1, 64, 64), "w2": Workload(4, 4, 0, 128)}


def prepare_models() -> None:
    """Make the student out of the teacher's layers, once.

    Raises:
        SystemExit: there is no teacher.
        PairError: the student's folder holds something else.
    """
    drop = [layer for layer in range(NUM_LAYERS) if layer not in KEPT_LAYERS]
    if not is_done(TEACHER):
        raise SystemExit(f"no teacher in {TEACHER}: run python tools/make_smollm2_pair.py")
    if is_done(STUDENT):
        check_drop(STUDENT, drop)
    else:
        make_student(STUDENT, TEACHER, drop)


def make_job(workload: Workload, steps: int) -> dict[str, Any]:
    """What a process of either side is told.

    Args:
        workload: its settings.
        steps: optimizer steps to make.

    Returns:
        JSON values; `batches` holds the questions of every step, in the order in which our data module takes them.
    """
    questions = [row["question"] for row in reasoning_gym.create_dataset(TASK, size=QUESTIONS, seed=TASK_SEED)]
    stream = PromptStream(QUESTIONS, workload.prompts, SEED)
    batches = [[questions[row] for row, _ in stream.batch(number)] for number in range(steps)]
    return {
        "workload": asdict(workload), "steps": steps, "student": str(STUDENT), "teacher": str(TEACHER),
        "questions": questions, "batches": batches, "lr": LEARNING_RATE, "clip_norm": CLIP_NORM, "seed": SEED,
    }  # fmt: skip
