import json
import sys

import pytest
from datasets import Dataset
from hypothesis import given, reject
from hypothesis import strategies as st

from lit_opd.config import DataConfig
from lit_opd.data.rows import load_rows, split_rows
from lit_opd.errors import UserError

ROWS = [{"prompt": f"{i}+1=", "answer": f"s{i + 1}"} for i in range(12)]
SUM = "lit_opd.data.arithmetic:problems"


def by_prompt(rows):
    return sorted(rows, key=lambda row: row["prompt"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    def write(name, rows=ROWS):
        path = tmp_path / name
        data = Dataset.from_list(rows)
        writers = {".parquet": data.to_parquet, ".csv": data.to_csv, ".jsonl": data.to_json}
        if path.suffix == ".json":
            path.write_text(json.dumps(rows))
        else:
            writers[path.suffix](str(path))
        return str(path)

    return write


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_file_format_is_read(suffix, write):
    train, validation = load_rows(DataConfig(path=write("rows" + suffix), validation_size=5))
    assert len(validation) == 5
    assert by_prompt(train + validation) == by_prompt(ROWS)


def test_validation_file_is_used_as_it_is(write):
    config = DataConfig(
        path=write("a.jsonl"), validation_path=write("b.csv", ROWS[:4]), train_size=7, validation_size=3
    )
    assert load_rows(config) == (ROWS[:7], ROWS[:3])


def test_hub_reads_a_split_and_divides_it(tmp_path, write):
    write("train.jsonl")
    write("test.jsonl", ROWS[:6])
    config = DataConfig(source="hub", path=str(tmp_path), split="test", validation_size=2)
    train, validation = load_rows(config)
    assert by_prompt(train + validation) == ROWS[:6]
    assert (train, validation) == split_rows(ROWS[:6], config)


rows_of_prompts = st.lists(st.integers(0, 9), min_size=2, max_size=20).map(
    lambda numbers: [{"prompt": str(n), "answer": i} for i, n in enumerate(numbers)]
)


@given(rows_of_prompts, st.integers(1, 6), st.randoms())
def test_split_depends_on_prompts_alone(rows, size, random):
    config = DataConfig(validation_size=size)
    try:
        train, validation = split_rows(rows, config)
    except UserError:  # no training row left
        reject()
    assert len(validation) == size
    held_out = {row["prompt"] for row in validation}
    assert not held_out & {row["prompt"] for row in train}
    # What is on neither side repeats the last held-out prompt.
    missing = [row for row in rows if row not in train and row not in validation]
    assert {row["prompt"] for row in missing} <= {validation[-1]["prompt"]}
    shuffled = random.sample(rows, len(rows))
    again, held_out_again = split_rows(shuffled, config)
    assert [row["prompt"] for row in again] == [row["prompt"] for row in train]
    assert [row["prompt"] for row in held_out_again] == [row["prompt"] for row in validation]


def test_split_is_stated_for_ever():
    # Changing the rule would move validation prompts of old runs into the training of new ones.
    _, validation = split_rows(ROWS, DataConfig(validation_size=3))
    assert [row["prompt"] for row in validation] == ["8+1=", "0+1=", "2+1="]


def test_split_seed_and_size():
    first = split_rows(ROWS, DataConfig(validation_size=4))[1]
    assert split_rows(ROWS, DataConfig(validation_size=6))[1][:4] == first
    assert split_rows(ROWS, DataConfig(validation_size=4, validation_seed=1))[1] != first


def test_split_takes_messages():
    rows = [{"prompt": [{"role": "user", "content": str(i)}]} for i in range(3)]
    assert len(split_rows(rows, DataConfig(validation_size=1))[0]) == 2


def test_nothing_left_to_train_on():
    with pytest.raises(
        UserError, match=r"data\.validation_size: expected fewer than the 12 different prompts of 12 rows"
    ):
        split_rows(ROWS, DataConfig(validation_size=12))


# 0 to 9 plus or minus 0 to 9: only 200 questions, so that training draws run into held-out ones.
SMALL_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.mark.parametrize(("task", "kwargs"), [("chain_sum", SMALL_SUMS), ("spell_backward", {})])
def test_reasoning_gym_holds_validation_questions_out(task, kwargs):
    config = DataConfig(source="reasoning_gym", path=task, train_size=30, validation_size=20, kwargs=kwargs)
    train, validation = load_rows(config)
    assert (len(train), len(validation)) == (30, 20)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}
    assert set(train[0]) == {"prompt", "answer", "metadata"}
    assert load_rows(config) == (train, validation)


def test_reasoning_gym_says_how_many_questions_are_left():
    config = DataConfig(source="reasoning_gym", path="chain_sum", train_size=30, validation_size=600, kwargs=SMALL_SUMS)
    with pytest.warns(UserWarning, match=r"chain_sum gave only \d+ questions"):
        train, validation = load_rows(config)
    assert 0 < len(train) < 30
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in validation}
    config.validation_size = 3000
    with pytest.raises(UserError, match=r"data\.validation_size: expected chain_sum to have questions"):
        load_rows(config)


