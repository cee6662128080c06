"""What a key may be given: words as they were written, numbers in bounds, declared types from Python too."""

import math
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from omegaconf import MISSING

from lit_opd.config import Config, DataConfig, EvaluationConfig, OptimConfig, StudentConfig, as_section, load_config
from lit_opd.config.limits import type_options
from lit_opd.errors import UserError

PATHS = ("student.path=s", "teacher.path=t")
SECTIONS = [Config, *(hint for hint in get_type_hints(Config).values() if is_dataclass(hint))]


WRITTEN = ["no", "off", "on", "y", "yes", "true", "010", "0x10", "1:30", "1e-3", "1_000", ".inf", "2024-01-01", "None",
           "?", "- x", "#1", "a: b", "{prompt}", "[a", "*x", "!t", "%", "@x", "it's", "'a' or 'b'"]  # fmt: skip


@pytest.mark.parametrize("word", WRITTEN)
def test_text_of_an_override_is_what_was_written(word):
    config = load_config([], [*PATHS, f"data.answer_column={word}", f"tracking.tags.note={word}"])
    assert (config.data.answer_column, config.tracking.tags) == (word, {"note": word})


@pytest.mark.parametrize("word", WRITTEN[:14])
def test_a_word_of_a_file_is_what_was_written(write, word):
    text = f"data: {{answer_column: {word}}}\ntracking: {{tags: {{{word}: {word}}}}}\nlint: {{allow: [{word}]}}\n"
    config = load_config([write("words.yaml", text)], PATHS)
    assert (config.data.answer_column, config.tracking.tags, config.lint.allow) == (word, {word: word}, [word])


def test_every_documented_word_of_a_key_can_be_written(write):
    (file,) = [write("words.yaml", "collapse: {action: off}\ndata: {chat: yes, answer_column: null}\nseed: 010\n")]
    for config in (load_config([file], PATHS), load_config([], [*PATHS, "collapse.action=off", "data.chat=on",
                                                               "data.answer_column=null", "seed=010"])):  # fmt: skip
        assert (config.collapse.action, config.data.chat, config.data.answer_column) == ("off", True, None)
        assert config.seed == 10, "and not 8"


@pytest.mark.parametrize("word", ["2", "-1", "'2'", "007"])
def test_a_number_other_than_0_and_1_is_no_boolean(write, word):
    with pytest.raises(UserError, match=r"data\.chat: expected a value of type bool, found"):
        load_config([], [*PATHS, f"data.chat={word}"])
    with pytest.raises(UserError, match=r"data\.chat: expected a value of type bool, found"):
        load_config([write("chat.yaml", f"data: {{chat: {word}}}\n")], PATHS)
    assert load_config([], [*PATHS, "data.chat=1"]).data.chat


def test_a_value_that_is_to_be_set_takes_that_of_no_earlier_source(write):
    first, later = write("first.yaml", "seed: 1\ndata: {path: a}\n"), write("later.yaml", "data:\n  path: ???\n")
    for files, words in (([first, later], []), ([first], ["data.path=???"]), ([first], ["data.batch_size=???"])):
        with pytest.raises(UserError, match=r"data\.(path|batch_size): expected a value, found nothing") as caught:
            load_config(files, [*PATHS, *words, "optim.lr=-1"])
        assert [mistake.key for mistake in caught.value.mistakes][1:] == ["optim.lr"]
    assert load_config([first, later], [*PATHS, "data.path=b"]).data.path == "b"


def test_tokens_are_text_unless_they_are_ids():
    config = load_config([], [*PATHS, "estimator.masked_tokens=[no, 3, 03, '4', on]"])
    assert config.estimator.masked_tokens == ["no", 3, "03", "4", "on"]


def test_what_is_declared_nowhere_is_yaml_without_its_surprises():
    trainer, data = ["trainer.max_time=10:00:00:00", "trainer.deterministic=yes"], "{a: 012, b: 2024-01-01, c: 1e-3}"
    config = load_config([], [*PATHS, *trainer, f"data.kwargs={data}"])
    assert config.trainer == {"max_time": "10:00:00:00", "deterministic": True}
    assert config.data.kwargs == {"a": "012", "b": "2024-01-01", "c": 0.001}


