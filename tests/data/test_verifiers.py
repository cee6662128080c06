import pickle
import sys
import threading
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_opd.config import DataConfig
from lit_opd.data.rows import load_rows
from lit_opd.data.verifiers import build_verifier, last_number
from lit_opd.errors import UserError

CHAIN_SUM = {"source": "reasoning_gym", "path": "chain_sum", "train_size": 4, "validation_size": 4}


def verdict(name, completion, answer, **keys):
    return build_verifier(DataConfig(verifier=name, **keys))(completion, {"answer": answer})


def test_no_verifier():
    assert build_verifier(DataConfig()) is None


@pytest.mark.parametrize(
    ("completion", "answer", "reward"), [(" 42\n", "42", 1.0), ("42", 42, 1.0), ("42.", "42", 0.0), ("", "42", 0.0)]
)
def test_exact(completion, answer, reward):
    assert verdict("exact", completion, answer) == reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 72.", "72"), ("$1,234,567.50 in all.", "1234567.50"), ("x = -3", "-3"), ("x=-3", "-3"),
        ("5-3", "3"), ("(2)-7", "7"), ("+4", "4"), ("\u22125", "-5"), ("1,2", "2"), ("1,2345", "2345"), (".5", "0.5"),
        ("v1.5.", "1.5"), ("7 apples, no more", "7"), ("#### 1,000", "1000"), ("none", None), ("", None),
    ],
)  # fmt: skip
def test_last_number_reads(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
def test_last_number_reads_what_python_writes(number):
    assert last_number(f"so 3 and 4 make {number:,}.") == number


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [("9+3=12.0.", "12", 1.0), ("12 or 13", "12", 0.0), ("no idea", "12", 0.0), ("1000", "9+1 #### 1,000", 1.0)],
)
def test_last_number(completion, answer, reward):
    assert verdict("last_number", completion, answer) == reward


def test_last_number_wants_a_number_to_compare_with():
    with pytest.raises(UserError, match=r"data\.answer_column.*'yes'"):
        verdict("last_number", "12", "yes")


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("The answer is $0.5$.", "\\frac{1}{2}", 1.0), ("so $1 + x^2$", "x^2+1", 1.0), ("\\boxed{7}", "$7$", 1.0),
        ("so $x^2$", "x^2+1", 0.0), ("no idea", "3", 0.0), ("", "3", 0.0),
    ],
)  # fmt: skip
def test_math(completion, answer, reward):
    assert verdict("math", completion, answer) == reward


def test_math_outside_the_main_thread():
    rewards = []
    thread = threading.Thread(target=lambda: rewards.append(verdict("math", "$0.5$", "\\frac{1}{2}")))
    thread.start()
    thread.join()
    assert rewards == [1.0]


def test_math_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r'pip install "lit_opd\[maths\]"'):
        build_verifier(DataConfig(verifier="math"))


@pytest.mark.parametrize("task", ["chain_sum", "gcd"])
def test_reasoning_gym_scores_its_own_answers(task):
    config = DataConfig(**{**CHAIN_SUM, "path": task}, verifier="reasoning_gym")
    verify = build_verifier(config)
    for row in load_rows(config)[1]:
        assert verify(f" {row['answer']}\n", row) == 1.0
        assert verify(f"I think <answer>{row['answer']}</answer> is it", row) == 1.0
        assert verify("no idea", row) == 0.0


def test_reasoning_gym_task_that_raises_gives_nothing():
    config = DataConfig(**{**CHAIN_SUM, "path": "prime_factorization"}, verifier="reasoning_gym")
    verify = build_verifier(config)
    row = load_rows(config)[1][0]
    assert verify("a * b", row) == 0.0
    assert verify(row["answer"], row) == 1.0


def test_reasoning_gym_needs_its_source():
    with pytest.raises(UserError, match=r"data\.verifier.*data\.source=reasoning_gym"):
        build_verifier(DataConfig(verifier="reasoning_gym"))


def test_function():
    assert verdict("lit_opd.data.arithmetic:is_correct", "7+8=15;15", "15") == 1.0


def test_unknown_name_is_corrected():
    with pytest.raises(UserError, match="Did you mean 'last_number'"):
        build_verifier(DataConfig(verifier="lastnumber"))


@pytest.mark.parametrize("name", ["exact", "last_number", "math"])
def test_answer_column_is_needed(name):
    with pytest.raises(UserError, match=r"data\.answer_column.*null"):
        build_verifier(DataConfig(verifier=name, answer_column=None))
    with pytest.raises(UserError, match=r"data\.answer_column.*columns question"):
        build_verifier(DataConfig(verifier=name))("1", {"question": "1?"})


@pytest.mark.parametrize(
    "config",
    [*(DataConfig(verifier=v) for v in ("exact", "last_number", "math", "lit_opd.data.arithmetic:is_correct")),
     DataConfig(verifier="reasoning_gym", **CHAIN_SUM)],
)  # fmt: skip
def test_verifiers_go_to_other_processes(config):
    assert callable(pickle.loads(pickle.dumps(build_verifier(config))))
