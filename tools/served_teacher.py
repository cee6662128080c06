"""Measure what scoring by a server takes, with how many requests under way, and what its overlap with sampling saves.

Usage, from the root of the repository, with a server of the configured teacher that listens::

    python -m tools.served_teacher --config conf/smollm2.yaml teacher.server=http://127.0.0.1:8000

or, with ``--stand-in SECONDS`` in the place of its address, against the tests' stand-in for a server, which takes so
long for each answer, as one does that computes elsewhere. Sampling and scoring of one batch are timed with completions
scored as they end and after all have ended, in turn, ``--rounds`` times each; medians are printed as a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_opd import DistillationModule
from lit_opd.config import load_config
from lit_opd.distiller import Distiller
from lit_opd.runs.prepare import prepare_data
from lit_opd.teachers import Scorer, ServedScorer
from lit_opd.types import PromptBatch

IN_FLIGHT = (1, 4, 16)
HEAD = """| requests under way | tokens scored a second | sampling, then scoring: seconds | both at once: seconds |
|---|---|---|---|"""


@contextmanager
def stand_in(folder: str, seconds: float) -> Iterator[str]:
    """Listen as a server of a model does, on this machine, and give the address."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from teachers.teacher_servers import TeacherStandIn

    class Slow(TeacherStandIn):
        """Answers after some seconds, and computes nothing again: what it computes on, sampling would need."""

        def complete(self, body: dict[str, Any]) -> Any:
            key = json.dumps(body)
            if key not in known:
                with computing:
                    known[key] = super().complete(body)
            time.sleep(seconds)
            return known[key]

    known: dict[str, Any] = {}
    computing = threading.Lock()
    server = Slow(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
    server.lock = nullcontext()
    with server.listening() as address:
        yield address


def times(distiller: Distiller, batch: PromptBatch) -> tuple[float, float, int]:
    """Sample a batch and score it: the seconds of each, and the tokens."""
    begin = time.perf_counter()
    rollout = distiller.sample(batch)
    sampled = time.perf_counter()
    distiller.score(rollout)
    return sampled - begin, time.perf_counter() - sampled, int(rollout.real_BT.sum())


def measure(files: Sequence[str], overrides: Sequence[str], in_flight: int, rounds: int) -> str:
    """Time the two ways in turn, and make a line of the table."""
    keys = ["teacher.kind=served", "estimator.name=token", "evaluation.teacher=false", f"teacher.in_flight={in_flight}"]
    config = load_config(files, [*overrides, *keys])
    data = prepare_data(config, tell=False)
    distiller = DistillationModule.from_config(config).assemble(None)
    batch = next(iter(data.train_dataloader()))
    ahead, found = ServedScorer.ahead, {"then": [], "at once": []}
    times(distiller, batch)  # the first one makes what the next ones use
    for _ in range(rounds):
        for way, rows in found.items():
            ServedScorer.ahead = ahead if way == "at once" else Scorer.ahead  # type: ignore[method-assign]
            rows.append(times(distiller, batch))
    ServedScorer.ahead = ahead  # type: ignore[method-assign]
    rate = median(tokens / scored for _, scored, tokens in found["then"])
    then, at_once = (median(sampled + scored for sampled, scored, _ in rows) for rows in found.values())
    parts = [median(row[part] for row in found["then"]) for part in (0, 1)]
    return f"| {in_flight} | {rate:.0f} | {parts[0]:.2f} + {parts[1]:.2f} = {then:.2f} | {at_once:.2f} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.served_teacher", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", action="append", required=True, help="the run")
    parser.add_argument("--stand-in", type=float, help="seconds that the stand-in takes for an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="key=value")
    given = parser.parse_args(arguments)
    print(HEAD)
    if given.stand_in is None:
        listening: Any = nullcontext()
    else:
        listening = stand_in(load_config(given.config, given.overrides).teacher.path, given.stand_in)
    with listening as address:
        words = [*given.overrides, *([f"teacher.server={address}"] if address else [])]
        for number in IN_FLIGHT:
            print(measure(given.config, words, number, given.rounds), flush=True)


if __name__ == "__main__":
    main()