def test_all_mistakes_are_told_at_once(write):
    file = write("bad.yaml", "sed: 1\noptim: {lr: fast, clip_norm: -1}\ndata: {chat: maybe, batch_size: x}\nlint: 3\n")
    with pytest.raises(UserError) as caught:
        load_config([file], ["teacher.path=t", "rollout.top_p=2", "colapse.window=1"])
    told = [mistake.key for mistake in caught.value.mistakes]
    assert told == ["sed", "lint", "optim.lr", "data.chat", "data.batch_size",
                    "colapse", "student.path", "rollout.top_p", "optim.clip_norm"]  # fmt: skip
    assert str(caught.value).splitlines() == [str(mistake) for mistake in caught.value.mistakes]


def test_a_file_that_cannot_be_read_is_not_told_as_missing_keys(write):
    with pytest.raises(UserError) as caught:
        load_config([write("bad.yaml", "a: [")], ["optim.lr=x"])
    assert [mistake.key for mistake in caught.value.mistakes] == ["--config", "optim.lr"]


def numeric(schema):
    for own in fields(schema):
        hint = get_type_hints(schema)[own.name]
        if {int, float} & set(type_options(hint)):
            yield own, hint


@pytest.mark.parametrize("schema", SECTIONS, ids=lambda schema: schema.__name__)
def test_every_number_is_bounded_and_finite(schema):
    for own, hint in numeric(schema):
        assert "limit" in own.metadata, f"{schema.__name__}.{own.name} says not which values it may have"
        section = schema.__new__(schema)
        for other in fields(schema):
            default = other.default_factory() if other.default is NO_DEFAULT else other.default
            setattr(section, other.name, "x" if default == MISSING else default)
        extremes = [math.inf, -math.inf, math.nan] if float in type_options(hint) else [-(2**70), 2**70]
        for value in extremes:
            setattr(section, own.name, value)
            with pytest.raises(UserError) as caught:
                section.check("section")
            assert caught.value.mistakes[0].key == f"section.{own.name}", (own.name, value)


@pytest.mark.parametrize(("section", "keys", "said"), [
    (OptimConfig, {"lr": "1e-4"}, "optim.lr: expected a value of type float, found '1e-4'."),
    (OptimConfig, {"lr": None}, "optim.lr: expected a value of type float, found None."),
    (OptimConfig, {"lr": True}, "optim.lr: expected a value of type float, found True."),
    (OptimConfig, {"kwargs": [1]}, "optim.kwargs: expected a mapping, found [1]."),
    (OptimConfig, {"warmup_steps": 1.5}, "optim.warmup_steps: expected a value of type int, found 1.5."),
    (OptimConfig, {"name": 3}, "optim.name: expected a value of type str, found 3."),
    (DataConfig, {"examples": "x"}, "data.examples: expected a list, found 'x'."),
    (DataConfig, {"examples": [{"user": 1}]}, "data.examples[0].user: expected a value of type str, found 1."),
    (DataConfig, {"answer_column": False}, "data.answer_column: expected a value of type str or null, found False."),
    (EvaluationConfig, {"pass_at": 1}, "evaluation.pass_at: expected a list, found 1."),
    (StudentConfig, {}, "student.path: expected a value, found nothing."),
])  # fmt: skip
def test_a_section_made_in_python_checks_its_types(section, keys, said):
    with pytest.raises(UserError) as caught:
        section(**keys).check(said.partition(".")[0])
    assert str(caught.value).startswith(said)


def test_what_python_spells_otherwise_becomes_the_declared_type():
    student, optim = StudentConfig(path=Path("a/b")), OptimConfig(name=torch.optim.SGD, lr=np.float32(0.5))
    student.check("student")
    optim.check("optim")
    assert student.path == "a/b"
    assert (type(optim.lr), optim.lr, optim.name) == (float, 0.5, "torch.optim.sgd:SGD")
    assert as_section(OptimConfig, {"name": torch.optim.SGD}, "optim").name == "torch.optim.sgd:SGD"
    held = as_section(OptimConfig, {"scheduler_kwargs": {"lr_lambda": abs}}, "optim")
    assert held.scheduler_kwargs["lr_lambda"] is abs


@pytest.mark.parametrize("given", [[1], "lr", 3, {"lr": {}}, {3: 4}, {"name": object()}, {"lr": "${x}"}, OptimConfig])
def test_what_is_no_section_is_told(given):
    with pytest.raises(UserError, match="^optim"):
        as_section(OptimConfig, given, "optim")