def test_columns_of_generated_rows_follow_the_configuration():
    config = DataConfig(source="reasoning_gym", path="chain_sum", train_size=1, validation_size=1)
    config.prompt_column, config.answer_column = "q", "a"
    assert {"q", "a", "metadata"} == set(load_rows(config)[0][0])


def test_function():
    config = DataConfig(source="function", path=SUM, train_size=5, validation_size=3)
    train, validation = load_rows(config)
    assert (len(train), len(validation)) == (5, 3)
    assert set(train[0]) == {"prompt", "answer", "completion"}


def test_function_of_a_file_gets_its_settings_and_may_give_more(tmp_path):
    file = tmp_path / "prompts.py"
    file.write_text(
        "def rows(*, split, size, seed, word):\n"
        "    return ({'prompt': f'{word}{split}{size}{seed}{i}'} for i in range(9))\n"
    )
    config = DataConfig(source="function", path=f"{file}:rows", validation_size=2, validation_seed=7)
    config.kwargs = {"word": "w"}
    train, validation = load_rows(config)
    assert len(train) == 9
    assert train[0] == {"prompt": "wtrainNone70"}
    assert validation == [{"prompt": "wvalidation270"}, {"prompt": "wvalidation271"}]


@pytest.mark.parametrize(
    ("keys", "key", "says"),
    [
        ({}, "data.path", "Set data.path"),
        ({"source": "fil", "path": "a"}, "data.source", "Did you mean 'file'"),
        ({"path": "none.jsonl"}, "data.path", "no file 'none.jsonl'"),
        ({"path": __file__}, "data.path", ".jsonl"),
        ({"source": "hub", "path": "/none", "kwargs": {}}, "data.path", "data.split"),
        ({"source": "function", "path": SUM, "validation_path": "a"}, "data.validation_path", "Unset it"),
        ({"source": "function", "path": SUM, "split": "test"}, "data.split", "Unset it"),
        ({"source": "function", "path": SUM}, "data.path", "data.train_size"),
        ({"source": "function", "path": SUM, "train_size": 10**6}, "data.path", "operand pairs"),
        ({"source": "function", "path": SUM, "train_size": 1, "kwargs": {"a": 1}}, "data.path", "data.kwargs"),
        ({"source": "reasoning_gym", "path": "chain_sum"}, "data.train_size", "Set e.g."),
        ({"source": "reasoning_gym", "path": "chain_sums", "train_size": 1}, "data.path", "Did you mean 'chain_sum'"),
        ({"source": "reasoning_gym", "path": "chain_sum", "train_size": 1, "kwargs": {"a": 1}}, "data.kwargs", "'a'"),
    ],
)
def test_mistakes(keys, key, says):
    with pytest.raises(UserError) as error:
        load_rows(DataConfig(**keys))
    assert error.value.key == key
    assert says in str(error.value)


def test_missing_columns_are_named(write):
    path = write("rows.jsonl", [{"question": "a", "answer": "b"}] * 3)
    with pytest.raises(UserError, match=r"data\.prompt_column.*'prompt'.*columns question, answer.*Set data"):
        load_rows(DataConfig(path=path))
    config = DataConfig(path=path, prompt_column="question", answer_column="solution", verifier="exact")
    with pytest.raises(UserError, match=r"data\.answer_column.*'solution'.*columns question, answer"):
        load_rows(config)


@pytest.mark.parametrize("answer", ["", None, [1], {"a": 1}, float("nan")])
def test_an_answer_that_no_completion_can_be_is_refused(answer, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "answer": a}) + "\n" for a in (7, True, "x", answer)))
    with pytest.raises(
        UserError, match=r"data\.answer_column: expected a column 'answer' with text in every row.*row 3"
    ):
        load_rows(DataConfig(path=str(path), validation_path=str(path), verifier="exact"))
    assert len(load_rows(DataConfig(path=str(path), validation_path=str(path)))[0]) == 4


def test_an_answer_is_needed_only_to_compare_with(write):
    path = write("rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    assert len(load_rows(DataConfig(path=path, validation_size=1))[0]) == 1


@pytest.mark.parametrize("text", ["", "{not json\n"])
def test_file_without_rows(text, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=r"data\.path"):
        load_rows(DataConfig(path=str(path)))


def test_function_without_rows(tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("def rows(**settings):\n    return []\n")
    with pytest.raises(UserError, match=r"data\.path: expected at least one row"):
        load_rows(DataConfig(source="function", path=f"{file}:rows"))


@pytest.mark.parametrize(
    ("source", "package"), [("hub", "datasets"), ("file", "pyarrow.parquet"), ("reasoning_gym", "reasoning_gym")]
)
def test_missing_package_names_its_extra(source, package, write, monkeypatch):
    path = write("rows.parquet")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r'pip install "lit_opd\[demo\]"'):
        load_rows(DataConfig(source=source, path=path, train_size=1))
