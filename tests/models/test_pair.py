"""Student, teacher and reference fit, or are refused before any weight loads."""

import copy
import shutil

import pytest
import torch

from lit_opd import DistillationModule, estimators
from lit_opd.config import FrozenConfig, StudentConfig, TeacherConfig
from lit_opd.errors import LintWarning, UserError
from lit_opd.models import Pair, load_tokenizer, shared_vocabulary, token_ids

CPU, TOKEN = torch.device("cpu"), estimators.build("token")


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
    assert record.rollouts[0].ids_BT.max() < 17
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


@pytest.mark.usefixtures("no_weights")
def test_a_token_that_was_added_behind_the_vocabulary_is_named(student_path, teacher_path, tmp_path):
    tokenizer = load_tokenizer(StudentConfig(student_path), "student")
    shutil.copytree(student_path, tmp_path / "padded")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "padded")
    padded = str(tmp_path / "padded")
    for pair, who in (((padded, teacher_path), "student"), ((student_path, padded), "teacher")):
        message = (
            rf"{who}\.path: expected an output layer of at least 18 rows.* none for '\[PAD\]' \(id 17\)\. Take added"
        )
        with pytest.raises(UserError, match=message):
            DistillationModule(*pair)


def test_shared_vocabulary_is_the_smaller_layer(tiny_tokenizer, make_tiny_tokenizer):
    assert shared_vocabulary(tiny_tokenizer, tiny_tokenizer, 24, 32) == 24
    with pytest.raises(UserError, match="id 17 is None for the student and '!' for the teacher.*was added"):
        shared_vocabulary(tiny_tokenizer, make_tiny_tokenizer("0123456789+=-!"), 24, 32)


@pytest.fixture
def longer(make_model, save_model, make_tiny_tokenizer):
    """A teacher's folder whose vocabulary goes on where the student's ends, in an output layer of 24 rows."""
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "</tool>"]})
    return save_model(make_model(2, vocab_size=24), tokenizer)


@pytest.fixture
def padded(make_model, save_model):
    """A student's folder with padding rows where the teacher has its extra tokens."""
    return save_model(make_model(1, vocab_size=24))


@pytest.mark.usefixtures("no_weights")
def test_extra_tokens_are_refused_with_the_key_that_masks_them(longer, padded):
    expected = (
        r"teacher\.path: .*id 17 is None for the student and '<tool>' .*2 extra tokens out, set teacher\.extra_tok"
    )
    with pytest.raises(UserError, match=expected):
        DistillationModule(padded, longer)
    for pair in ((longer, {"path": padded, "extra_tokens": "mask"}),):  # the student's own are never masked
        with pytest.raises(UserError, match=r"id 17 is '<tool>' for the student and None for the teacher"):
            DistillationModule(*pair)


def test_no_other_token_may_differ_where_extra_ones_are_masked(padded, make_model, save_model, make_tiny_tokenizer):
    other = save_model(make_model(2, vocab_size=24), make_tiny_tokenizer("0123456798+=-!"))
    with pytest.raises(UserError, match="id 12 is '8' for the student and '9' for the teacher"):
        Pair(padded, TeacherConfig(other, extra_tokens="mask"), TOKEN)


@pytest.mark.parametrize("estimator", ["full_vocab", "token", "teacher_topk", "sequence"])
def test_masked_extra_tokens_leave_two_models_of_the_students_vocabulary(
    estimator, longer, padded, make_model, make_module, make_data, fit, sample, make_batch, full_logits
):
    """Against models whose output layers were cut by hand: the teacher's law over the student's tokens sums to one."""
    kwargs = {"estimator_kwargs": {"k": 5}} if "topk" in estimator else {}
    with pytest.warns(
        LintWarning, match=r"extra_tokens: 2 of the teacher's tokens, from '<tool>' \(id 17\) on, are not"
    ):
        masked = make_module(padded, {"path": longer, "extra_tokens": "mask", "dtype": "float32"}, estimator, **kwargs)
    cut = [masked.student.model, masked.pair.load("teacher", CPU).model]
    cut = [copy.deepcopy(model) for model in cut]
    for model in cut:
        model.resize_token_embeddings(17)
    dense = make_module(*cut, estimator, **kwargs)
    found, expected = (fit(module) for module in (masked, dense))
    assert torch.equal(found.rollouts[0].ids_BT, expected.rollouts[0].ids_BT)
    gradient, wanted = (record.gradients[0]["lm_head.weight"] for record in (found, expected))
    torch.testing.assert_close(gradient[:17], wanted, rtol=0, atol=1e-5)
    assert not gradient[17:].any()
    assert wanted.any()


def test_token_ids(tiny_tokenizer):
    assert token_ids(tiny_tokenizer, ["<eos>", "0", 7, "<unk>"], "key") == [2, 4, 7, 3]
    with pytest.raises(UserError, match="key: .*'12'"):
        token_ids(tiny_tokenizer, ["12"], "key")


def test_models_in_memory_need_a_tokenizer(make_model, teacher_path, tiny_tokenizer):
    with pytest.raises(UserError, match="Pass tokenizer="):
        DistillationModule(make_model(1), teacher_path)
    module = DistillationModule(make_model(1), teacher_path, tokenizer=tiny_tokenizer)
    assert module.tokenizer is tiny_tokenizer
    assert DistillationModule(make_model(1), make_model(2), tokenizer=tiny_tokenizer).pair.load("teacher", CPU)


def test_a_teacher_in_memory_is_frozen_and_in_eval(make_model, tiny_tokenizer):
    teacher = Pair(make_model(1), make_model(2).train(), TOKEN, tiny_tokenizer).load("teacher", CPU)
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert teacher.own_precision


