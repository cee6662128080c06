"""What the local engine writes, whatever makes it fast: the tokens of `generate`, and the law that was asked for.

Tiny random models of many architectures in fp32: fused and separate projections, biases, norms of queries and keys,
sliding windows, soft-caps, experts, sinks, learned, rotary and linear positions, convolutions and recurrences.
"""

import functools

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from architectures import ATTENTION, RECURRENT, build
from packaging.version import Version
from transformers.models.lfm2.modeling_lfm2 import Lfm2Model

from lit_opd.errors import UserError
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, uniforms
from lit_opd.rollout.decoders import reads_together
from lit_opd.types import FinishReason, SamplingLaw

GREEDY, LENGTH = SamplingLaw(temperature=0.0), 16
every_attention = pytest.mark.parametrize("name", ATTENTION)


@pytest.fixture(scope="module")
def make_policy(tiny_tokenizer, make_batch):
    """Makes a random model whose greedy completions of the batch have three lengths or more."""

    @functools.cache
    def make(name):
        for seed in range(100):
            model = build(name, seed)
            texts = [generate(model, prompt) for prompt in prompts_of(make_batch())]
            token = max(range(17), key=lambda token: spread(token, texts))
            model.generation_config.eos_token_id = [2, token]
            if spread(token, texts) > 2:
                return LanguageModel(model, tiny_tokenizer, "student")
        raise AssertionError(f"every {name} stops at once, or never")

    return make


def spread(token, texts):
    """How many different lengths the texts have if the token ends them."""
    return len({text.index(token) + 1 if token in text else len(text) for text in texts})


def prompts_of(batch):
    return [ids[mask] for ids, mask in zip(batch.prompts.ids_BP, batch.prompts.mask_BP, strict=True)]


def generate(model, prompt):
    """Hugging Face's greedy completion of one prompt, alone and without padding."""
    inputs = {"input_ids": prompt[None], "attention_mask": torch.ones_like(prompt)[None]}
    return model.generate(**inputs, do_sample=False, max_new_tokens=LENGTH)[0, len(prompt) :].tolist()


def sample(policy, batch, law, count=1, length=LENGTH):
    return LocalEngine().sample(policy, batch, law, count, uniforms((0, 0), batch.draws, count, length))


def written(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.ids_BT, rollout.real_BT, strict=True)]


def check_greedy(policy, batch, count):
    texts = [generate(policy.causal_lm, prompt) for prompt in prompts_of(batch)]
    expected = [text for text in texts for _ in range(count)]
    rollout = sample(policy, batch, GREEDY, count)
    assert written(rollout) == expected
    assert (rollout.finish_B == FinishReason.STOP).tolist() == [row[-1] in policy.stop_ids for row in expected]
    assert len(set(map(len, expected))) > 2


