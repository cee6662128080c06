"""Describe an exported student in a model card: the README.md that the Hugging Face hub shows of a folder.

`train` writes one beside the student that it exports, and so does the command `export`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id

from lit_opd import __version__, estimators
from lit_opd.config import Config
from lit_opd.errors import concealed
from lit_opd.files import write_file
from lit_opd.measures.table import describe, in_order
from lit_opd.runs.folder import RunFolder

__all__ = ["model_card", "write_card"]

CARD = "README.md"
COLUMNS = ("before", "after", "teacher")  # of the results


def write_card(place: Path, config: Config, folder: RunFolder, step: int) -> None:
    """Write the card of the student after so many steps into its folder, over any that a library wrote."""
    write_file(place / CARD, str(model_card(config, folder, step, adapter=(place / "adapter_config.json").is_file())))


def model_card(config: Config, folder: RunFolder, step: int, adapter: bool = False) -> ModelCard:
    """Tell of a student what its run's folder and configuration know.

    Args:
        config: of the run.
        folder: of the run, whose results are told if they are those of this step.
        step: optimizer steps that the student has made.
        adapter: its folder holds adapters alone.
    """
    base, data = config.student.path, config.data.path
    metadata = ModelCardData(
        base_model=base if _is_on_hub(base) else None,
        datasets=[data] if config.data.source == "hub" and data else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["on-policy-distillation", "knowledge-distillation", "lit_opd"],
    )
    text = "\n".join(_lines(config, folder, step, adapter))
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{concealed(text)}\n", ignore_metadata_errors=False)


def _lines(config: Config, folder: RunFolder, step: int, adapter: bool) -> Iterator[str]:
    student = _name(config.student.path)
    yield f"# {config.tracking.run_name or f'{student}, distilled'}\n"
    yield f"{'LoRA adapters for' if adapter else 'A student made of'} {student} by on-policy distillation with lit_opd"
    yield f"{__version__}: the student wrote completions, a frozen teacher scored every token, and the estimator below"
    yield "made a gradient of the two.\n"
    yield "| | |\n|---|---|"
    for name, value in _facts(config, folder.read_notes(), step).items():
        yield f"| {name} | {_cell(value)} |"
    yield "\n## Results\n"
    yield from _results(folder, step)
    yield "\n## License\n"
    yield "None is stated: add `license:` to the head of this file. Those of the student's weights, of the teacher and"
    yield "of the prompts may bind you."


def _facts(config: Config, notes: Mapping[str, Any], step: int) -> dict[str, str]:
    """Collect what the table of a card holds, without what is not known."""
    estimator = estimators.build_from(config.estimator)
    aims = f"aims at {estimator.contract.aim}" if estimator.contract.aim else "declares no target"
    keywords = ", ".join(f"{key}={value}" for key, value in estimator.kwargs.items())
    teachers = config.teachers or {"": config.teacher}
    named = ", ".join(_name(one.path) if one.path else str(one.model or one.kind) for one in teachers.values())
    facts = {
        "student": _name(config.student.path),
        "teacher": named,
        "estimator": f"`{estimator.spec.name}`" + (f" ({keywords})" if keywords else ""),
        "its contract": f"{aims}; {estimator.spec.source}" if estimator.spec.source else aims,
        "optimizer steps": str(step),
        "optimizer": f"{config.optim.name}, learning rate {config.optim.lr:g}",
        "prompts": f"{_name(str(config.data.path))} ({config.data.source})",
        "sha256 of the prompts": notes.get("dataset_sha256", ""),
        "MLflow run": notes.get("mlflow_run_id") or "",
    }
    return {name: value for name, value in facts.items() if value}


def _results(folder: RunFolder, step: int) -> Iterator[str]:
    found = json.loads(folder.summary.read_text()) if folder.summary.is_file() else {}
    if step != (found.get("exported_step") or found.get("steps")):
        yield "Not measured at this step: `python -m lit_opd validate` with the checkpoint measures it."
        return
    columns = {name: found[name] for name in COLUMNS if found.get(name)}
    yield "On held-out prompts at temperature 1, untruncated: means and 95% intervals over prompts.\n"
    yield f"| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
    for name in in_order(metric for results in columns.values() for metric in results):
        measure = describe(name)
        label = f"{measure.title} ({measure.unit})" if measure.unit else measure.title
        yield f"| {label} | {' | '.join(_interval(results.get(name)) for results in columns.values())} |"


def _interval(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['mean']:.4g} [{found['low']:.4g}, {found['high']:.4g}]"


def _is_on_hub(path: str) -> bool:
    """Tell a name of the hub from a folder here, of which others know nothing."""
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return not Path(path).expanduser().exists()


def _name(path: str) -> str:
    return path if _is_on_hub(path) else Path(path).name


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")
