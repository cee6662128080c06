"""Measure steps of ours and of TRL's DistillationTrainer in turn, against the limit of the machine they run on.

Usage, from the root of the repository, with ``lit_opd[demo]``, after ``python tools/make_smollm2_pair.py``:
``python -m tools.benchmark w1|w2|w3|growth|gpu [--steps N] [--rounds R] [--out docs] [--quick]``

W1 is 8 prompts with a completion of exactly 64 tokens each, W2 is 4 prompts with 4 completions each of up to 128, W3 is
the two heads alone, and growth is W1 with longer and longer completions; `workloads`, `head` and `growth` say the rest.
gpu measures one accelerator, needs no model folder, and is described in `gpu`; with ``--tiny`` it runs on a CPU too.
W1 and W2 run on the CPU, ours and TRL's in turn, each run in a process of its own, and in the end TRL once as it is
shipped and once with the allocator set as for ours. The first two steps of a run are not counted. `roofline`
says what the limit is. TRL is needed for its side alone (``pip install trl==1.16.0``). Writes ``benchmark_<what>.json``
and ``.md``, and the picture ``benchmark_growth.png``.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from tools.benchmark import gpu, growth, head_cases, turns
from tools.benchmark.report import WARM_UP, Options
from tools.make_smollm2_pair import PairError

COMMANDS: dict[str, Callable[[Options], None]] = {
    "w1": turns.measure,
    "w2": turns.measure,
    "w3": head_cases.measure,
    "growth": growth.measure,
    "gpu": gpu.measure,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=COMMANDS)
    parser.add_argument("--steps", type=int, help="steps of a run (timed runs of a case in w3)")
    parser.add_argument("--rounds", type=int, help="runs of every side (of every case in w3)")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a few steps of the smallest sizes, to see that it runs")
    parser.add_argument("--tiny", action="store_true", help="of gpu: tiny models, to see on any device that it runs")
    parser.add_argument(
        "--paths", choices=("auto", "plain", "fast"), default="auto", help="of gpu: optim.paths of ours"
    )
    given = parser.parse_args(arguments)
    steps, rounds = (3, 1) if given.quick else (8, 3)
    if given.what not in ("w3", "gpu") and (given.steps or steps) <= WARM_UP:
        parser.error(f"--steps: expected more than {WARM_UP}, which are not counted, found {given.steps}")
    transformers_logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # not leaving the process of a run behind
    options = Options(
        given.what, given.steps or steps, given.rounds or rounds, given.out, given.quick, given.tiny, given.paths
    )
    if given.what == "gpu" and not given.tiny and not torch.accelerator.is_available():
        parser.error("gpu: expected an accelerator, found none; --tiny runs tiny models on a CPU")
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        COMMANDS[given.what](options)
    except PairError as error:
        raise SystemExit(f"{parser.prog}: {error}") from None


if __name__ == "__main__":
    main()
