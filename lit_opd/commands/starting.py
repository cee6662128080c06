"""Write a commented configuration to begin with, for two models and a file of prompts.

The command line calls it for `init`. The comments are what `lit_opd/config/` says of the keys.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import Config, load_config
from lit_opd.config.comments import all_meanings, with_comments
from lit_opd.data.readers import Row, read_file
from lit_opd.data.verifiers import last_number
from lit_opd.errors import UserError
from lit_opd.files import write_file
from lit_opd.models import context_length, load_tokenizer, read_model_config
from lit_opd.runs.folder import check_writable

__all__ = ["write_starter"]

PROMPTS = ("prompt", "question", "problem", "instruction", "messages", "conversations", "query", "input", "text")
ANSWERS = ("answer", "solution", "output", "response", "completion", "target")
MOST_PROMPT, MOST_NEW = 1024, 512  # tokens
TRAINER = {
    "trainer.accelerator": "auto | cpu | gpu",
    "trainer.devices": "Processes, each with a copy of both models.",
    "trainer.max_steps": "Optimizer steps.",
    "trainer.precision": "Of the student's forward pass: 32-true | bf16-mixed | bf16-true.",
    "trainer.log_every_n_steps": "Steps between two points of a curve.",
}


def write_starter(student: str, teacher: str, data: str, out: str) -> None:
    """Write the configuration to a new file, by what models and data are, and print what to do with it.

    Raises:
        UserError: the file exists; models or data cannot be read; no column has a usual name of prompts.
    """
    quiet_libraries()
    file = Path(out)
    if file.exists():
        raise UserError("--out", "a new file", f"{out!r}, which exists", "Name another, or delete it.")
    check_writable("--out", file.parent)
    rows = read_file("--data", data, {})
    of_data = {"source": "file", "path": data} | _columns(rows, data)
    models = load_config([], [f"student.path={student}", f"teacher.path={teacher}"])
    context = _context(models)
    new = min(MOST_NEW, context // 2)
    of_data |= {
        "chat": bool(load_tokenizer(models.student, "student").chat_template),
        "validation_size": min(256, max(1, len(rows) // 10)),
        "batch_size": min(16, len(rows)),
        "max_prompt_tokens": min(MOST_PROMPT, context - new),
    }
    values = {
        "output_dir": f"outputs/{file.stem}",
        "student": {"path": student, "dtype": "float32", "lora": None},
        "teacher": {"path": teacher, "dtype": "bfloat16", "quantization": "none"},
        "data": of_data,
        "rollout": {"num_completions": 1, "max_new_tokens": new, "temperature": 1.0},
        "estimator": {"name": "full_vocab", "kwargs": {"divergence": "reverse_kl"}},
        "optim": {"name": "AdamW", "lr": 1e-5, "warmup_steps": 10, "clip_norm": 1.0, "micro_batch_tokens": 8192},
        "trainer": {"accelerator": "auto", "devices": 1, "max_steps": 200, "precision": _precision(),
                    "log_every_n_steps": 1},
        "evaluation": {"every_n_steps": 50, "batch_size": 64, "num_examples": 16},
        "collapse": {"action": "warn"},
        "tracking": {"uri": "sqlite:///mlflow.db", "experiment": file.stem},
    }  # fmt: skip
    write_file(file, _written(values, out))
    print(f"Wrote {out}: {len(rows)} rows of {data}, {_told(of_data)}.")
    print(f"Check it: python -m lit_opd fit --config {out} --dry-run")


def _columns(rows: list[Row], data: str) -> dict[str, Any]:
    """Find the columns with prompts and with answers by their usual names, and the verifier.

    Answers that all end in a number are compared by it. How others are judged, nobody knows.
    """
    names = list(dict.fromkeys(str(name) for row in rows for name in row))
    prompt = next((name for name in PROMPTS if name in names), None)
    if prompt is None:
        found = f"the columns {', '.join(names)}" if rows else "no rows"
        remedy = "Rename the column with the prompts to prompt."
        raise UserError("--data", f"{data} with a column {', '.join(PROMPTS[:-1])} or {PROMPTS[-1]}", found, remedy)
    answer = next((name for name in ANSWERS if name in names), None)
    answers = [str(row.get(answer) or "").strip(" .") for row in rows] if answer else [""]
    numbers = all(text[-1:].isdigit() and last_number(text) is not None for text in answers)
    return {"prompt_column": prompt, "answer_column": answer, "verifier": "last_number" if numbers else None}


def _context(models: Config) -> int:
    """Read how long a row both models take, in tokens."""
    both = read_model_config(models.student, "student"), read_model_config(models.teacher, "teacher")
    lengths = [context_length(one.get_text_config()) for one in both]
    return min((length for length in lengths if length is not None), default=MOST_PROMPT + MOST_NEW)


def _precision() -> str:
    return "bf16-mixed" if torch.accelerator.is_available() else "32-true"


def _written(values: dict[str, Any], out: str) -> str:
    meanings = all_meanings(Config) | TRAINER
    sections = [yaml.safe_dump({key: value}, sort_keys=False, width=math.inf) for key, value in values.items()]
    commands = [f"#   python -m lit_opd fit --config {out} {option}".rstrip() for option in ("--dry-run", "")]
    head = "\n".join(["# Distil a student from a teacher. Check this file first, then train:", *commands])
    return f"{head}\n\n{with_comments(chr(10).join(sections), meanings)}"


def _told(of_data: dict[str, Any]) -> str:
    judged = f"answers in {of_data['answer_column']!r}" if of_data["answer_column"] else "no answers"
    by = f"judged by {of_data['verifier']}" if of_data["verifier"] else "judged by nobody (data.verifier)"
    chat = "in the student's chat template" if of_data["chat"] else "without a chat template"
    return f"prompts in {of_data['prompt_column']!r} {chat}, {judged}, {by}"
