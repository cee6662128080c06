"""Run every check, those without weights first."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import track

from lit_opd.config import Config
from lit_opd.errors import RunError
from lit_opd.lab.audit.direction import sign_test
from lit_opd.lab.audit.endings import stop_tokens, teacher_at_ends
from lit_opd.lab.audit.equal_models import null_test
from lit_opd.lab.audit.evidence import Evidence, gather
from lit_opd.lab.audit.findings import FAIL, Finding, worst
from lit_opd.lab.audit.prefixes import student_prefixes
from lit_opd.lab.audit.quantization import quantised_teacher
from lit_opd.lab.audit.ranking import TokenRow, log_ratios, rank_tokens
from lit_opd.lab.audit.score import sampler_gap, sampling_law
from lit_opd.lab.audit.tokenizers import chat_template, segmentation, vocabulary
from lit_opd.models import load_tokenizer, read_model_config
from lit_opd.runs.prepare import check_local_teacher

__all__ = ["CHECKS", "Audit", "audit"]

CHECKS: tuple[Callable[[Evidence], Finding], ...] = (
    segmentation,
    stop_tokens,
    teacher_at_ends,
    log_ratios,
    null_test,
    sign_test,
    sampling_law,
    sampler_gap,
    quantised_teacher,
    student_prefixes,
)


@dataclass(frozen=True)
class Audit:
    """What an audit came to.

    Attributes:
        findings: one an item.
        tokens: the ids that the student wrote, the largest mean log-ratio first; empty where no weights were read.
        probe: how many prompts, completions and counted tokens were looked at.
        seconds: how long it took.
    """

    findings: list[Finding]
    tokens: list[TokenRow]
    probe: dict[str, int]
    seconds: float

    @property
    def verdict(self) -> str:
        """The worst of all findings."""
        return worst(self.findings)

    def enforce(self) -> None:
        """Raise where an item fails.

        Raises:
            RunError: naming the items.
        """
        failed = [finding.item for finding in self.findings if finding.verdict == FAIL]
        if failed:
            raise RunError(f"the audit: {len(failed)} of {len(self.findings)} items fail ({', '.join(failed)}).")


def audit(config: Config) -> Audit:
    """Look for what would spoil a long run: everything is read, nothing is written, no weight moves.

    Args:
        config: the run.

    Raises:
        UserError: whatever `fit` would refuse.
    """
    start = time.perf_counter()
    check_local_teacher(config, "audit")
    findings = _without_weights(config)
    if worst(findings) == FAIL:  # every later check compares what ids mean
        return Audit(findings, [], {}, time.perf_counter() - start)
    evidence = gather(config)
    quiet = not Console(file=sys.stderr).is_terminal
    with evidence.arithmetic():
        for check in track(CHECKS, "audit", console=Console(file=sys.stderr), transient=True, disable=quiet):
            findings.append(check(evidence))
        tokens = rank_tokens(evidence)
    rollout = evidence.rollout
    probe = {"prompts": len(rollout.prompt_index_B.unique()), "completions": len(rollout),
             "tokens": int(rollout.mask_BT.sum())}  # fmt: skip
    return Audit(findings, tokens, probe, time.perf_counter() - start)


def _without_weights(config: Config) -> list[Finding]:
    student, teacher = load_tokenizer(config.student, "student"), load_tokenizer(config.teacher, "teacher")
    return [
        vocabulary(student, teacher, _rows(config.student, "student"), _rows(config.teacher, "teacher")),
        chat_template(student, teacher, config.data),
    ]


def _rows(section: Any, key: str) -> int:
    return int(read_model_config(section, key).get_text_config().vocab_size)
