"""How long rows may be: the context, and rotary frequencies that depend on the longest row of a batch."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lit_opd.errors import UserError
from lit_opd.models import LanguageModel, context_length
from lit_opd.models.context import check_length, steady_length
from lit_opd.rollout import LocalEngine, uniforms
from lit_opd.types import SamplingLaw

SHORT = 16  # tokens that the smallest of these models was made for
FACTORS = [1.0, 3.0, 2.0, 5.0]  # of half a head's dimensions
KEYS = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": SHORT},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": SHORT},
    "longrope": {"factor": 4.0, "short_factor": [1.0] * 4, "long_factor": FACTORS,
                 "original_max_position_embeddings": SHORT},
    "proportional": {"partial_rotary_factor": 0.5},
}  # fmt: skip
CONTEXTS = {"dynamic": SHORT}


def test_every_kind_of_rotation_of_transformers_is_here():
    assert set(KEYS) == set(ROPE_INIT_FUNCTIONS)


@pytest.fixture
def make_policy(make_model, tiny_tokenizer):
    def make(kind):
        rope = {"rope_type": kind, "rope_theta": 10000.0} | KEYS[kind]
        model = make_model(3, max_position_embeddings=CONTEXTS.get(kind, 64), rope_parameters=rope)
        return LanguageModel(model, tiny_tokenizer, "student")

    return make


def sample(policy, batch, length):
    return LocalEngine().sample(policy, batch, SamplingLaw(), 2, uniforms((0, 0), batch.draws, 2, length))


@pytest.mark.parametrize("kind", KEYS)
def test_a_row_has_one_log_probability_or_is_refused(kind, make_policy, make_batch, full_logits):
    """Rows on both sides of the length at which frequencies may change, together and each alone."""
    policy, batch = make_policy(kind), make_batch(extra_padding=0)
    policy.model.generation_config.eos_token_id = policy.tokenizer.eos_token_id
    if kind in ("longrope", "dynamic"):
        with pytest.raises(UserError) as error:
            sample(policy, batch, 30)
        assert str(error.value) == (
            "rollout.max_new_tokens: expected prompt and completion of at most 16 tokens, for in longer rows the "
            "rotary frequencies of student.path depend on the longest row of a batch, found rows of up to 37. Lower "
            "it or data.max_prompt_tokens, or name a model whose rope_type is static (yarn, llama3)."
        )
        rollout = sample(policy, batch, 9)
        with pytest.raises(UserError, match=r"found rows of up to 39\."):
            check_length(policy, 39)
    else:
        rollout = sample(policy, batch, 30)
        assert rollout.real_BT.sum(1).amax() + batch.prompts.mask_BP.sum(1).amax() > SHORT
    for row in range(len(rollout)):
        one = rollout.rows(torch.tensor([row]))
        own_TV = full_logits(policy.model, one)[0].log_softmax(-1)
        own_T = own_TV.gather(-1, one.ids_BT[0, :, None])[:, 0].detach()
        torch.testing.assert_close(one.sampler_logps_BT[0], own_T, atol=2e-5, rtol=1e-5)


def test_a_rollout_too_long_for_a_scorer_is_refused(make_policy, make_model, tiny_tokenizer, make_batch):
    rollout = sample(LanguageModel(make_model(1), tiny_tokenizer, "student"), make_batch(), 30)
    teacher = make_policy("longrope")
    teacher.key = "teacher"
    with pytest.raises(UserError, match=r"the rotary frequencies of teacher.path depend"):
        teacher.hidden(rollout)


def test_lengths_of_configurations():
    plain = LlamaConfig(max_position_embeddings=64)
    assert (context_length(plain), steady_length(plain)) == (64, None)
    long = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0,
            "short_factor": [1.0], "long_factor": [2.0]}  # fmt: skip
    plain.rope_parameters = {"full_attention": long, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    assert (context_length(plain), steady_length(plain)) == (16, 16)
    plain.rope_parameters = {"rope_type": "dynamic", "alpha": 1000.0}
    assert (context_length(plain), steady_length(plain)) == (64, None), "Hunyuan's frequencies are fixed"
