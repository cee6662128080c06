"""Every keyword of peft.LoraConfig trains, resumes and exports what it says, or is refused before weights load."""

import copy
import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lit_opd import DistillationModule
from lit_opd.config import StudentConfig
from lit_opd.errors import RunError, UserError
from lit_opd.functional import head_logits
from lit_opd.models import LanguageModel, export_student, frozen_names, load_student
from lit_opd.models.adapters import KEYWORDS
from lit_opd.types import SamplingLaw

LINEAR, QUERY = {"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}
RIGHT = {
    "r": QUERY | {"r": 2},
    "lora_alpha": QUERY | {"lora_alpha": 3},
    "lora_dropout": LINEAR | {"lora_dropout": 0.5},
    "bias": QUERY | {"bias": "all"},
    "use_rslora": LINEAR | {"use_rslora": True},
    "use_dora": LINEAR | {"use_dora": True},
    "init_lora_weights": LINEAR | {"init_lora_weights": False},
    "gaussian": LINEAR | {"init_lora_weights": "gaussian"},
    "orthogonal": LINEAR | {"r": 4, "init_lora_weights": "orthogonal"},
    "pissa": LINEAR | {"r": 4, "init_lora_weights": "pissa"},
    "pissa_niter_2": LINEAR | {"r": 4, "init_lora_weights": "pissa_niter_2"},
    "olora": LINEAR | {"r": 4, "init_lora_weights": "olora"},
    "mica": LINEAR | {"r": 4, "init_lora_weights": "mica"},
    "rank_pattern": LINEAR | {"rank_pattern": {"q_proj": 3}},
    "alpha_pattern": LINEAR | {"alpha_pattern": {"k_proj": 3}},
    "target_modules": {},
    "exclude_modules": LINEAR | {"exclude_modules": ["q_proj"]},
    "target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "layers_to_transform": QUERY | {"layers_to_transform": [1]},
    "layers_pattern": QUERY | {"layers_to_transform": [1], "layers_pattern": "layers"},
    "modules_to_save": QUERY | {"modules_to_save": ["embed_tokens", "norm"]},
    "the head": QUERY | {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": QUERY | {"trainable_token_indices": [4, 5]},
    "ensure_weight_tying": QUERY | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "fan_in_fan_out": QUERY | {"fan_in_fan_out": True},
}


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))


@pytest.fixture(scope="module")
def tied_path(make_model, save_model):
    return save_model(make_model(1, tie_word_embeddings=True))


def own_logps(student, rollout):
    return head_logits(student.hidden(rollout)[0], student.head).log_softmax(-1)


def adapted(path, lora, tokenizer):
    """A student whose trainable weights have moved, as if it had been trained."""
    torch.manual_seed(0)
    student = load_student(StudentConfig(path, lora=lora), tokenizer)
    student.model.eval()
    for weight in student.model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    return student


@pytest.mark.parametrize("name", RIGHT)
def test_a_keyword_trains_resumes_and_exports_the_same_model(
    name, tied_path, tiny_tokenizer, make_batch, sample, full_logits, tmp_path
):
    """The student's own forward pass, its gradients, a resumed copy and the exported folder agree with peft's model."""
    student = adapted(tied_path, RIGHT[name], tiny_tokenizer)
    rollout = sample(student.causal_lm, make_batch(), SamplingLaw())
    mask, own = rollout.mask_BT, own_logps(student, rollout)
    expected = full_logits(student.model, rollout)[mask].log_softmax(-1)
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-4)
    sampled = expected.gather(-1, rollout.ids_BT[mask][:, None])[:, 0]
    torch.testing.assert_close(rollout.sampler_logps_BT[mask], sampled, rtol=0, atol=1e-4)
    before = full_logits(AutoModelForCausalLM.from_pretrained(tied_path), rollout)[mask].log_softmax(-1)
    assert (own - before).abs().max() > 0.05
    trained = {n: weight for n, weight in student.model.named_parameters() if weight.requires_grad}
    chosen = torch.randn(own.shape, generator=torch.Generator().manual_seed(0))
    found, right = (torch.autograd.grad((logps * chosen).sum(), list(trained.values())) for logps in (own, expected))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    kept = {n: v for n, v in student.model.state_dict().items() if n not in frozen_names(student.model)}
    torch.manual_seed(1)
    resumed = load_student(StudentConfig(tied_path, lora=RIGHT[name]), tiny_tokenizer)
    resumed.model.eval().load_state_dict(kept, strict=False)
    torch.testing.assert_close(own_logps(resumed, rollout), own, rtol=0, atol=1e-5)
    exported = AutoModelForCausalLM.from_pretrained(export_student(student, tmp_path))
    torch.testing.assert_close(full_logits(exported, rollout)[mask].log_softmax(-1), own, rtol=0, atol=1e-4)


