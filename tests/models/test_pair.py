"""Student and teacher fit, or are refused before any weight loads."""

import copy

import pytest
import torch

from lit_opd import DistillationModule
from lit_opd.config import StudentConfig, TeacherConfig
from lit_opd.errors import UserError
from lit_opd.models import Pair, shared_vocabulary, token_ids


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))


def test_padding_rows_are_cut_to_the_shared_size(make_model, save_model, teacher_path, make_data, fit):
    """A student with 17 + 8 rows: cut in sampling, scoring and training; the surplus rows get no gradient."""
    module = DistillationModule(save_model(make_model(1, vocab_size=25)), teacher_path, "full_vocab",
                                rollout={"num_completions": 20, "max_new_tokens": 4},
                                optim={"name": "SGD", "lr": 0.1})  # fmt: skip
    assert module.pair.vocabulary == 17
    record = fit(module, limit_val_batches=1)
    assert record.rollouts[0].completion_ids_BT.max() < 17
    gradient = record.gradients[0]["lm_head.weight"]
    assert gradient[:17].any()
    assert not gradient[17:].any()


def test_a_teacher_may_have_the_padding_rows(make_model, save_model, student_path, fit):
    module = DistillationModule(student_path, save_model(make_model(2, vocab_size=20)), "teacher_topk",
                                estimator_kwargs={"k": 17}, rollout={"max_new_tokens": 4})  # fmt: skip
    fit(module)
    assert module.teacher.head.weight_VH.shape[0] == module.student.head.weight_VH.shape[0] == 17


@pytest.mark.usefixtures("no_weights")
def test_tokenizers_that_differ_are_refused_naming_the_first_id(
    make_model, save_model, student_path, make_tiny_tokenizer
):
    other = save_model(make_model(2), make_tiny_tokenizer("0123456798+=-"))
    found = "id 12 is '8' for the student and '9' for the teacher"
    with pytest.raises(UserError, match=rf"teacher\.path: .*{found}"):
        DistillationModule(student_path, other)


@pytest.mark.usefixtures("no_weights")
def test_too_short_an_output_layer_is_refused(make_model, save_model, student_path):
    with pytest.raises(UserError, match=r"teacher\.path: expected an output layer of at least 17 rows.*found 12"):
        DistillationModule(student_path, save_model(make_model(2, vocab_size=12)))
    with pytest.raises(UserError, match=r"student\.path: expected an output layer of at least 17 rows.*found 12"):
        DistillationModule(save_model(make_model(2, vocab_size=12)), student_path)


def test_shared_vocabulary_is_the_smaller_layer(tiny_tokenizer, make_tiny_tokenizer):
    assert shared_vocabulary(tiny_tokenizer, tiny_tokenizer, 24, 32) == 24
    with pytest.raises(UserError, match="id 17 is None for the student and '!' for the teacher"):
        shared_vocabulary(tiny_tokenizer, make_tiny_tokenizer("0123456789+=-!"), 24, 32)


def test_token_ids(tiny_tokenizer):
    assert token_ids(tiny_tokenizer, ["<eos>", "0", 7, "<unk>"], "key") == [2, 4, 7, 3]
    with pytest.raises(UserError, match="key: .*'12'"):
        token_ids(tiny_tokenizer, ["12"], "key")


def test_models_in_memory_need_a_tokenizer(make_model, teacher_path, tiny_tokenizer):
    with pytest.raises(UserError, match="Pass tokenizer="):
        DistillationModule(make_model(1), teacher_path)
    module = DistillationModule(make_model(1), teacher_path, tokenizer=tiny_tokenizer)
    assert module.tokenizer is tiny_tokenizer
    assert DistillationModule(make_model(1), make_model(2), tokenizer=tiny_tokenizer).pair.load_teacher()


def test_a_teacher_in_memory_is_frozen_and_in_eval(make_model, tiny_tokenizer):
    teacher = Pair(make_model(1), make_model(2).train(), tiny_tokenizer, None, 0).load_teacher()
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.own_precision


def test_a_copy_of_the_student_may_teach_and_itself_may_not(make_model, tiny_tokenizer):
    model = make_model(1)
    Pair(model, copy.deepcopy(model), tiny_tokenizer, None, 0)
    with pytest.raises(UserError, match=r"teacher: .*copy\.deepcopy"):
        Pair(model, model, tiny_tokenizer, None, 0)


def test_names(make_model, student_path, teacher_path, tiny_tokenizer):
    sections = StudentConfig(student_path), TeacherConfig(teacher_path, quantization="4bit")
    expected = {"student": student_path, "teacher": teacher_path, "teacher_quantization": "4bit"}
    assert Pair(*sections, None, None, 0).names() == expected
    expected = {"student": "LlamaForCausalLM", "teacher": "LlamaForCausalLM", "teacher_quantization": "none"}
    assert Pair(make_model(1), make_model(2), tiny_tokenizer, None, 0).names() == expected


def test_dtypes_are_those_asked_for(student_path, teacher_path):
    pair = Pair(StudentConfig(student_path, dtype="float64"), TeacherConfig(teacher_path), None, None, 0)
    assert {p.dtype for p in pair.student.model.parameters()} == {torch.float64}
    assert {p.dtype for p in pair.load_teacher().model.parameters()} == {torch.bfloat16}