def test_a_copy_of_the_student_may_teach_and_itself_may_not(make_model, tiny_tokenizer):
    model = make_model(1)
    Pair(model, copy.deepcopy(model), TOKEN, tiny_tokenizer)
    with pytest.raises(UserError, match=r"teacher: .*copy\.deepcopy"):
        Pair(model, model, TOKEN, tiny_tokenizer)


def test_names(make_model, student_path, teacher_path, tiny_tokenizer):
    sections = StudentConfig(student_path), TeacherConfig(teacher_path, quantization="4bit")
    expected = {"student": student_path, "teacher": teacher_path, "teacher_quantization": "4bit"}
    assert Pair(*sections, TOKEN).names() == expected
    expected = {"student": "LlamaForCausalLM", "teacher": "LlamaForCausalLM", "teacher_quantization": "none"}
    assert Pair(make_model(1), make_model(2), TOKEN, tiny_tokenizer).names() == expected


def test_dtypes_are_those_asked_for(student_path, teacher_path):
    pair = Pair(StudentConfig(student_path, dtype="float64"), TeacherConfig(teacher_path), TOKEN)
    assert {p.dtype for p in pair.student.model.parameters()} == {torch.float64}
    assert {p.dtype for p in pair.load("teacher", CPU).model.parameters()} == {torch.bfloat16}


def test_what_a_section_cannot_mean_is_refused(student_path, teacher_path):
    """Also where it comes from Python, and no file was read."""
    for keys, message in (({"temperature": 0.0}, r"teacher\.temperature: .*above 0, found 0\.0"),
                          ({"quantization": "3bit"}, r"teacher\.quantization: .*'3bit'")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Pair(StudentConfig(student_path), TeacherConfig(teacher_path, **keys), TOKEN)


def test_a_teacher_is_as_warm_as_its_section_says(student_path, teacher_path):
    pair = Pair(StudentConfig(student_path), TeacherConfig(teacher_path, temperature=0.5), TOKEN)
    assert pair.load("teacher", CPU).head.temperature == 0.5
    assert pair.student.head.temperature == 1.0


# The reference


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


@pytest.mark.parametrize("section", [None, FrozenConfig(dtype="float32")])
def test_without_a_path_the_reference_is_the_student_s_own_folder(
    section, against_reference, make_model, student_path, teacher_path
):
    pair = Pair(student_path, teacher_path, against_reference, reference=section)
    with torch.no_grad():
        pair.student.model.lm_head.weight.add_(1)
    reference = pair.load("reference", CPU).model
    dtype = torch.bfloat16 if section is None else torch.float32
    assert same(weights(reference), weights(make_model(1).to(dtype)))
    assert pair.names()["reference"] == student_path


def test_a_student_in_memory_is_copied_before_anything_trains_it(against_reference, make_model, tiny_tokenizer):
    student = make_model(1, torch.float64)
    pair = Pair(student, make_model(2), against_reference, tiny_tokenizer)
    before = weights(student)
    with torch.no_grad():
        student.lm_head.weight.add_(1)
    reference = pair.load("reference", CPU)
    assert same(weights(reference.model), before)
    assert not reference.model.training
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert reference.own_precision


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_reference_of_its_own_is_loaded_frozen_and_cut(
    in_memory, against_reference, make_model, save_model, student_path, teacher_path
):
    """To the smallest vocabulary of the three."""
    model = make_model(3, vocab_size=19).train()
    pair = Pair(save_model(make_model(1, vocab_size=25)), save_model(make_model(2, vocab_size=22)), against_reference,
                reference=model if in_memory else save_model(model))  # fmt: skip
    assert pair.vocabulary == 19
    reference = pair.load("reference", CPU)
    assert len(reference.head.weight_VH) == len(pair.load("teacher", CPU).head.weight_VH) == 19
    assert same(weights(reference.model), weights(model if in_memory else model.bfloat16()))
    assert not reference.model.training
    assert not any(p.requires_grad for p in reference.model.parameters())
    assert pair.load("reference", CPU) is reference, "read twice"


@pytest.mark.usefixtures("no_weights")
def test_a_reference_of_another_vocabulary_is_refused_before_weights_load(
    against_reference, make_model, save_model, make_tiny_tokenizer, student_path, teacher_path
):
    other = save_model(make_model(3), make_tiny_tokenizer("0123456798+=-"))
    with pytest.raises(UserError, match=r"reference\.path: .*'8' for the student and '9' for the reference"):
        Pair(student_path, teacher_path, against_reference, reference=other)
    short = save_model(make_model(3, vocab_size=12))
    with pytest.raises(UserError, match=r"reference\.path: expected an output layer of at least 17 rows.*found 12"):
        Pair(student_path, teacher_path, against_reference, reference=FrozenConfig(short))
    with pytest.raises(UserError, match=r"reference\.path: .*no folder"):
        Pair(student_path, teacher_path, against_reference, reference="/nowhere")
    with pytest.raises(UserError, match=r"reference\.dtype: .*'int8'"):
        Pair(student_path, teacher_path, against_reference, reference=FrozenConfig(dtype="int8"))


def test_the_student_itself_is_no_reference(against_reference, make_model, tiny_tokenizer):
    student = make_model(1)
    with pytest.raises(UserError, match=r"reference: .*copy\.deepcopy"):
        Pair(student, make_model(2), against_reference, tiny_tokenizer, reference=student)


def test_an_estimator_that_asks_for_no_reference_gets_none(make_model, tiny_tokenizer):
    """Whatever is given as one is not even looked at."""
    pair = Pair(make_model(1), make_model(2), TOKEN, tiny_tokenizer, reference="/nowhere")
    assert "reference" not in pair.names()
    with pytest.raises(KeyError):
        pair.load("reference", CPU)
