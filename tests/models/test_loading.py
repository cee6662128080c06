"""Quantised teachers, GGUF files, LoRA and gradient checkpointing; what a folder lacks is said in one line."""

import copy
import json
import shutil

import gguf
import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_opd import DistillationModule
from lit_opd.config import PACKAGE_FOLDER, FrozenConfig, StudentConfig, TeacherConfig
from lit_opd.errors import LintWarning, UserError
from lit_opd.models import Pair, export_student, load_frozen, load_student, load_tokenizer, read_model_config

TINY = {"student": str(PACKAGE_FOLDER / "tiny/student"), "teacher": str(PACKAGE_FOLDER / "tiny/teacher")}
LORA = {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.0}
SMALL = {"rollout": {"max_new_tokens": 4}, "optim": {"name": "SGD", "lr": 0.1}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_teacher_loads_scores_and_stays_close(bits, dtype, fit, make_data):
    """On the CPU; close means that its distributions are nearly those of the teacher in full precision."""
    config = TeacherConfig(TINY["teacher"], dtype=dtype, quantization=f"{bits}bit")
    module = DistillationModule(TINY["student"], config, **SMALL)
    record = fit(module)
    layer = module.teacher.model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == (torch.int8 if bits == 8 else torch.uint8)
    assert module.pair.names()["teacher_quantization"] == f"{bits}bit"
    assert record.gradients[0]["model.embed_tokens.weight"].any()
    whole = load_frozen(TeacherConfig(TINY["teacher"], dtype="float32"))
    ids = torch.tensor([[1, 4, 14, 5, 15]])
    exact, found = (m.model(ids).logits.float().log_softmax(-1) for m in (whole, module.teacher))
    assert 0 < (exact.exp() * (exact - found)).sum(-1).max() < {8: 0.02, 4: 0.5}[bits]


def write_gguf(model, path):
    """The model as llama.cpp writes it: tensors renamed, query and key rows permuted."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        array = weight.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads, rows = config.num_attention_heads, len(array)
            array = array.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_teacher_is_the_model_it_was_made_from(
    make_model, tmp_path, tiny_tokenizer, student_path, fit, against_reference
):
    """So is a student, and the reference that by default is the student before training."""
    model = make_model(2)
    write_gguf(model, str(tmp_path / "model.gguf"))
    tiny_tokenizer.save_pretrained(tmp_path)
    config = TeacherConfig(str(tmp_path), dtype="float32", gguf_file="model.gguf")
    teacher = load_frozen(config, tiny_tokenizer)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(teacher.model(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    student = StudentConfig(str(tmp_path), gguf_file="model.gguf")
    pair = Pair(student, config, against_reference, tiny_tokenizer, tiny_tokenizer, FrozenConfig(dtype="float32"))
    for found in (pair.student, pair.load("reference", torch.device("cpu"))):
        torch.testing.assert_close(found.model(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    exported = AutoModelForCausalLM.from_pretrained(export_student(pair.student, tmp_path / "out"))
    torch.testing.assert_close(exported(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    fit(DistillationModule(student_path, config, teacher_tokenizer=tiny_tokenizer, **SMALL))
    with pytest.raises(UserError, match=r"teacher\.gguf_file: .*no 'other\.gguf'"):
        load_frozen(TeacherConfig(str(tmp_path), gguf_file="other.gguf"), tiny_tokenizer)


@pytest.mark.parametrize("tied", [False, True])
def test_lora_trains_saves_and_resumes_only_its_adapters(tied, make_model, save_model, teacher_path, fit):
    """Tied weights have two names in a state dict; both are frozen."""
    path = save_model(make_model(1, tie_word_embeddings=tied))

    def module():
        torch.manual_seed(0)
        return DistillationModule(StudentConfig(path, lora=LORA), teacher_path, **copy.deepcopy(SMALL))

    trained = module()
    before = copy.deepcopy(trained.model.state_dict())
    record = fit(trained, 2)
    assert record.gradients[0]
    assert all("lora_" in name for name in record.gradients[0])
    moved = {name for name, value in trained.model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    file = trained.trainer.default_root_dir + "/lora.ckpt"
    trained.trainer.save_checkpoint(file)
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert saved
    assert all("lora_" in name for name in saved)
    resumed = module()
    fit(resumed, 3, ckpt_path=file)
    fit(trained, 3, ckpt_path=file)
    assert all(torch.equal(resumed.state_dict()[name], value) for name, value in trained.state_dict().items())


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_gives_the_same_gradients(lora, student_path, teacher_path, fit):
    """And is really in use: a student in eval mode would silently go without."""

    def run(checkpointing):
        torch.manual_seed(0)
        student = StudentConfig(student_path, "float64", lora=lora, gradient_checkpointing=checkpointing)
        module = DistillationModule(student, teacher_path, **copy.deepcopy(SMALL))
        calls = []
        norm = module.student.causal_lm.model.layers[1].input_layernorm
        norm.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled() or module.model.training))
        return fit(module).gradients[0], sum(calls)

    plain, forwards = run(False)
    checkpointed, more_forwards = run(True)
    assert (forwards, more_forwards) == (1, 2)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=0, atol=1e-10)


def test_mistakes_are_told_in_one_line(tmp_path, student_path, tiny_tokenizer):
    (tmp_path / "empty").mkdir()
    cases = [
        (lambda: read_model_config(StudentConfig(str(tmp_path / "none")), "student"), r"student\.path: .*no folder"),
        (lambda: read_model_config(StudentConfig(str(tmp_path / "empty")), "student"), r"student\.path: .*\.json"),
        (lambda: load_tokenizer(TeacherConfig(str(tmp_path / "none")), "teacher"), r"teacher\.path: .*no folder"),
        (lambda: load_student(StudentConfig(student_path, lora={"rank": 2})), r"student\.lora\.rank: .*peft"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_folder_without_weights_and_a_wrong_kind_of_model_are_refused(make_model, tmp_path, tiny_tokenizer):
    make_model(1).config.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"student\.path: .*readable weights"):
        load_student(StudentConfig(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(UserError, match="a causal language model, found model_type 'vit'"):
        read_model_config(StudentConfig(str(tmp_path)), "student")


def test_a_loaded_teacher_is_frozen_and_in_eval(teacher_path):
    teacher = load_frozen(TeacherConfig(teacher_path))
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_a_config_that_names_more_layers_than_the_weights_hold_is_refused(tmp_path):
    """Hugging Face fills such layers with random numbers and says so only in a log."""
    folder = tmp_path / "teacher"
    shutil.copytree(TINY["teacher"], folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 9}))
    with pytest.raises(UserError, match=r"teacher\.path: expected weights for all that config\.json names.*layers\.3"):
        load_frozen(TeacherConfig(str(folder)))


def test_weights_that_config_json_has_no_place_for_are_refused_or_told(tmp_path, make_model, tiny_tokenizer):
    """Hugging Face leaves them out: of layers, so that the model is a part of itself, as of all others."""
    shutil.copytree(TINY["student"], tmp_path / "student")
    spoil(tmp_path / "student", num_hidden_layers=1)
    with pytest.raises(UserError, match=r"student\.path: expected a config\.json that names every layer.*layers\.1\."):
        load_student(StudentConfig(str(tmp_path / "student")))
    spoil(tmp_path / "student", num_nextn_predict_layers=1)
    with pytest.warns(LintWarning, match=r"student\.path: 9 tensors of .*, model\.layers\.1\."):
        load_student(StudentConfig(str(tmp_path / "student")))
    spoil(tmp_path / "student", num_hidden_layers=0)
    with pytest.raises(UserError, match=r"student\.path: expected a model of at least one layer"):
        load_student(StudentConfig(str(tmp_path / "student")))
    model = make_model(1)
    model.vision_tower = torch.nn.Linear(2, 2)
    model.save_pretrained(tmp_path / "more")
    tiny_tokenizer.save_pretrained(tmp_path / "more")
    with pytest.warns(LintWarning, match=r"teacher\.path: 2 tensors of .*, vision_tower\.bias among them"):
        load_frozen(TeacherConfig(str(tmp_path / "more")))


# What a folder may hold instead of a model


def spoil(folder, **settings):
    """Change keys of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def overflow(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data *= 1e30
    model.save_pretrained(folder)


def damage(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = torch.nan
    model.save_pretrained(folder)


def lose_a_shard(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    next(folder.glob("model-00002-of-*")).unlink()


def adapter(folder):
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), lora).save_pretrained(folder)


def needs_a_package(folder):
    code = "import no_such_package\nfrom transformers import PretrainedConfig\n\nclass Mine(PretrainedConfig): pass\n"
    (folder / "mine.py").write_text(code)
    spoil(folder, model_type="mine", auto_map={"AutoConfig": "mine.Mine"})


UNREADABLE = {
    "GPTQ": (lambda f: spoil(f, quantization_config={"quant_method": "gptq", "bits": 4}), {},
             r"path: expected a model whose packages are installed, found .* requires optimum .*Install them"),
    "AWQ": (lambda f: spoil(f, quantization_config={"quant_method": "awq", "bits": 4}), {},
            r"path: expected a model whose packages are installed, found .* requires gptqmodel.*Install them"),
    "flash attention": (lambda f: spoil(f, attn_implementation="flash_attention_2"), {},
                        r"path: expected a model whose packages are installed, found .*FlashAttention2.*Install them"),
    "a package of its code": (needs_a_package, {"trust_remote_code": True},
                              r"path: expected a model whose packages are installed, found .*no_such_package"),
    "its code": (needs_a_package, {}, r"path: expected a model folder.*Set teacher\.trust_remote_code=true, if"),
    "quantised twice": (lambda f: spoil(f, quantization_config={"quant_method": "gptq", "bits": 4}),
                        {"quantization": "8bit"}, r"quantization: expected none for a model that is quantised already"),
    "a missing shard": (lose_a_shard, {},
                        r"path: expected readable weights, found .*model-00002-of-\d+\.safetensors.*Correct or"),
    "an adapter": (adapter, {}, r"path: expected a whole model, found .* holds an adapter of one\. Merge it into"),
    "NaN": (damage, {}, r"path: expected finite weights in bfloat16, found others in model\.layers\.1\.mlp\.up_proj"),
    "overflow": (overflow, {"dtype": "float16"}, r"path: expected finite weights in float16.*teacher\.dtype=bfloat16"),
    "other shapes": (lambda f: spoil(f, hidden_size=24), {},
                     r"path: expected weights for all that config\.json names, found .*without model.* of that shape"),
    "no such activation": (lambda f: spoil(f, hidden_act="x"), {}, r"path: expected readable weights, found .*'x'"),
    "a wrong type": (lambda f: spoil(f, vocab_size="x"), {}, r"path: expected a tokenizer, found .*vocab_size"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), {},
                  r"path: expected a tokenizer, found .*config\.json holds no JSON object \('list'"),
    "no list": (lambda f: (f / "generation_config.json").write_text("[]"), {},
                r"path: expected a model folder, found .*generation_config\.json holds no JSON object \('list'"),
    "half a file": (lambda f: (f / "generation_config.json").write_text('{"a": '), {},
                    r"path: expected a model folder, found .*generation_config\.json holds no JSON object"),
    "no id": (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [2, "</s>"]}'), {},
              r"path: expected a model folder, found .*generation_config\.json names \[2, '</s>'\] as eos_token_id"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").write_text("null"), {},
                     r"path: expected a tokenizer, found .*tokenizer\.json holds no JSON object \('NoneType'"),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"garbage"), {},
                r"path: expected readable weights, found .*header.*Correct or replace its files"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_wrong_with_a_folder_is_told_in_one_line(name, tmp_path):
    change, keys, message = UNREADABLE[name]
    folder = tmp_path / "teacher"
    shutil.copytree(TINY["teacher"], folder)
    change(folder)
    with pytest.raises(UserError, match=rf"^teacher\.{message}") as error:
        load_frozen(TeacherConfig(str(folder), **keys))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_logits_that_overflow_are_told_where_the_weights_are_finite(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY["teacher"])
    model.model.norm.weight.data *= 3e4
    model.save_pretrained(tmp_path)
    load_tokenizer(TeacherConfig(TINY["teacher"]), "teacher").save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"teacher\.dtype: expected logits that are finite, found others in torch\.float16"
    ):
        load_frozen(TeacherConfig(str(tmp_path), dtype="float16"))


def test_a_name_that_is_neither_here_nor_on_the_hub():
    with pytest.raises(
        UserError, match=r"student\.path: .*'outputs/student', no folder here and not to be had from the"
    ):
        load_student(StudentConfig("outputs/student"))
