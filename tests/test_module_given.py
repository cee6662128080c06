"""What a script in Python gives the two Lightning classes: other types are refused by name, and checkpoints keep it."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from lit_opd import DistillationModule, PromptDataModule, estimators, load_config, runs
from lit_opd.config import StudentConfig
from lit_opd.errors import UserError

# keyword -> what it may not be, and the key that the message begins with
WRONG = [
    ("student", None, "student"), ("student", 3, "student"), ("student", torch.nn.Linear(2, 2), "student"),
    ("student", {"pth": "s"}, "student.pth"), ("student", {}, "student.path"),
    ("student", StudentConfig(), "student.path"), ("student", Path("no/where"), "student.path"),
    ("teacher", ["t"], "teacher"), ("teacher", {"path": 3}, "teacher.path"),
    ("reference", 3, "reference"), ("tokenizer", "gpt2", "tokenizer"), ("teacher_tokenizer", 3, "teacher_tokenizer"),
    ("estimator", None, "estimator.name"), ("estimator", ["token"], "estimator.name"),
    ("estimator", dict, "estimator.name"),
    ("estimator", "tokn", "estimator.name"), ("estimator", {"nam": "token"}, "estimator.nam"),
    ("estimator_kwargs", [1], "estimator.kwargs"), ("estimator_kwargs", {"name": 1}, "estimator.kwargs.name"),
    ("rollout", [1], "rollout"), ("rollout", {"temperature": "hot"}, "rollout.temperature"),
    ("optim", 3, "optim"), ("optim", {"name": torch.nn.Linear}, "optim.name"), ("optim", {"lr": None}, "optim.lr"),
    ("optim", {"lr": torch.inf}, "optim.lr"), ("optim", {"kwargs": 3}, "optim.kwargs"),
    ("evaluation", {"pass_at": 1}, "evaluation.pass_at"), ("evaluation", {"seed": -1}, "evaluation.seed"),
    ("aggregation", 3, "estimator.aggregation"), ("aggregation", "mean", "estimator.aggregation"),
    ("masked_tokens", "abc", "estimator.masked_tokens"), ("masked_tokens", [1.5], "estimator.masked_tokens[0]"),
    ("seed", "1", "seed"), ("seed", -1, "seed"), ("seed", 2**64, "seed"), ("engine", object(), "rollout.engine"),
    ("lint", {"allow": "x"}, "lint.allow"), ("lint", [1], "lint"), ("diagnostics", {"support_size": 0}, "diagnostics"),
]  # fmt: skip


@pytest.mark.parametrize(("keyword", "value", "key"), WRONG)
def test_what_a_module_cannot_take_is_told_by_its_name(student_path, teacher_path, keyword, value, key):
    given = {"student": student_path, "teacher": teacher_path, keyword: value}
    with pytest.raises(UserError) as caught:
        DistillationModule(**given).configure_optimizers()
    assert str(caught.value).startswith(key)
    assert all(": expected " in line and ", found " in line for line in str(caught.value).splitlines())


@pytest.mark.parametrize(("keywords", "key"), [
    ({"config": 3}, "data"), ({"config": {"sourc": "x"}}, "data.sourc"), ({"train_rows": "abc"}, "train_rows"),
    ({"train_rows": [1]}, "train_rows[0]"), ({"train_rows": 3}, "train_rows[0]"), ({"tokenizer": "gpt2"}, "tokenizer"),
    ({"seed": "x"}, "seed"), ({"evaluation_batch_size": 0}, "evaluation_batch_size"),
    ({"train_rows": {"prompt": "x"}}, "train_rows"),
    ({"batch_size": 0}, "data"),
    ({"batch_size": "x"}, "data.batch_size"), ({"path": 3}, "data.path"), ({"chat": "yes"}, "data.chat"),
    ({"validation_seed": -1}, "data.validation_seed"), ({"examples": {}}, "data.examples"), ({"pth": 3}, "data.pth"),
])  # fmt: skip
def test_what_a_data_module_cannot_take_is_told_by_its_name(tiny_tokenizer, keywords, key):
    with pytest.raises(UserError) as caught:
        PromptDataModule(**{"tokenizer": tiny_tokenizer, "train_rows": ["1+1="], "batch_size": 1} | keywords).setup()
    assert str(caught.value).startswith(key)


@pytest.mark.parametrize("call", [
    lambda: load_config(3), lambda: load_config(None), lambda: load_config([None]), lambda: load_config([], 3),
    lambda: load_config([], [1]), lambda: load_config([], {"optim.lr": 1}), lambda: runs.train("conf/quickstart.yaml"),
    lambda: runs.train({"seed": 1}), lambda: runs.evaluate(None, None, "validate"),
])  # fmt: skip
def test_what_is_no_configuration_is_told(call):
    with pytest.raises(UserError, match=r"^(files|overrides|config)(\[0\])?: expected a .*, found "):
        call()


def test_paths_classes_and_mappings_are_taken(student_path, teacher_path):
    module = DistillationModule(
        Path(student_path), {"path": Path(teacher_path)}, {"name": "hybrid", "kwargs": {"gamma": 0.5}},
        optim={"name": torch.optim.SGD, "lr": 1},
    )  # fmt: skip
    assert module.estimator.keywords["gamma"] == 0.5
    assert type(module.configure_optimizers()) is torch.optim.SGD


def test_a_loader_of_something_else_is_refused_with_what_to_give(student_path, teacher_path, make_trainer):
    module = DistillationModule(student_path, teacher_path)
    for call in ("fit", "validate"):
        with pytest.raises(
            UserError, match=r"^data: expected batches of the type lit_opd.types.PromptBatch, found list"
        ):
            getattr(make_trainer(limit_val_batches=1), call)(module, DataLoader(["1+1=", "2="]))


def test_a_module_comes_back_from_its_checkpoint(student_path, teacher_path, make_trainer, make_data, tmp_path):
    words = ["rollout.max_new_tokens=4", "estimator.terms=[{name: token, weight: 1}]", "optim.lr=0.01", "seed=3"]
    config = load_config([], [f"student.path={student_path}", f"teacher.path={teacher_path}", *words])
    module, trainer = DistillationModule.from_config(config), make_trainer()
    trainer.fit(module, make_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert (again.estimator.spec.name, again.seed, again.optim_config) == ("mix", 3, module.optim_config)
    other = DistillationModule.load_from_checkpoint(tmp_path / "a.ckpt", estimator="full_vocab", seed=4)
    assert (other.estimator.spec.name, other.seed) == ("full_vocab", 4)


def test_what_a_checkpoint_does_not_hold_is_asked_for(
    make_model, tiny_tokenizer, teacher_path, make_trainer, make_data, tmp_path
):
    file = tmp_path / "a.ckpt"
    for text in (None, b"", b"garbage", b"PK\x03\x04"):
        if text is not None:
            file.write_bytes(text)
        with pytest.raises(UserError, match=r"^checkpoint_path: expected a readable checkpoint of lit_opd"):
            DistillationModule.load_from_checkpoint(file)
    token = estimators.get("token").fn
    module, trainer = DistillationModule(make_model(1), teacher_path, token, tokenizer=tiny_tokenizer), make_trainer()
    trainer.fit(module, make_data())
    trainer.save_checkpoint(file)
    with pytest.raises(
        UserError, match=r"^checkpoint_path: expected the arguments student, estimator, tokenizer, which"
    ):
        DistillationModule.load_from_checkpoint(file)
    given = {"estimator": token, "tokenizer": tiny_tokenizer}
    again = DistillationModule.load_from_checkpoint(file, student=make_model(5), **given)
    assert torch.equal(again.model.lm_head.weight, module.model.lm_head.weight)
    with pytest.raises(UserError, match=r"^student: expected the student of the checkpoint"):
        DistillationModule.load_from_checkpoint(file, student=make_model(5, hidden_size=24), **given)


def test_the_student_is_written_as_a_folder_that_transformers_loads(make_model, make_module, tmp_path):
    module = make_module(make_model(1), make_model(2))
    assert module.save_pretrained(tmp_path / "student") == tmp_path / "student"
    with pytest.raises(UserError, match=r"^folder: expected a value of type str, found None"):
        module.save_pretrained(None)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in module.model.state_dict().items())