def test_every_keyword_is_tried_or_refused(tied_path, tiny_tokenizer, no_weights):
    """Also those of a later peft: what is not known to be right is refused, whatever it does."""
    assert set(KEYWORDS) <= set(RIGHT)
    defaults = vars(peft.LoraConfig(task_type="CAUSAL_LM"))
    for key, value in defaults.items():
        if key not in KEYWORDS:
            with pytest.raises(UserError, match=rf"^student\.lora\.{key}: expected no such key.*Leave it out\."):
                load_student(StudentConfig(tied_path, lora={key: not value}), tiny_tokenizer)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8}, r"\.rank: expected a keyword of peft\.LoraConfig, found an unknown one\. Did you mean 'r'\?"),
        ({"init_lora_weights": "eva"}, r"\.init_lora_weights: expected one of true, .*, found 'eva'"),
        ({"target_modules": ["q"]}, r": expected adapters that fit the student, found .*: Target modules {.q.} not"),
        ({"r": 0}, r": expected adapters that fit"),
        ({"r": "8"}, r": expected adapters that fit"),
        (LINEAR | {"layers_to_transform": [0]}, r": expected keywords that peft accepts, found ValueError"),
        ({"target_modules": ["embed_tokens"]}, r": .* one module, found one on .*embed_tokens, whose weights are tied"),
        ({"target_modules": ["lm_head"]}, r": .* one module, found one on .*lm_head, whose weights are tied"),
        ({"target_parameters": ["embed_tokens.weight"]}, r": .*embed_tokens, whose weights are tied"),
        (
            QUERY | {"modules_to_save": ["head"]},
            r": expected adapters .* no module is called 'head'",
        ),
        (QUERY | {"modules_to_save": "norm"}, r": expected adapters .* no module is called 'n'"),
        (QUERY | {"rank_pattern": {"k_proj2": 4}}, r": expected adapters .* no module is called 'k_proj2'"),
        (QUERY | {"lora_alpha": 0}, r": expected adapters with a finite scale other than 0"),
    ],
)
def test_what_cannot_be_right_is_refused_before_weights_load(lora, message, tied_path, tiny_tokenizer, no_weights):
    with pytest.raises(UserError, match=r"^student\.lora" + message) as error:
        load_student(StudentConfig(tied_path, lora=lora), tiny_tokenizer)
    assert "\n" not in str(error.value)


def test_embeddings_that_are_not_tied_may_be_adapted(student_path, tiny_tokenizer, tmp_path):
    student = adapted(student_path, {"target_modules": ["embed_tokens"]}, tiny_tokenizer)
    ids = torch.arange(8)[None]
    exported = AutoModelForCausalLM.from_pretrained(export_student(student, tmp_path))
    torch.testing.assert_close(exported(ids).logits, student.model(ids).logits, rtol=0, atol=1e-4)


def test_an_export_that_is_not_the_trained_student_is_no_export(student_path, tiny_tokenizer, tmp_path, monkeypatch):
    """Whatever a library does to the adapters, or to the folder."""
    student = adapted(student_path, LINEAR, tiny_tokenizer)
    monkeypatch.setattr("peft.PeftModel.merge_and_unload", lambda model: model.unload(), raising=False)
    message = r"the export in '.*' is not the trained student, but \d.* nats off\. The checkpoint holds the weights"
    with pytest.raises(RunError, match=message):
        export_student(student, tmp_path)


def test_an_export_that_fails_is_told_in_one_line(make_model, tiny_tokenizer, tmp_path, student_path, monkeypatch):
    student = load_student(StudentConfig(student_path), tiny_tokenizer)
    monkeypatch.setattr(student.model, "save_pretrained", lambda folder: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(
        RunError, match=r"the export to '.*' failed \(OSError: \[Errno 28\] No space\)\. The checkpoint"
    ):
        export_student(student, tmp_path)


def test_the_code_that_a_config_names_is_not_run_where_transformers_has_the_architecture(
    make_model, tiny_tokenizer, tmp_path
):
    student = LanguageModel(make_model(1), tiny_tokenizer, "student")
    student.config.auto_map = {"AutoModelForCausalLM": "owner/repo--modeling.Mine"}
    export_student(student, tmp_path)


def test_merging_in_bf16_is_rounding(make_model, save_model, tiny_tokenizer, tmp_path):
    path = save_model(make_model(1, torch.bfloat16, initializer_range=0.1))
    student = load_student(StudentConfig(path, "bfloat16", lora=LINEAR), tiny_tokenizer)
    for name, weight in student.model.named_parameters():
        weight.data += 0.05 * torch.randn_like(weight) * ("lora_" in name)
    export_student(student, tmp_path)


@pytest.mark.parametrize(
    "quantised",
    [{"quant_method": "gptq", "bits": 4}, {"quant_method": "awq", "bits": 4}, {"quant_method": "fp8"},
     {"quant_method": "compressed-tensors"}, {"quant_method": "bitsandbytes", "load_in_4bit": True}],
    ids=lambda section: section["quant_method"],
)  # fmt: skip
def test_a_quantised_student_is_refused(quantised, make_model, save_model, tiny_tokenizer, no_weights):
    path = save_model(make_model(1))
    with open(f"{path}/config.json") as file:
        settings = json.load(file)
    with open(f"{path}/config.json", "w") as file:
        json.dump(settings | {"quantization_config": quantised}, file)
    for lora in (None, LINEAR):
        message = (
            rf"student\.path: expected a student in full precision.*quantised by {quantised['quant_method']}\. Name"
        )
        with pytest.raises(UserError, match=message):
            load_student(StudentConfig(path, lora=lora), tiny_tokenizer)


def test_models_in_memory_are_held_to_the_same(student_path, make_model, tiny_tokenizer):
    """On a CPU, 4-bit weights under an adapter gave gradients of exactly 0."""
    four = BitsAndBytesConfig(load_in_4bit=True)
    quantised = AutoModelForCausalLM.from_pretrained(student_path, quantization_config=four)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    embedding = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"])
    tied = make_model(1, tie_word_embeddings=True)
    for model, message in (
        (peft.get_peft_model(quantised, lora), "student: expected a student in full precision.*bitsandbytes"),
        (peft.get_peft_model(make_model(1), prompts), "student: .*found a PROMPT_TUNING adapter beside them"),
        (peft.get_peft_model(tied, embedding), r"student\.lora: .*tied"),
    ):
        with pytest.raises(UserError, match=message):
            DistillationModule(model, make_model(2), tokenizer=tiny_tokenizer)
    fine = peft.get_peft_model(make_model(1), copy.deepcopy(lora))
    assert DistillationModule(fine, make_model(2), tokenizer=tiny_tokenizer)
