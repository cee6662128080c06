"""What is text in a file is that text, whoever reads it; names are no patterns; damage is named with its place."""

import csv
import json
import os

import pytest
from datasets import Dataset

from lit_opd.config import DataConfig
from lit_opd.data.readers import read_file
from lit_opd.data.rows import load_rows
from lit_opd.data.verifiers import build_verifier
from lit_opd.errors import UserError

TEXTS = ["007", "1e3", "1.50", "2024-01-31", "2024-01-31T10:00:00Z", "true", "NA", "None", "?", "null", "-", "1,000",
         " 5 ", "nan", "12345678901234567890", "a\nb", 'say "no"']  # fmt: skip
ROWS = [{"prompt": f"p{i}", "answer": text} for i, text in enumerate(TEXTS)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write(path, rows=ROWS):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        with path.open("wb") as file:
            Dataset.from_list(rows).to_parquet(file)
    else:
        lines = [json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) if path.suffix == ".jsonl" else f"[{','.join(lines)}]")
    return path


def by_prompt(rows):
    return sorted(rows, key=lambda row: int(row["prompt"][1:]))


@pytest.mark.parametrize("source", ["file", "hub"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_text_reaches_the_verifier_as_it_is_in_the_file(source, suffix, tmp_path):
    path = write(tmp_path / "data" / f"train{suffix}")
    config = DataConfig(source=source, path=str(path if source == "file" else path.parent), validation_size=5)
    config.verifier = "exact"
    train, validation = load_rows(config)
    assert by_prompt(train + validation) == ROWS
    assert {build_verifier(config)(row["answer"], row) for row in train + validation} == {1.0}


def test_numbers_of_json_stay_numbers_and_absent_keys_absent(tmp_path):
    rows = [{"prompt": "p0", "answer": 7}, {"prompt": "p1", "answer": 2**70}, {"prompt": "p2", "level": ["a", None]}]
    assert read_file("data.path", str(write(tmp_path / "rows.jsonl", rows)), {}) == rows


@pytest.mark.parametrize("name", ["a[1].jsonl", "b*.csv", "c::d.parquet", "$HOME.json", "e?.jsonl", "day=3/f.parquet"])
def test_names_are_no_patterns(name, tmp_path):
    assert read_file("data.path", str(write(tmp_path / name)), {}) == ROWS


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p0"}])
    before, stat = read_file("data.path", str(path), {}), path.stat()
    write(path, [{"prompt": "p9"}])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (before, read_file("data.path", str(path), {})) == ([{"prompt": "p0"}], [{"prompt": "p9"}])


def test_files_need_no_cache(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "file" / "cache"))
    assert len(load_rows(DataConfig(path=str(write(tmp_path / "rows.parquet")), validation_size=1))[0]) == 16
    folder = write(tmp_path / "data" / "train.parquet").parent
    with pytest.raises(UserError, match=r"data\.path: .*file/cache.*HF_HOME"):
        load_rows(DataConfig(source="hub", path=str(folder)))


@pytest.mark.parametrize(
    ("name", "text", "kwargs", "rows"),
    [
        ("a.json", '{"version": 1, "data": [{"prompt": "a"}]}', {"field": "data"}, [{"prompt": "a"}]),
        ("a.json", '{"prompt": ["a"]}', {}, [{"prompt": ["a"]}]),
        ("a.json", '{"prompt": "a"}\n\n{"prompt": "b"}\r\n', {}, [{"prompt": "a"}, {"prompt": "b"}]),
        ("a.jsonl", "\ufeff" + '{"prompt": "a\u2028b"}', {}, [{"prompt": "a\u2028b"}]),
        ("a.csv", "\ufeffprompt;answer\na;\n", {"delimiter": ";"}, [{"prompt": "a", "answer": ""}]),
        ("a.csv", "a,1\n", {"fieldnames": ["prompt", "answer"]}, [{"prompt": "a", "answer": "1"}]),
        ("a.csv", "prompt\n" + "a" * 200_000, {}, [{"prompt": "a" * 200_000}]),
        ("a.jsonl", "", {}, []), ("a.csv", "", {}, []), ("a.json", "[]", {}, []), ("a.csv", "prompt\n", {}, []),
    ],
)  # fmt: skip
def test_forms(name, text, kwargs, rows, tmp_path):
    path = tmp_path / name
    path.write_text(text, newline="")
    assert read_file("data.path", str(path), kwargs) == rows


@pytest.mark.parametrize(
    ("name", "content", "kwargs", "key", "says"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n\n{"prompt": }\n', {}, "data.path", "line 3, column 12"),
        ("a.json", b'[{"prompt": "a"},]', {}, "data.path", "line 1"),
        ("a.jsonl", b'{"prompt": "a"}\n"b"', {}, "data.path", "row 1 is no object but 'b'"),
        ("a.json", b"3", {}, "data.path", "row 0 is no object but 3"),
        ("a.json", b"{}", {"field": "data"}, "data.path", "KeyError: 'data'"),
        ("a.csv", b"prompt,answer\na,1\nb\n", {}, "data.path", "line 3 has not the 2 cells"),
        ("a.csv", b"prompt,answer\na,1,2\n", {}, "data.path", "line 2 has not the 2 cells"),
        ("a.csv", b"prompt,prompt\na,b\n", {}, "data.path", "two columns of one name"),
        ("a.csv", b'prompt,answer\n"a,1\n', {}, "data.path", "unexpected end of data"),
        ("a.csv", b"prompt\n\xff\xfe\n", {}, "data.path", "UnicodeDecodeError"),
        ("a.csv", b"prompt\na\n", {"encoding": "nonsense"}, "data.path", "nonsense"),
        ("a.csv", b"prompt\na\n", {"sep": ";"}, "data.kwargs", "'sep'"),
        ("a.json", b"[]", {"split": "train"}, "data.kwargs", "'split'"),
        ("a.parquet", b"PAR1", {}, "data.path", "a.parquet"),
        ("a.jsonl", b"[" * 100_000, {}, "data.path", "RecursionError"),
    ],
)
def test_what_cannot_be_read(name, content, kwargs, key, says, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_file("data.path", str(path), kwargs)
    assert error.value.key == key
    assert says in str(error.value)


SUBSETS = """---
configs:
- config_name: main
  data_files: [{split: train, path: main.jsonl}, {split: test, path: rest.jsonl}]
- config_name: other
  data_files: other.jsonl
---
"""


def test_the_hub_has_subsets_splits_and_parts_of_them(tmp_path):
    (tmp_path / "README.md").write_text(SUBSETS)
    for name, part in {"main.jsonl": ROWS[:4], "rest.jsonl": ROWS[4:8], "other.jsonl": ROWS[8:]}.items():
        write(tmp_path / name, part)

    def load(name, split):
        config = DataConfig(source="hub", path=str(tmp_path), split=split, validation_size=1, kwargs={"name": name})
        return by_prompt([row for part in load_rows(config) for row in part])

    assert load("other", "train") == ROWS[8:]
    assert load("main", "train[:2]+test[50%:]") == [*ROWS[:2], *ROWS[6:8]]
    with pytest.raises(UserError, match=r"data\.path.*split .dev"):
        load("main", "dev")
    with pytest.raises(UserError, match=r"data\.path.*'minor'"):
        load("minor", "train")
