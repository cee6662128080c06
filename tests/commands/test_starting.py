"""`init` writes a configuration that `fit` takes as it is."""

import json

import pytest
import yaml

from lit_opd.cli import main
from lit_opd.config import load_config

TINY = ("--student", "${lit_opd:tiny/student}", "--teacher", "${lit_opd:tiny/teacher}")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def make(name="rows.jsonl", **columns):
        rows = [{key: value.format(i, i + 1) for key, value in columns.items()} for i in range(40)]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return tmp_path

    return make


def test_the_written_file_says_what_models_and_data_are(place, capsys):
    folder = place(question="{}+{}=", answer="so {}.")
    assert main(["init", *TINY, "--data", "rows.jsonl", "--out", "my.yaml"]) == 0
    told = capsys.readouterr().out
    assert "40 rows of rows.jsonl, prompts in 'question' without a chat template, answers in 'answer'" in told
    assert "python -m lit_opd fit --config my.yaml --dry-run" in told
    config = load_config("my.yaml")
    assert (config.data.prompt_column, config.data.answer_column) == ("question", "answer")
    assert (config.data.verifier, config.data.validation_size, config.data.chat) == ("last_number", 4, False)
    assert config.data.max_prompt_tokens + config.rollout.max_new_tokens == 64  # the context of the pair
    text = (folder / "my.yaml").read_text()
    section = ("estimator:", "  kwargs:", "    divergence:")
    bare = [line for line in text.splitlines() if line and "#" not in line and not line.startswith(section[2])]
    assert bare == []  # every key has its comment
    assert yaml.safe_load(text)["student"]["path"] == "${lit_opd:tiny/student}"
    before = sorted(folder.iterdir())
    assert main(["fit", "--config", "my.yaml", "--dry-run"]) == 0
    assert "rows.jsonl: 36 prompts, 16 x 1 completions a step; 4 held out" in capsys.readouterr().out
    assert sorted(folder.iterdir()) == before


def test_answers_of_words_are_judged_by_nobody(place, capsys):
    place(prompt="{}+{}=", output="some words")
    assert main(["init", *TINY, "--data", "rows.jsonl", "--out", "my.yaml"]) == 0
    assert "judged by nobody (data.verifier)" in capsys.readouterr().out
    assert load_config("my.yaml").data.verifier is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--data none.jsonl", "--data: expected a file, found no file 'none.jsonl'."),
        ("--data other.jsonl", "found the columns title. Rename the column with the prompts to prompt."),
        ("--out there.yaml", "--out: expected a new file, found 'there.yaml', which exists."),
        ("--student nowhere", "student.path: expected"),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(place, capsys, words, told):
    folder = place("other.jsonl", title="{} {}")
    place(prompt="{}+{}=")
    (folder / "there.yaml").touch()
    before = sorted(folder.iterdir())
    given = dict(zip(TINY[::2], TINY[1::2], strict=True)) | {"--data": "rows.jsonl", "--out": "my.yaml"}
    given |= [words.split()]
    assert main(["init", *(word for pair in given.items() for word in pair)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert sorted(folder.iterdir()) == before
