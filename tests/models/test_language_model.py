"""Heads of several architectures, and what of a model may depend on padding."""

import pytest
import torch
import transformers
from references import padded
from transformers import LlamaForCausalLM

from lit_opd.config import StudentConfig
from lit_opd.errors import UserError
from lit_opd.functional import head_logits
from lit_opd.models import LanguageModel, load_student
from lit_opd.types import SamplingLaw

SIZES = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.5}  # fmt: skip
ARCHITECTURES = {
    "Cohere": {"logit_scale": 0.25},
    "Gemma2": {"final_logit_softcapping": 2.0, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4},
    "Granite": {"logits_scaling": 4.0},
    "Phi": {},
    "GPT2": {},
    "Qwen3": {"head_dim": 8},
}


class Scaled(LlamaForCausalLM):
    """A model that does something to its logits which nothing in its configuration tells."""

    factor = 1.1

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * self.factor
        return output


@pytest.fixture
def make_architecture():
    def make(name):
        torch.manual_seed(0)
        short = {"vocab_size": 17, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        sizes = short if name == "GPT2" else SIZES
        config = getattr(transformers, f"{name}Config")(**(sizes | ARCHITECTURES[name]))
        suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
        model = getattr(transformers, name + suffix)(config).eval()
        with torch.no_grad():  # what is initialised to zero or one would hide mistakes
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        return model

    return make


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_rebuilt_from_hidden_states(
    name, make_architecture, tiny_tokenizer, make_batch, sample, full_logits
):
    """Scale, soft-cap and bias are read off; left padding, other completions and sliding windows change nothing."""
    # Eager attention, all that Gemma2 has, is not made for float64: its mask overflows in an fp32 softmax.
    dtype, tolerance = (torch.float32, 1e-4) if name == "Gemma2" else (torch.float64, 1e-11)
    model = make_architecture(name).to(dtype)
    policy = LanguageModel(model, tiny_tokenizer, "student")
    policy.check_head()
    rollout = sample(model, make_batch(), SamplingLaw(), num_completions=2)
    mask = rollout.mask_BT
    found, expected = head_logits(padded(policy, rollout), policy.head), full_logits(model, rollout)[mask]
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(head_logits(policy.hidden(rollout)[0], policy.head), expected, rtol=0, atol=tolerance)
    taken = found.log_softmax(-1).gather(-1, rollout.ids_BT[mask][:, None])[:, 0]
    torch.testing.assert_close(rollout.sampler_logps_BT[mask], taken.float(), rtol=0, atol=1e-4)


def test_the_architectures_do_use_scale_softcap_and_bias(make_architecture, tiny_tokenizer):
    heads = {name: LanguageModel(make_architecture(name), tiny_tokenizer, "student").head for name in ARCHITECTURES}
    assert heads["Cohere"].scale == heads["Granite"].scale == 0.25
    assert heads["Gemma2"].softcap == 2.0
    assert heads["Phi"].bias_V is not None
    assert heads["Phi"].bias_V.any()


@pytest.mark.parametrize("name", ["Cohere", "Gemma2", "Phi"])
def test_a_temperature_divides_the_model_s_own_logits(name, make_architecture, tiny_tokenizer, make_batch, sample):
    """After scale and soft-cap; the check of the head, and the model without it, are as before."""
    model = make_architecture(name)
    plain, warm = (LanguageModel(model, tiny_tokenizer, "teacher", temperature=t) for t in (1.0, 1.7))
    warm.vocabulary = 16
    warm.check_head()
    hidden = padded(plain, sample(model, make_batch(), SamplingLaw()))
    expected = head_logits(hidden, plain.head)[..., :16]
    torch.testing.assert_close(head_logits(hidden, warm.head), expected / 1.7, rtol=1e-6, atol=1e-6)
    assert torch.equal(head_logits(hidden, warm.untempered().head), expected)
    assert warm.untempered().model is model


@pytest.mark.parametrize("initializer_range", [0.02, 0.5])
def test_a_model_whose_logits_are_no_projection_is_refused(make_model, tiny_tokenizer, initializer_range):
    """Also where its logits are small, as those of a random model are."""
    model = Scaled(make_model(1, initializer_range=initializer_range).config)
    with pytest.raises(UserError, match=r"student\.path: .*projection of its last hidden states, found Scaled, off by"):
        LanguageModel(model, tiny_tokenizer, "student").check_head()
    model.factor = 1.0
    LanguageModel(model, tiny_tokenizer, "student").check_head()


def test_a_model_in_train_mode_with_dropout_passes_the_check(make_model, tiny_tokenizer):
    model = make_model(1, attention_dropout=0.9).train()
    LanguageModel(model, tiny_tokenizer, "student").check_head()
    assert model.training


def test_a_model_without_output_layer_is_refused(make_model, tiny_tokenizer):
    with pytest.raises(UserError, match=r"teacher\.path: .*output layer, found LlamaModel"):
        LanguageModel(make_model(1).model, tiny_tokenizer, "teacher")


def test_the_head_is_cut_to_the_shared_vocabulary(make_model, tiny_tokenizer):
    model = make_model(1, vocab_size=25)
    policy = LanguageModel(model, tiny_tokenizer, "student")
    policy.vocabulary = 17
    assert torch.equal(policy.head.weight_VH, model.lm_head.weight[:17])
    policy.check_head()


def test_an_adapter_on_the_output_layer_is_refused(student_path, tiny_tokenizer):
    """Its weight alone is read; the adapter would be saved, and never have been trained."""
    config = StudentConfig(student_path, lora={"r": 2, "target_modules": ["q_proj", "lm_head"]})
    with pytest.raises(UserError, match=r"student\.lora.*modules_to_save"):
        load_student(config, tiny_tokenizer)
    load_student(StudentConfig(student_path, lora={"r": 2, "modules_to_save": ["lm_head"]}), tiny_tokenizer)


def test_the_caller_s_precision_ends_with_the_context(make_model, tiny_tokenizer):
    own = LanguageModel(make_model(1), tiny_tokenizer, "teacher", own_precision=True)
    other = LanguageModel(make_model(1), tiny_tokenizer, "student")
    assert not torch.is_autocast_enabled("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with own.precision():
            assert not torch.is_autocast_enabled("cpu")
        with other.precision(cache_casts=True):
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_cache_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")