def check_logps(policy, batch, count, temperature):
    """By one forward pass a row, without padding and without a cache."""
    rollout = sample(policy, batch, SamplingLaw(temperature=temperature), count)
    prompts = prompts_of(batch)
    for row, ids in enumerate(written(rollout)):
        prompt, ids = prompts[row // count], torch.tensor(ids)
        logits = policy.causal_lm(input_ids=torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits / temperature, -1).gather(-1, ids[:, None])[:, 0]
        torch.testing.assert_close(rollout.sampler_logps_BT[row, : len(ids)], expected, rtol=1e-5, atol=1e-5)


def check_rows(policy, make_batch, count):
    """Every prompt alone, without padding, and all of them in another order, each with the uniforms of its name."""
    prompts = [row["prompt"] for row in make_batch().rows]
    together = written(sample(policy, make_batch(), SamplingLaw(), count))
    for order in ([0], [1], [2], [3], [4], [3, 0, 4, 2, 1]):
        expected = [together[i * count + completion] for i in order for completion in range(count)]
        assert written(sample(policy, make_batch([prompts[i] for i in order]), SamplingLaw(), count)) == expected


@every_attention
def test_greedy_completions_are_those_of_generate(name, make_policy, make_batch):
    check_greedy(make_policy(name), make_batch(), count=2)


@every_attention
def test_recorded_log_probabilities_are_those_of_a_forward_pass(name, make_policy, make_batch):
    check_logps(make_policy(name), make_batch(), count=3, temperature=0.8)


@every_attention
def test_a_row_depends_neither_on_its_batch_mates_nor_on_the_order_of_prompts(name, make_policy, make_batch):
    check_rows(make_policy(name), make_batch, count=2)


# The release of transformers that first gives these a cache to read on from, by the name that it gives the others'.
CACHED_SINCE = {"mamba": "5.24", "falcon_h1": "5.5", "granitemoehybrid": "5.5"}
CACHED = [name for name in RECURRENT if Version(transformers.__version__) >= Version(CACHED_SINCE.get(name, "5.0"))]
every_recurrence = pytest.mark.parametrize("name", CACHED)


@every_recurrence
def test_a_recurrent_state_is_that_of_its_row(name, make_policy, make_batch):
    check_greedy(make_policy(name), make_batch(), count=1)
    check_logps(make_policy(name), make_batch(), count=1, temperature=0.8)
    check_rows(make_policy(name), make_batch, count=1)


@every_recurrence
def test_a_recurrent_state_is_that_of_every_completion(name, make_policy, make_batch):
    check_greedy(make_policy(name), make_batch(), count=2)
    check_logps(make_policy(name), make_batch(), count=3, temperature=0.8)
    check_rows(make_policy(name), make_batch, count=2)


def refusal(name, tokenizer, batch):
    policy = LanguageModel(build(name, 0), tokenizer, "teacher")
    with pytest.raises(UserError) as error:
        sample(policy, batch, SamplingLaw())
    return str(error.value)


def test_a_model_that_takes_no_cache_is_refused(tiny_tokenizer, make_batch):
    assert refusal("rwkv", tiny_tokenizer, make_batch()) == (
        "teacher.path: expected a model that can be sampled token by token over a cache of its own, found RwkvModel, "
        "which takes no cache. Name another model, or sample with rollout.engine=vllm."
    )


def test_a_model_that_gives_no_cache_back_is_refused(tiny_tokenizer, make_batch, monkeypatch):
    monkeypatch.setattr(Lfm2Model, "forward", without_cache(Lfm2Model.forward))
    assert "found Lfm2Model, which gives no cache back" in refusal("lfm2", tiny_tokenizer, make_batch())
    monkeypatch.undo()
    for name in set(RECURRENT) - set(CACHED):
        assert "no cache" in refusal(name, tiny_tokenizer, make_batch())


def without_cache(forward):
    """A body's forward pass as some hybrid models had it before transformers 5.5."""

    @functools.wraps(forward)
    def run(self, **inputs):
        return forward(self, **inputs | {"use_cache": False})

    return run


def wrap_convolution(model, change):
    """Changes what the first layer's convolution is given, by name."""
    convolution = model.model.layers[0].conv
    inner = convolution.forward
    convolution.forward = lambda *args, **kwargs: inner(*args, **kwargs | change)


def test_a_recurrent_state_that_would_read_padding_gets_none(tiny_tokenizer, make_batch):
    """A convolution that takes the padding before a prompt for a part of it."""
    model = build("lfm2", 0)
    wrap_convolution(model, {"attention_mask": None})
    policy = LanguageModel(model, tiny_tokenizer, "student")
    assert not reads_together(policy)
    check_logps(policy, make_batch(), count=3, temperature=0.8)
    check_rows(policy, make_batch, count=2)


def test_a_recurrent_state_that_forgets_is_refused(tiny_tokenizer, make_batch):
    """A convolution that is given no cache begins anew at every token."""
    model = build("lfm2", 0)
    name = LanguageModel(model, tiny_tokenizer, "student").cache_name
    wrap_convolution(model, {name: None})
    with pytest.raises(UserError, match=r"student.path: .* found Lfm2Model, which is off by 0\.\d+ over its cache"):
        sample(LanguageModel(model, tiny_tokenizer, "student"), make_batch(), SamplingLaw())


def test_a_model_that_fails_over_its_cache_is_refused(tiny_tokenizer, make_batch, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("The size of tensor a (38) must match")

    model = build("lfm2", 0)
    monkeypatch.setattr(model.model.layers[0].conv, "forward", fail)
    found = r"found Lfm2Model, which fails over its cache \(RuntimeError: The size of tensor a \(38\) must match\)"
    with pytest.raises(UserError, match=found):
        sample(LanguageModel(model, tiny_tokenizer, "student"), make_batch(), SamplingLaw())


# The law


LAWS = {
    "untruncated": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 4},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.2},
    "all": {"temperature": 1.4, "top_k": 9, "top_p": 0.9, "min_p": 0.1},
}
ROWS = 20_000


