"""The local engine against plain forward passes, against `generate` of transformers, and against the exact law."""

import copy

import pytest
import scipy.stats
import torch

from lit_opd.functional import law_logps
from lit_opd.models import LanguageModel
from lit_opd.models.forward import PaddedForward
from lit_opd.rollout import LocalEngine, uniforms
from lit_opd.types import FinishReason, Prompts, SamplingLaw

LAWS = {
    "plain": SamplingLaw(),
    "temperature": SamplingLaw(temperature=0.6),
    "hot": SamplingLaw(temperature=1.7),
    "top_p": SamplingLaw(top_p=0.8),
    "top_k": SamplingLaw(top_k=4),
    "min_p": SamplingLaw(min_p=0.1),
    "min_new_tokens": SamplingLaw(min_new_tokens=4),
    "all": SamplingLaw(temperature=0.8, top_p=0.9, top_k=8, min_p=0.02, min_new_tokens=2),
}
STOP = torch.tensor([2])


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(3, torch.float64, initializer_range=0.4)


def same(one, two, rows=slice(None)):
    """Equal completions; log-probabilities, kept in fp32, equal up to rounding."""
    width = max(one.ids_BT.shape[1], two.ids_BT[rows].shape[1])
    for name in ("ids_BT", "real_BT", "sampler_logps_BT"):
        a, b = (torch.nn.functional.pad(x.double(), (0, width - x.shape[1]))
                for x in (getattr(one, name), getattr(two, name)[rows]))  # fmt: skip
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert torch.equal(one.finish_B, two.finish_B[rows])


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_sampler_logps_are_those_of_the_law_that_sampled(law, model, make_batch, sample, full_logits):
    rollout = sample(model, make_batch(), law, num_completions=4)
    logits = full_logits(model, rollout).detach()
    assert rollout.law == law
    for t in range(rollout.ids_BT.shape[1]):
        logps = law_logps(logits[:, t], law, STOP if t < law.min_new_tokens else None)
        expected = logps.gather(-1, rollout.ids_BT[:, t, None])[:, 0]
        counted = rollout.mask_BT[:, t]
        torch.testing.assert_close(rollout.sampler_logps_BT[counted, t].double(), expected[counted], rtol=0, atol=1e-5)
    assert not rollout.sampler_logps_BT[~rollout.mask_BT].any()
    assert rollout.sampler_logps_BT.dtype == torch.float32
    assert (rollout.real_BT.sum(1) > law.min_new_tokens).all()


def test_greedy_decoding_is_that_of_transformers(model, make_batch, sample):
    """Token for token, with left-padded prompts."""
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = [2, 9]
    batch = make_batch()
    rollout = sample(model, batch, SamplingLaw(temperature=0.0), length=12)
    generated = model.generate(batch.prompts.ids_BP, attention_mask=batch.prompts.mask_BP.long(), do_sample=False,
                               max_new_tokens=12, pad_token_id=0)[:, batch.prompts.ids_BP.shape[1] :]  # fmt: skip
    assert torch.equal(rollout.ids_BT, generated)
    assert 0 < (rollout.finish_B == FinishReason.STOP).sum() <= len(batch.rows)


def test_first_tokens_follow_the_exact_law(model, make_batch, sample, full_logits):
    law, count = SamplingLaw(temperature=1.3, top_p=0.95), 4000
    rollout = sample(model, make_batch(["12-9+3="]), law, num_completions=count, length=1)
    exact = law_logps(full_logits(model, rollout.rows(torch.tensor([0])))[0].detach(), law)[0].exp()
    counts = torch.bincount(rollout.ids_BT[:, 0], minlength=17)
    assert not counts[exact == 0].any()
    possible = exact > 0
    assert scipy.stats.chisquare(counts[possible].numpy(), count * exact[possible].numpy()).pvalue > 1e-3


