import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_opd.data import arithmetic
from lit_opd.data.arithmetic import is_correct, problems

SPLIT_SIZES = {"train": 8120, "validation": 1681}
operands = st.integers(1, arithmetic.LARGEST_OPERAND)
seeds = st.integers(0, 2**32)


def operands_of(row):
    first, second = row["prompt"].removesuffix("=").split("+")
    return int(first), int(second)


def pairs(split):
    return {operands_of(row) for row in problems(split=split, size=SPLIT_SIZES[split], seed=0)}


def test_splits_partition_all_operand_pairs():
    train, validation = pairs("train"), pairs("validation")
    assert not train & validation
    assert len(train | validation) == arithmetic.LARGEST_OPERAND**2
    assert 0.15 < len(validation) / arithmetic.LARGEST_OPERAND**2 < 0.20


def test_swapped_operands_are_in_the_same_split():
    for split in SPLIT_SIZES:
        assert {(b, a) for a, b in pairs(split)} == pairs(split)


def test_training_covers_every_column():
    train = pairs("train")
    assert len({(a % 10, b % 10) for a, b in train}) == 100
    assert len({(a // 10, b // 10) for a, b in train}) == 100


def test_split_rule_is_the_documented_one():
    rows = problems(split="validation", size=3, seed=0)
    assert [row["prompt"] for row in rows] == ["46+18=", "91+71=", "49+81="]


def test_rows_do_not_depend_on_hash_randomisation():
    code = "from lit_opd.data.arithmetic import problems; print(problems(split='train', size=20, seed=3))"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
        assert output.decode().strip() == str(problems(split="train", size=20, seed=3))


@given(seed=seeds, size=st.integers(0, 200), split=st.sampled_from(sorted(SPLIT_SIZES)))
def test_problems_are_distinct_and_repeatable(seed, size, split):
    rows = problems(split=split, size=size, seed=seed)
    assert len({row["prompt"] for row in rows}) == len(rows) == size
    assert rows == problems(split=split, size=size, seed=seed)


def test_seed_changes_the_problems():
    assert problems(split="train", size=20, seed=0) != problems(split="train", size=20, seed=1)


def test_callers_may_change_their_rows():
    problems(split="train", size=1, seed=0)[0]["answer"] = "0"
    assert problems(split="train", size=1, seed=0)[0]["answer"] != "0"


@given(seed=seeds)
def test_working_is_true_arithmetic(seed):
    (row,) = problems(split="train", size=1, seed=seed)
    *columns, answer = row["completion"].split(";")
    totals = [int(column.partition("=")[2]) for column in columns]
    assert all(
        sum(map(int, column.partition("=")[0].split("+"))) == total
        for column, total in zip(columns, totals, strict=True)
    )
    assert len(columns) == max(len(str(operand)) for operand in operands_of(row))
    # The columns, units first, spell the answer: all but the last pass their tens on as a carry.
    digits = "".join(str(total % 10) for total in totals[:-1])[::-1]
    assert f"{totals[-1]}{digits}" == answer == row["answer"] == str(sum(operands_of(row)))
    assert is_correct(row["completion"], row) == 1.0


@pytest.mark.parametrize(
    ("a", "b", "completion"),
    [
        (37, 58, "7+8=15;3+5+1=9;95"),
        (3, 4, "3+4=7;7"),
        (5, 9, "5+9=14;14"),
        (77, 3, "7+3=10;7+0+1=8;80"),
        (99, 99, "9+9=18;9+9+1=19;198"),
    ],
)
def test_reference_working(a, b, completion):
    assert arithmetic._row(a, b) == {"prompt": f"{a}+{b}=", "answer": str(a + b), "completion": completion}


@given(a=operands, b=operands, wrong=st.integers(0, 999))
def test_verifier_accepts_only_the_answer(a, b, wrong):
    row = arithmetic._row(a, b)
    working = row["completion"].rpartition(";")[0]
    assert is_correct(f"{working};{wrong}", row) == float(wrong == a + b)
    assert is_correct(str(wrong), row) == float(wrong == a + b)


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("7+8=15;3+5+1=9;95", 1.0),
        ("95", 1.0),
        (" 95\n", 1.0),
        ("7+8=16;95", 1.0),  # a wrong working, and yet the final answer
        ("7+8=15;3+5+1=9;59", 0.0),
        ("7+8=15;3+5+1=9;95;", 0.0),
        ("7+8=15;3+5+1=95", 0.0),
        ("95;94", 0.0),
        ("095", 0.0),
        ("9 5", 0.0),
        ("", 0.0),
    ],
)
def test_verifier_cases(completion, score):
    assert is_correct(completion, {"prompt": "37+58=", "answer": "95"}) == score


@pytest.mark.parametrize("split", ["test", "Train", ""])
def test_unknown_split_names_the_known_ones(split):
    with pytest.raises(ValueError, match=f"train, validation, not '{split}'"):
        problems(split=split, size=1, seed=0)


@pytest.mark.parametrize("size", [-1, SPLIT_SIZES["validation"] + 1])
def test_impossible_size_tells_the_limit(size):
    with pytest.raises(ValueError, match=f"0 to 1681, the operand pairs of the validation split, not {size}"):
        problems(split="validation", size=size, seed=0)


def test_needs_no_torch():
    source = "import sys, importlib.util as u; s = u.spec_from_file_location('m', sys.argv[1]); "
    source += "s.loader.exec_module(u.module_from_spec(s)); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", source, arithmetic.__file__], check=True)