def exact_law(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities by a loop over the tokens, largest first, as `SamplingLaw` describes them."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p)[: top_k or None]
    kept, mass = [], 0.0
    for token in order:
        if mass < top_p * p[order].sum():
            kept.append(token)
        mass += p[token]
    kept = [token for token in kept if p[token] >= min_p * p.max()]
    law = np.zeros_like(p)
    law[kept] = p[kept] / p[kept].sum()
    return law


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(3, initializer_range=0.35)


def pair_p_value(model, batch, numbers_BT, keywords, tokenizer):
    """How well counts of the first two tokens fit their exact joint law; 0 where something impossible was written."""
    law, policy = SamplingLaw(**keywords), LanguageModel(model, tokenizer, "student")
    ids_BT = LocalEngine().sample(policy, batch, law, ROWS, numbers_BT).ids_BT
    prompt = batch.prompts.ids_BP
    with torch.no_grad():
        first = exact_law(model(prompt).logits[0, -1].double().numpy(), **keywords)
        both = model(torch.cat([prompt.expand(17, -1), torch.arange(17)[:, None]], 1)).logits[:, -1].double().numpy()
    expected = np.stack([first[token] * exact_law(both[token], **keywords) for token in range(17)])
    expected[2] = 0.0  # nothing follows the stop token, and padding is written there
    expected[2, 0] = first[2]
    counts = np.zeros((17, 17))
    np.add.at(counts, tuple(ids_BT[:, :2].T.numpy()), 1)
    if counts[expected == 0].any():
        return 0.0
    often = expected * ROWS >= 5
    observed = [*counts[often], counts[~often].sum()]
    wanted = [*expected[often] * ROWS, expected[~often].sum() * ROWS]
    keep = slice(None) if wanted[-1] >= 5 else slice(-1)
    observed, wanted = np.array(observed[keep]), np.array(wanted[keep])
    return scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@pytest.mark.parametrize("keywords", LAWS.values(), ids=LAWS)
def test_the_first_two_tokens_follow_the_exact_law(keywords, model, make_batch, tiny_tokenizer):
    batch = make_batch(["12-9+3="])
    numbers_BT = uniforms((5, 0), batch.draws, ROWS, 2)
    assert pair_p_value(model, batch, numbers_BT, keywords, tiny_tokenizer) > 1e-3


@pytest.mark.parametrize("spoil", ["skewed", "first once more", "one for all prompts of a group of ten"])
def test_uniforms_that_are_none_would_be_noticed(spoil, model, make_batch, tiny_tokenizer):
    batch = make_batch(["12-9+3="])
    numbers_BT = uniforms((5, 0), batch.draws, ROWS, 2)
    spoilt = {
        "skewed": numbers_BT**1.1,
        "first once more": numbers_BT[:, :1].expand(-1, 2).contiguous(),
        "one for all prompts of a group of ten": numbers_BT[::10].repeat_interleave(10, 0),
    }[spoil]
    assert pair_p_value(model, batch, spoilt, {}, tiny_tokenizer) < 1e-3
