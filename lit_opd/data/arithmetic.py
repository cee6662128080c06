"""Make additions with their column-by-column working: the task of the tiny pair shipped with the package.

A row for ``37 + 58`` looks like this; ``completion`` is what the teacher was trained to write after ``prompt``::

    {"prompt": "37+58=", "answer": "95", "completion": "7+8=15;3+5+1=9;95"}

Only the standard library is needed, so a prompt source can be inspected without loading torch.
"""

import random
import zlib
from collections.abc import Mapping
from functools import cache

SPLITS = ("train", "validation")
LARGEST_OPERAND = 99
HELD_OUT_ONE_IN = 6


def problems(*, split: str, size: int, seed: int) -> list[dict[str, str]]:
    """Draw distinct addition problems of one split, chosen and ordered by the seed.

    An ordered pair of operands, each from 1 to 99, belongs to ``validation`` when the CRC-32 of
    ``"{smaller}+{larger}"`` is divisible by six, and to ``train`` otherwise. The rule depends on nothing but the
    operands: no seed, size or process can move a pair to the other split, and ``58+37`` is always in the same
    split as ``37+58``, so that a held-out sum was not seen in the other order.

    Raises:
        ValueError: the split is unknown, or has fewer than ``size`` pairs.

    >>> problems(split="validation", size=1, seed=0)[0].keys()
    dict_keys(['prompt', 'answer', 'completion'])
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    pairs = _pairs(split)
    if not 0 <= size <= len(pairs):
        raise ValueError(f"size must be from 0 to {len(pairs)}, the operand pairs of the {split} split, not {size}")
    return [_row(*pair) for pair in random.Random(seed).sample(pairs, size)]


def is_correct(completion: str, row: Mapping[str, str]) -> float:
    """Score a completion by its final answer.

    The answer is what follows the last ``;``, or everything if there is none. The working is not checked. A completion
    which was cut off within a column therefore scores zero, even when that column happens to end in the answer.

    >>> is_correct("7+8=15;3+5+1=9;95", {"answer": "95"})
    1.0
    >>> is_correct("7+8=15;3+5+1=9", {"answer": "9"})
    0.0
    """
    return float(completion.rpartition(";")[2].strip() == row["answer"])


def domain(row: Mapping[str, str]) -> str:
    """Name the kind of a problem, as `data.teacher_column` asks for where each kind has a teacher.

    >>> domain({"prompt": "37+58="}), domain({"prompt": "31+58="})
    ('carry', 'plain')
    """
    a, b = row["prompt"].rstrip("=").split("+")
    return "carry" if int(a) % 10 + int(b) % 10 > 9 else "plain"


def experts(row: Mapping[str, str]) -> dict[str, float]:
    """Give the teacher of a problem's own kind three quarters of the weight, and the other one the rest.

    >>> experts({"prompt": "37+58="})
    {'plain': 0.25, 'carry': 0.75}
    """
    own = domain(row)
    return {name: 0.75 if name == own else 0.25 for name in ("plain", "carry")}


@cache
def _pairs(split: str) -> tuple[tuple[int, int], ...]:
    """List all ordered operand pairs of a split."""
    operands = range(1, LARGEST_OPERAND + 1)
    return tuple((a, b) for a in operands for b in operands if _split_of(a, b) == split)


def _split_of(a: int, b: int) -> str:
    """Name the split of a pair, without Python's own ``hash``, which may differ between processes."""
    key = f"{min(a, b)}+{max(a, b)}".encode()
    return "validation" if zlib.crc32(key) % HELD_OUT_ONE_IN == 0 else "train"


def _row(a: int, b: int) -> dict[str, str]:
    answer = str(a + b)
    return {"prompt": f"{a}+{b}=", "answer": answer, "completion": f"{_working(a, b)};{answer}"}


def _working(a: int, b: int) -> str:
    """Write the columns from the units upwards, each with the carry it received as a third term."""
    columns, carry = [], 0
    while a or b:
        (a, x), (b, y) = divmod(a, 10), divmod(b, 10)
        total = x + y + carry
        columns.append(f"{x}+{y}{'+1' if carry else ''}={total}")
        carry = total // 10
    return ";".join(columns)
