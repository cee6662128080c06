"""What prompts are most likely not meant to be is told before training, and only that."""

import json
import warnings

import pytest

from lit_opd.config import DataConfig
from lit_opd.data.datamodule import PromptDataModule
from lit_opd.data.findings import find_in_prompts
from lit_opd.data.prompts import encode_rows
from lit_opd.errors import LintWarning


def found(tokenizer, train, validation=("z",), **keys):
    config = DataConfig(**keys)
    parts = [encode_rows([{"prompt": prompt} for prompt in part], config, tokenizer) for part in (train, validation)]
    return find_in_prompts(*parts, config, tokenizer)


@pytest.mark.parametrize("chat", [False, True])
def test_nothing_is_said_of_prompts_that_are_as_they_should_be(chat, make_tokenizer):
    tokenizer = make_tokenizer(bos=True, chat=chat)
    assert found(tokenizer, ["a [b] <c", "user: d", "e assistant"], chat=chat) == []
    if chat:
        turns = [{"user": "1+1", "assistant": "2"}]
        assert found(tokenizer, ["a"], chat=True, prompt_template="Q {prompt}", examples=turns) == []


def test_prompts_that_are_too_long_are_counted(tokenizer):
    (dropped,) = found(tokenizer, ["a", "bcd", "efg"], max_prompt_tokens=2)
    assert dropped.startswith(
        "data.max_prompt_tokens: 2 of 3 training prompts have more than 2 tokens and are left out"
    )
    (cut,) = found(tokenizer, ["a"], ["bcd", "e"], max_prompt_tokens=2, overlong="truncate")
    assert "1 of 2 validation prompts have more than 2 tokens and lose their beginning" in cut


@pytest.mark.parametrize(("keys", "key"), [({}, "data.path"), ({"validation_path": "b"}, "data.validation_path")])
def test_validation_prompts_that_are_trained_on_are_counted_as_the_student_reads_them(keys, key, tokenizer):
    (line,) = found(tokenizer, ["a", "b"], ["a", "c"], **keys)
    assert line.startswith(f"{key}: 1 of 2 validation prompts reach the student as training prompts")
    # Different in the data, alike once they are cut.
    lines = found(tokenizer, ["xaaa"], ["yaaa"], max_prompt_tokens=3, overlong="truncate", **keys)
    assert any(line.startswith(f"{key}: 1 of 1 validation prompts") for line in lines)


def test_a_beginning_that_is_written_twice(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    (line,) = found(tokenizer, ["<bos>a", "b"])
    assert line.startswith("data.prompt_column: 1 of 3 prompts begin with '<bos>'")
    (line,) = found(tokenizer, ["a", "b"], prompt_template="<bos>{prompt}")
    assert "3 of 3 prompts begin with '<bos>'" in line
    assert found(make_tokenizer(bos=False), ["<bos>a", "b"]) == []


@pytest.mark.parametrize(
    ("prompt", "marker"),
    [("<bos>[user]a[assistant]", "<bos>"), ("[user]a[assistant]", "[user]"), ("a[assistant]", "[assistant]"),
     ([{"role": "user", "content": "[user]a[assistant]"}], "[user]"), ("a<eos>", "<eos>")],
)  # fmt: skip
def test_a_template_that_is_written_twice(prompt, marker, make_tokenizer):
    (line,) = found(make_tokenizer(bos=True, chat=True), [prompt, "b"], chat=True)
    assert line.startswith(f"data.chat: 1 of 3 prompts hold {marker!r}, and the chat template")


def test_messages_that_are_spelled_as_text(make_tokenizer):
    messages = [{"role": "user", "content": "a"}]
    for spelled in (json.dumps(messages), str(messages)):
        (line,) = found(make_tokenizer(chat=True), [spelled], chat=True)
        assert line.startswith("data.prompt_column: 1 of 2 prompts are lists of messages that are spelled as text")


def test_characters_that_the_tokenizer_does_not_know(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.unk_token = "?"
    (line,) = found(tokenizer, ["a?", "b"])
    assert line.startswith("data.prompt_column: 1 of 3 prompts hold what the tokenizer does not know")


def test_findings_are_told_once_before_training(tokenizer):
    data = PromptDataModule(tokenizer=tokenizer, train_rows=["a", "b"], validation_rows=["a"], batch_size=1)
    with pytest.warns(LintWarning, match=r"^data\.path: 1 of 1 validation prompts"):
        data.setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("validate")
