"""Run every check of the audit, those without weights first.

The command `audit` calls it through `commands.experiments`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.progress import track

from lit_opd.config import Config
from lit_opd.errors import RunError, UserError
from lit_opd.lab.audit.direction import sign_test
from lit_opd.lab.audit.endings import stop_tokens, teacher_at_ends
from lit_opd.lab.audit.equal_models import null_test
from lit_opd.lab.audit.evidence import Evidence, gather
from lit_opd.lab.audit.paths_here import fast_paths
from lit_opd.lab.audit.prefixes import student_prefixes
from lit_opd.lab.audit.quantization import quantised_teacher
from lit_opd.lab.audit.ranking import TokenRow, log_ratios, rank_tokens
from lit_opd.lab.audit.score import sampler_gap, sampling_law
from lit_opd.lab.audit.tokenizers import segmentation, vocabulary
from lit_opd.models import load_tokenizer, read_model_config
from lit_opd.runs.first_look import first_look
from lit_opd.runs.prepare import check_kinds, prepare_data
from lit_opd.runs.verdicts import FAIL, PASS, Finding, worst

__all__ = ["CHECKS", "Audit", "audit"]

# Items that need weights, in the order of the report; two more need tokenizers only.
CHECKS: dict[str, Callable[[Evidence], Finding]] = {
    "segmentation": segmentation,
    "stop tokens": stop_tokens,
    "teacher at ends": teacher_at_ends,
    "log-ratio by id": log_ratios,
    "null test": null_test,
    "sign test": sign_test,
    "sampling law": sampling_law,
    "sampler gap": sampler_gap,
    "quantised teacher": quantised_teacher,
    "student prefixes": student_prefixes,
    "fast paths": fast_paths,
}


@dataclass(frozen=True)
class Audit:
    """All that an audit found."""

    findings: dict[str, Finding]  # by item
    tokens: list[TokenRow]  # the ids that the student wrote, by mean log-ratio; empty where no weights were read
    probe: dict[str, int]  # how many prompts, completions and counted tokens were looked at
    seconds: float

    @property
    def verdict(self) -> str:
        """The worst of all verdicts."""
        return worst(finding.verdict for finding in self.findings.values())

    def enforce(self) -> None:
        """Raise a `RunError` that names the items that fail, if any does."""
        failed = [item for item, finding in self.findings.items() if finding.verdict == FAIL]
        if failed:
            raise RunError(f"the audit: {len(failed)} of {len(self.findings)} items fail ({', '.join(failed)}).")


def audit(config: Config) -> Audit:
    """Look for what would spoil a long run: everything is read, nothing is written, no weight moves.

    Of several teachers each is audited with the prompts that are its own, as if it were alone. The ids by log-ratio are
    left out then, for every teacher would have its own.
    """
    check_kinds(config, "audit", "local")
    if not config.teachers:
        return _of_one(config)
    routes, parts = prepare_data(config, tell=False).train_prompts.routes or [], {}
    for number, (name, teacher) in enumerate(config.teachers.items()):
        own = [row for row, weights in enumerate(routes) if weights[number] > 0]
        if not own:
            expected, remedy = "training prompts for every teacher", "Take it out of teachers, or give it some."
            raise UserError("data.teacher_column", expected, f"none for {name}", remedy)
        data = replace(config.data, teacher_column=None)
        alone = replace(config, teacher=teacher, teachers={}, teachers_schedule={}, data=data)
        parts[name] = _of_one(alone, own)
    findings = {f"{name}: {item}": one for name, part in parts.items() for item, one in part.findings.items()}
    probes = [part.probe for part in parts.values() if part.probe]
    probe = {what: sum(one[what] for one in probes) for what in (probes[0] if probes else {})}
    return Audit(findings, [], probe, sum(part.seconds for part in parts.values()))


def _of_one(config: Config, rows: Sequence[int] | None = None) -> Audit:
    """Audit a run with one teacher, by all its training prompts or those of some rows."""
    start = time.perf_counter()
    found = Audit(_without_weights(config), [], {}, time.perf_counter() - start)
    if found.verdict == FAIL:  # every later check compares what ids mean
        return found
    evidence, console = gather(config, rows), Console(file=sys.stderr)
    with evidence.arithmetic():
        for item in track(CHECKS, "audit", console=console, transient=True, disable=not console.is_terminal):
            found.findings[item] = CHECKS[item](evidence)
        tokens = rank_tokens(evidence)
    rollout = evidence.rollout
    probe = {"prompts": len(rollout.prompt_index_B.unique()), "completions": len(rollout),
             "tokens": int(rollout.mask_BT.sum())}  # fmt: skip
    return Audit(found.findings, tokens, probe, time.perf_counter() - start)


def _without_weights(config: Config) -> dict[str, Finding]:
    sections: dict[str, Any] = {"student": config.student, "teacher": config.teacher}
    student, teacher = (load_tokenizer(section, key) for key, section in sections.items())
    rows = [read_model_config(section, key).get_text_config().vocab_size for key, section in sections.items()]
    looks = first_look(config, student)
    del looks["stop tokens"]  # asked again of the models themselves
    return {
        "vocabulary": vocabulary(student, teacher, rows[0], rows[1], config.teacher.extra_tokens),
        "chat template": looks.pop("chat template"),
        **{item: finding for item, finding in looks.items() if finding.verdict != PASS},
    }