def test_any_stop_token_ends_a_completion_and_is_counted(model, make_batch, sample):
    """What the tokenizer (2), the generation config (5 and 9) and the config (11) name; the rest is padding."""
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id, model.config.eos_token_id = [5, 9], 11
    stops = {2, 5, 9, 11}
    rollout = sample(model, make_batch(), SamplingLaw(), num_completions=20)
    ended = set()
    for row in range(len(rollout)):
        mask = rollout.real_BT[row]
        length = int(mask.sum())
        ids = rollout.ids_BT[row].tolist()
        assert mask[:length].all()
        assert not stops & set(ids[: length - 1])
        stopped = ids[length - 1] in stops
        ended |= {ids[length - 1]} & stops
        assert rollout.finish_B[row] == (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert stopped or length == 10
        assert set(ids[length:]) <= {0}
    assert ended == stops
    assert torch.equal(rollout.mask_BT, rollout.real_BT)


def test_a_stop_token_outside_the_vocabulary_is_no_stop_token(model, make_batch, sample, tiny_tokenizer):
    model = copy.deepcopy(model)
    model.config.eos_token_id = 50256
    assert LanguageModel(model, tiny_tokenizer, "student").stop_ids == [2]
    sample(model, make_batch(), SamplingLaw(min_new_tokens=2))


def test_no_stop_token_before_min_new_tokens_and_none_forbidden_after(model, make_batch, sample):
    rollout = sample(model, make_batch(), SamplingLaw(min_new_tokens=3), num_completions=40)
    lengths = rollout.real_BT.sum(1)[rollout.finish_B == FinishReason.STOP]
    assert lengths.min() == 4


@pytest.mark.parametrize("law", [LAWS["plain"], LAWS["min_new_tokens"]], ids=["plain", "min_new_tokens"])
def test_without_stop_tokens_every_completion_has_the_full_length(law, model, make_batch, sample, monkeypatch):
    monkeypatch.setattr(LanguageModel, "stop_ids", [])
    rollout = sample(model, make_batch(), law)
    assert rollout.mask_BT.shape[1] == 10
    assert rollout.mask_BT.all()
    assert (rollout.finish_B == FinishReason.LENGTH).all()


@pytest.mark.parametrize("law", [LAWS["plain"], LAWS["all"]], ids=["plain", "truncated"])
def test_padding_and_neighbours_change_nothing(law, model, make_batch, sample):
    batch = make_batch()
    together = sample(model, batch, law, num_completions=3)
    same(sample(model, make_batch(extra_padding=5), law, num_completions=3), together)
    for i, row in enumerate(batch.rows):
        same(sample(model, make_batch([row["prompt"]]), law, num_completions=3), together, slice(3 * i, 3 * i + 3))


def test_three_completions_of_a_prompt_are_three_prompts_sampled_apart(model, make_batch, tiny_tokenizer):
    """Sharing the prefill is only a saving; the streams of the completions differ."""
    policy, batch = LanguageModel(model, tiny_tokenizer, "student"), make_batch()
    numbers = uniforms((0, 0), batch.draws, 3, 10)
    shared = LocalEngine().sample(policy, batch, SamplingLaw(), 3, numbers)
    index = torch.arange(5).repeat_interleave(3)
    repeated = batch._replace(prompts=Prompts(*(x[index] for x in batch.prompts)))
    same(LocalEngine().sample(policy, repeated, SamplingLaw(), 1, numbers), shared)
    assert torch.equal(shared.prompt_index_B, index)
    assert torch.equal(shared.prompts.ids_BP, repeated.prompts.ids_BP)
    assert len({tuple(row) for row in shared.ids_BT[:3].tolist()}) == 3


def test_padding_rows_of_the_vocabulary_are_never_sampled(make_model, tiny_tokenizer, make_batch):
    """Eight rows behind the last token; without the cut they would take much of the mass."""
    model = make_model(1, vocab_size=25)
    with torch.no_grad():
        model.lm_head.weight[17:] *= 3
    policy, batch = LanguageModel(model, tiny_tokenizer, "student"), make_batch()
    numbers = uniforms((0, 0), batch.draws, 40, 3)
    assert LocalEngine().sample(policy, batch, SamplingLaw(), 40, numbers).ids_BT.max() > 16
    policy.vocabulary = 17
    assert LocalEngine().sample(policy, batch, SamplingLaw(), 40, numbers).ids_BT.max() <= 16


@pytest.mark.parametrize("path", [LanguageModel.hidden, PaddedForward("asked for").hidden], ids=["packed", "padded"])
def test_trimmed_micro_batches_have_the_same_hidden_states(path, model, make_batch, sample, tiny_tokenizer):
    policy = LanguageModel(model, tiny_tokenizer, "student")
    rollout = sample(model, make_batch(extra_padding=2), SamplingLaw(), num_completions=2)
    flat, _ = path(policy, rollout)
    whole = flat.new_zeros(*rollout.mask_BT.shape, flat.shape[-1])
    whole[rollout.mask_BT] = flat
    for rows in ([0], [2, 3], [9, 4, 1]):
        part = rollout.rows(torch.tensor(rows))
        found, _ = path(policy, part)
        assert part.prompts.mask_BP.any(0).all()
        assert part.real_BT.any(0).all()
        torch.testing.assert_close(found, whole[rows][rollout.real_BT[rows]], rtol=0, atol=1e-12)


def test_casts_kept_while_sampling_do_not_outlive_it(make_model, make_batch, sample, tiny_tokenizer):
    """Inside somebody's autocast: the next rollout sees new weights, and training gets its gradients."""
    model, batch = make_model(3), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sample(model, batch, SamplingLaw())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        found = sample(model, batch, SamplingLaw())
        LanguageModel(model, tiny_tokenizer, "student").hidden(found)[0].sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = sample(copy.deepcopy(model), batch, SamplingLaw())
    assert torch.equal(found.ids_BT, expected.ids_BT)
    assert torch.equal(found.sampler_logps_BT, expected.sampler_logps_BT)
    assert all(p.grad.any() for p in model.model.parameters())
