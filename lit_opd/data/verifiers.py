"""Judge answers: a verifier gives a completion a reward from 0 to 1.

The data module builds the configured one. Evaluations, and estimators that learn from rewards, call it.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import partial
from typing import Any

from lit_opd.config import DataConfig
from lit_opd.data.guarded import Verifier
from lit_opd.data.readers import import_extra
from lit_opd.data.rows import reasoning_gym_task
from lit_opd.errors import UserError, suggest
from lit_opd.plugins import import_object

__all__ = ["Verifier", "build_verifier", "last_number"]

# A sign counts where it cannot be an operator: "5-3" ends in 3. Groups of three digits may be divided by commas.
_SIGN = r"(?:(?<![0-9A-Za-z)\]])[-+\u2212])?"
_NUMBER = re.compile(rf"{_SIGN}(?:(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
MATH_SECONDS = 5


def build_verifier(config: DataConfig) -> Verifier | None:
    """Build the verifier that `config.verifier` names.

    - null: none.
    - `exact`: the completion is the answer, but for white space around it.
    - `last_number`: the last number of the completion equals the last number of the answer.
    - `math`: math-verify finds the two equal.
    - `reasoning_gym`: the task's own score of what is inside `<answer>` tags, or of the whole completion.
    - `package.module:function` or `file.py:function`: called as `function(completion, row)`, `row` being a mapping with
      the columns of the data, as `row["answer"]`.

    Raises:
        UserError: an unknown name, a missing package, or no answer column to compare with.
    """
    builders: dict[str, Callable[[DataConfig], Verifier]] = {
        "exact": lambda config: _compare(_exact, config),
        "last_number": lambda config: _compare(_same_last_number, config),
        "math": _math,
        "reasoning_gym": _reasoning_gym,
    }
    name = config.verifier
    if name is None:
        return None
    if name in builders:
        return builders[name](config)
    if ":" in name:
        return import_object("data.verifier", name)
    remedy = suggest(name, builders)
    raise UserError("data.verifier", f"null, {', '.join(builders)} or package.module:function", repr(name), remedy)


def last_number(text: str) -> Decimal | None:
    """Find the last number written in a text, or None.

    >>> last_number("It costs $-1,234.50."), last_number("3, then 5-3"), last_number("none")
    (Decimal('-1234.50'), Decimal('3'), None)
    """
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("\u2212", "-")) if numbers else None


# Verifiers are partials of module functions, not closures, so that a data module can be pickled to other processes.


def _compare(same: Callable[[str, str], bool], config: DataConfig) -> Verifier:
    if config.answer_column is None:
        expected, remedy = f"the column data.verifier={config.verifier} compares with", "Set data.answer_column."
        raise UserError("data.answer_column", expected, "null", remedy)
    return partial(_verify_answer, same=same, column=config.answer_column)


def _verify_answer(completion: str, row: Mapping[str, Any], *, same: Callable[[str, str], bool], column: str) -> float:
    if row.get(column) is None:
        remedy = "Set data.answer_column to one of the columns."
        raise UserError("data.answer_column", f"a column {column!r} in every row", f"columns {', '.join(row)}", remedy)
    return float(same(completion, str(row[column])))


def _exact(completion: str, answer: str) -> bool:
    return completion.strip() == answer.strip()


def _same_last_number(completion: str, answer: str) -> bool:
    wanted = last_number(answer)
    if wanted is None:
        found, remedy = repr(answer), "Choose another column or another verifier."
        raise UserError("data.answer_column", "an answer with a number for data.verifier=last_number", found, remedy)
    return last_number(completion) == wanted


def _math(config: DataConfig) -> Verifier:
    import_extra("data.verifier", "math_verify", "maths")
    return _compare(_same_mathematics, config)


def _same_mathematics(completion: str, answer: str) -> bool:
    from math_verify import parse, verify

    # math_verify's time limit is a signal, which only the main thread may set: elsewhere there is none.
    on_main_thread = threading.current_thread() is threading.main_thread()
    seconds: Any = MATH_SECONDS if on_main_thread else None
    # math_verify finds a bare formula such as x^2+1 only between dollars.
    wanted = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$", parsing_timeout=seconds)
    given = parse(completion, parsing_timeout=seconds)
    return bool(verify(wanted, given, timeout_seconds=seconds))


def _reasoning_gym(config: DataConfig) -> Verifier:
    if config.source != "reasoning_gym":
        remedy = "Choose another verifier or source."
        raise UserError("data.verifier", "reasoning_gym only with data.source=reasoning_gym", config.source, remedy)
    task = reasoning_gym_task(config, size=1, seed=config.validation_seed)
    answer_column = config.answer_column or "answer"
    return partial(_score, task=task, prompt_column=config.prompt_column, answer_column=answer_column)


def _score(completion: str, row: Mapping[str, Any], *, task: Any, prompt_column: str, answer_column: str) -> float:
    from reasoning_gym.utils import extract_answer

    entry = {"question": row[prompt_column], "answer": row[answer_column], "metadata": row["metadata"]}
    try:
        return float(task.score_answer(extract_answer(completion) or completion.strip(), entry))
    except Exception:  # some reasoning_gym tasks raise on text that they cannot parse, and no text may end a run
        return 0.0
