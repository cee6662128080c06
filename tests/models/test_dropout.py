"""A student that trains is the student that sampled: no dropout of any kind, unless it is kept on purpose."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lit_opd import DistillationModule
from lit_opd.config import StudentConfig
from lit_opd.errors import UserError
from lit_opd.models import LanguageModel, load_student
from lit_opd.models.dropout import compute_layers_twice, set_dropout

SIZES = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0, "num_key_value_heads": 2, "intermediate_size": 24, "n_embd": 16,
         "n_layer": 2, "n_head": 2, "max_position_embeddings": 64, "n_positions": 64, "ffn_dim": 24, "d_model": 16,
         "word_embed_proj_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "initializer_range": 0.3,
         "activation_function": "gelu", "rotary_dim": 4}  # fmt: skip
NOISE = ("drop", "jitter")
# With dropout as modules and as functions, layers that are left out, and noise in routers.
KINDS = ["gpt2", "opt", "biogpt", "bloom", "gpt_neo", "gptj", "falcon", "starcoder2", "xglm", "mixtral", "phimoe"]


def noisy(kind):
    """A small random model with a half of everything that its configuration calls dropout or jitter."""
    known = AutoConfig.for_model(kind).to_dict()
    keys = {key: value for key, value in SIZES.items() if key in known}
    keys |= {k: 0.5 for k, v in known.items() if any(word in k for word in NOISE) and isinstance(v, float)}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys))


def passes(model, keep):
    """Two passes with gradients as in training, and one as a sampler makes it."""
    ids = torch.arange(3, 11)[None]
    set_dropout(model, keep)
    return model(ids).logits, model(ids).logits, copy.deepcopy(model).eval()(ids).logits.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_random_is_left_in_training(kind):
    """Neither where every layer is computed once, nor where it is computed twice."""
    model, gradients = noisy(kind), []
    for twice in (False, True):
        if twice:
            compute_layers_twice(model)
        one, other, sampled = passes(model, keep=True)
        assert not torch.equal(one, other), "nothing to leave out"
        one, other, sampled = passes(model, keep=False)
        assert torch.equal(one, other)
        assert torch.equal(one, sampled)
        weights = list(model.parameters())
        gradients.append(torch.autograd.grad(one.logsumexp(-1).sum(), weights, allow_unused=True))
    assert any(gradient is not None and gradient.any() for gradient in gradients[0])
    for once, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, once)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_first_step_s_student_is_the_sampler(checkpointing, save_model, tiny_tokenizer, fit):
    """With dropout of a half they are nats apart. A student in memory is treated alike."""
    model = noisy("gpt2")
    path = save_model(model)
    for student in (StudentConfig(path, gradient_checkpointing=checkpointing), model):
        rollout = {"max_new_tokens": 6}
        module = DistillationModule(student, path, "token", tokenizer=tiny_tokenizer, rollout=rollout)
        record = fit(module)
        assert abs(record.metrics[0]["rollout/sampler_gap"]) < 1e-4
    kept = StudentConfig(path, dropout="keep", gradient_checkpointing=checkpointing)
    module = DistillationModule(kept, path, "token", tokenizer=tiny_tokenizer, rollout=rollout,
                                lint={"allow": ["dropout_in_training"]})  # fmt: skip
    assert abs(fit(module).metrics[0]["rollout/sampler_gap"]) > 0.05


def test_adapters_have_none_either(student_path, tiny_tokenizer):
    lora = {"target_modules": "all-linear", "lora_dropout": 0.5, "init_lora_weights": False}
    student = load_student(StudentConfig(student_path, lora=lora), tiny_tokenizer)
    one, other, sampled = passes(student.model, keep=True)
    assert not torch.equal(one, other)
    one, other, sampled = passes(student.model, keep=False)
    assert torch.equal(one, other)
    assert torch.equal(one, sampled)


def test_layers_that_cannot_be_computed_twice_are_refused(make_model, monkeypatch):
    monkeypatch.setattr("transformers.modeling_layers.GradientCheckpointingLayer", type("Other", (), {}))
    with pytest.raises(UserError, match=r"student\.gradient_checkpointing: expected false, found true for LlamaForCa"):
        compute_layers_twice(make_model(1))


def test_a_mode_is_restored_after_an_evaluation(make_model, tiny_tokenizer):
    model = make_model(1)
    compute_layers_twice(model)
    set_dropout(model, keep=False)
    before = [part.training for part in model.modules()]
    assert sum(before) == 2, "the layers alone say that they train"
    with LanguageModel(model, tiny_tokenizer, "student").evaluating():
        assert not any(part.training for part in model.modules())
    assert [part.training for part in model.modules()] == before
