"""Captured steps, on a tape that repeats operations as a CUDA graph would, against the plain loop."""

import copy
import gc
import logging

import peft
import pytest
import scipy.stats
import torch
from rollout.llamas import MODELS, eager_to_stop, same
from rollout.tape import Listening, Refused, TapeRecorder

from lit_opd.config import RolloutConfig
from lit_opd.errors import UserError
from lit_opd.functional import law_logps
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, build_engine, captured, uniforms
from lit_opd.rollout.captured import width_bucket
from lit_opd.rollout.fused import FusedDecoder
from lit_opd.types import SamplingLaw

PLAIN = SamplingLaw()
LAWS = {
    "plain": PLAIN,
    "temperature": SamplingLaw(temperature=0.6),
    "greedy": SamplingLaw(temperature=0.0),
    "truncated": SamplingLaw(temperature=0.8, top_p=0.9, top_k=8, min_p=0.02, min_new_tokens=2),
    "min_new_tokens": SamplingLaw(min_new_tokens=4),
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Buckets of 16 columns, batches of 2 rows and looks at every third token, so that tiny rollouts meet them."""
    monkeypatch.setattr(captured, "_NARROWEST", 16)
    monkeypatch.setattr(captured, "_FEWEST_ROWS", 2)
    monkeypatch.setattr(captured, "_LOOK_EVERY", 3)


def engine_of(policy, rows=20, width=32, **keywords):
    engine = LocalEngine(recorder=TapeRecorder, kernels=False, **keywords)
    (verdict,) = engine.prove(policy, rows, width, choice="fast")
    assert verdict.taken
    return engine


def run(engine, policy, batch, completions=4, length=24, law=PLAIN, seed=0):
    return engine.sample(policy, batch, law, completions, uniforms((seed, 0), batch.draws, completions, length))


def check(engine, policy, batch, *args, **keywords):
    """By captured steps, without falling back to the plain loop, and by the plain loop."""
    same(run(engine, policy, batch, *args, **keywords), run(LocalEngine(), policy, batch, *args, **keywords))
    assert policy.model in engine._captured


def captures(engine, policy):
    return engine._captured[policy.model].captures


@pytest.mark.parametrize("case", MODELS)
def test_captured_rollouts_are_those_of_the_plain_loop(case, make_policy, make_batch):
    name, config = MODELS[case]
    policy, batch = eager_to_stop(make_policy(name, **config)), make_batch()
    engine = engine_of(policy)
    check(engine, policy, batch)
    assert captures(engine, policy) > 2


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_captured_rollouts_follow_every_law(law, make_policy, make_batch):
    policy, batch = eager_to_stop(make_policy("Qwen3", head_dim=8)), make_batch()
    engine = engine_of(policy)
    for seed in range(2):
        check(engine, policy, batch, law=law, seed=seed)


def test_first_tokens_that_were_captured_follow_the_exact_law(make_policy, make_batch):
    """The second token of 4000 completions, whose law is that of the prompt and the first one."""
    law, count = SamplingLaw(temperature=1.3, top_p=0.95), 4000
    policy, batch = make_policy("Llama"), make_batch(["12-9+3="])
    policy.model.generation_config.eos_token_id = None
    engine = engine_of(policy, rows=4, width=16)
    run(engine, policy, batch, count, 3, law)
    rollout = run(engine, policy, batch, count, 3, law, seed=1)
    first = int(rollout.ids_BT[:, 0].mode().values)
    chosen = rollout.ids_BT[rollout.ids_BT[:, 0] == first]
    ids = torch.cat([batch.prompts.ids_BP, torch.tensor([[first]])], 1)
    exact = law_logps(policy.model(input_ids=ids).logits[0, -1:].detach(), law)[0].exp()
    counts = torch.bincount(chosen[:, 1], minlength=17)
    assert not counts[exact == 0].any()
    possible = exact > 0
    expected = len(chosen) * exact[possible].numpy()
    assert scipy.stats.chisquare(counts[possible].numpy(), expected).pvalue > 1e-3


def test_after_a_step_of_the_optimizer_nothing_is_captured_anew_and_the_new_weights_count(make_policy, make_batch):
    policy, batch = eager_to_stop(make_policy("Llama", torch.float32, tie_word_embeddings=True)), make_batch()
    engine = engine_of(policy)
    before, known = run(engine, policy, batch), captures(engine, policy)
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    for parameter in policy.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    after = run(engine, policy, batch)
    assert captures(engine, policy) <= known + 2  # other rows end, so that other numbers of rows may be met
    same(after, run(LocalEngine(), policy, batch), atol=1e-5)
    assert not torch.equal(before.ids_BT[:, :5], after.ids_BT[:, :5])
    known = captures(engine, policy)
    run(engine, policy, batch)
    assert captures(engine, policy) == known


def test_under_autocast_weights_are_cast_in_place(make_policy, make_batch):
    policy, batch = make_policy("Llama", torch.float32), make_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine = engine_of(policy)
        proven = engine._captured[policy.model]
        run(engine, policy, batch)
        assert engine._captured[policy.model] is proven, "it was proven in another precision"
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.1)
        found = run(engine, policy, batch)
        same(found, run(engine_of(policy), policy, batch), atol=0)
        # oneDNN's kernel of the plain loop rounds otherwise, so that some rows part.
        alike = (found.ids_BT[:, :3] == run(LocalEngine(), policy, batch).ids_BT[:, :3]).all(1)
    assert alike.float().mean() > 0.7


def test_weights_that_moved_are_captured_where_they_are(make_policy, make_batch):
    policy, batch = make_policy("Llama"), make_batch()
    engine = engine_of(policy)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.data = parameter.data * 1.2
    check(engine, policy, batch)


def test_rollouts_of_other_sizes_and_laws_and_temperatures_share_one_writer(make_policy, make_batch):
    policy = eager_to_stop(make_policy("Llama"))
    engine = engine_of(policy, rows=4)
    hot = copy.copy(policy)
    hot.temperature = 2.0
    for model, law, texts, count, length in (
        (policy, PLAIN, ["7="], 2, 4), (policy, LAWS["greedy"], None, 4, 30), (hot, PLAIN, ["7=", "12-9+3="], 1, 9),
        (policy, PLAIN, ["7=", "12-9+3="], 1, 9), (policy, PLAIN, None, 2, 1), (policy, PLAIN, None, 4, 30),
    ):  # fmt: skip
        batch = make_batch(texts) if texts else make_batch()
        check(engine, model, batch, count, length, law)


def test_a_cache_that_grew_is_captured_anew(make_policy, make_batch):
    policy = make_policy("Llama")
    engine = engine_of(policy, rows=20, width=16)
    for padding in (0, 30, 0):
        check(engine, policy, make_batch(extra_padding=padding), length=8)


def test_an_evaluation_in_inference_mode_leaves_tensors_that_training_can_write(make_policy, make_batch):
    """Lightning evaluates so, and what grows there would be closed to the next training step."""
    policy, batch = eager_to_stop(make_policy("Llama")), make_batch()
    engine = engine_of(policy, rows=4, width=16)
    with torch.inference_mode():
        check(engine, policy, batch)
    check(engine, policy, batch)


def test_the_configuration_turns_capture_off():
    assert build_engine(RolloutConfig(capture="off"))._capture == "off"


def test_what_an_earlier_rollout_broke_reaches_no_later_one(make_policy, make_batch):
    policy, batch = make_policy("Llama"), make_batch()
    engine = engine_of(policy)
    run(engine, policy, batch)
    for cache in engine._captured[policy.model]._decoder._caches:
        cache.fill_(torch.nan)
    check(engine, policy, batch)


def test_rows_leave_in_few_sizes(make_policy, make_batch, monkeypatch):
    policy, batch = eager_to_stop(make_policy("Llama")), make_batch()
    engine = engine_of(policy)
    seen, decoder = [], engine._captured[policy.model]._decoder
    keep = decoder.keep
    monkeypatch.setattr(decoder, "keep", lambda index: seen.append(len(index)) or keep(index))
    run(engine, policy, batch)
    assert seen
    assert set(seen) <= {16, 8, 4, 2}
    assert seen == sorted(set(seen), reverse=True)


def test_completions_are_told_as_they_end(make_policy, make_batch):
    policy, told = eager_to_stop(make_policy("Llama")), []
    batch = make_batch()._replace(ended=lambda batch, prompt, ids: told.append((prompt, tuple(ids))))
    found = run(engine_of(policy), policy, batch)
    assert sorted(told) == sorted((row // 4, tuple(found.ids_BT[row][found.real_BT[row]].tolist()))
                                  for row in range(20))  # fmt: skip


def test_memory_is_given_back_with_the_model(make_policy, make_batch):
    policy = make_policy("Llama")
    engine = engine_of(policy)
    run(engine, policy, make_batch())
    assert len(engine._captured) == 1
    del policy
    gc.collect()
    assert len(engine._captured) == 0


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_step_asks_the_device_nothing(law, make_policy, make_batch):
    policy = make_policy("Qwen3", head_dim=8)
    engine = engine_of(policy)
    run(engine, policy, make_batch(), length=4, law=law)
    with Listening() as heard, torch.no_grad():
        engine._captured[policy.model].advance(captured=False)
    assert len(heard.operations) > 50


@pytest.mark.parametrize(
    "asking", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: torch.tensor([1.0]) + x]
)
def test_questions_would_be_heard(asking):
    with Listening(), pytest.raises(Refused):
        asking(torch.ones(3))


class Broken(TapeRecorder):
    """Replays a few tokens, then no more."""

    left = 0

    def capture(self, run):
        replay, made = super().capture(run)

        def fail():
            if Broken.left == 0:
                raise RuntimeError("an illegal memory access\nand more")
            Broken.left -= 1
            replay()

        return fail, made


@pytest.fixture
def broken(make_policy):
    policy = eager_to_stop(make_policy("Llama"))
    Broken.left = 100
    engine = LocalEngine(recorder=Broken, kernels=False)
    assert engine.prove(policy, 20, 32, choice="fast")[0].taken
    Broken.left = 4
    return engine, policy


def test_a_replay_that_fails_ends_in_the_plain_loop_and_is_told_once(broken, make_batch, caplog):
    engine, policy = broken
    with caplog.at_level(logging.WARNING, "lit_opd"):
        for seed in range(2):
            same(run(engine, policy, make_batch(), seed=seed), run(LocalEngine(), policy, make_batch(), seed=seed))
    assert [record.getMessage() for record in caplog.records] == [
        "The student is sampled without captured steps from here on: RuntimeError: an illegal memory access."
    ]


def test_a_replay_that_fails_after_a_completion_was_handed_out_ends_the_run(broken, make_batch):
    engine, policy = broken
    told = []
    with pytest.raises(RuntimeError, match="illegal"):
        run(engine, policy, make_batch()._replace(ended=lambda *ended: told.append(ended)))
    assert told


def test_a_capture_that_is_refused_is_no_verdict_for_it(make_policy):
    policy = make_policy("Llama")
    engine = LocalEngine(recorder=Broken)
    Broken.left = 0
    (verdict,) = engine.prove(policy, 4, 32)
    assert str(verdict) == "captured decoding: the plain path (on a probe, RuntimeError: an illegal memory access)"
    assert policy.model not in engine._captured


def test_memory_that_is_not_there_is_no_verdict_for_it(make_policy, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FusedDecoder, "reserve", fail)
    monkeypatch.setattr("lit_opd.rollout.local._disagreement", lambda *_: None)
    (verdict,) = LocalEngine(recorder=TapeRecorder).prove(make_policy("Llama"), 4, 32)
    assert verdict.reason == "on a probe, OutOfMemoryError: CUDA out of memory"


def test_no_memory_for_a_copy_of_the_weights_is_no_verdict_for_it(make_policy, monkeypatch):
    def fail(*args, **keywords):
        raise torch.OutOfMemoryError("CUDA out of memory")

    policy = make_policy("Llama")
    monkeypatch.setattr("lit_opd.rollout.local._disagreement", lambda *_: None)
    monkeypatch.setattr("lit_opd.rollout.local.FusedDecoder", fail)
    engine = LocalEngine(recorder=TapeRecorder)
    (verdict,) = engine.prove(policy, 4, 32)
    assert str(verdict) == "captured decoding: the plain path (there is no memory for a copy of the weights)"
    assert policy.model not in engine._captured


def test_a_probe_reserves_what_rollouts_need_and_captures_it(make_policy, make_batch):
    """The probe's graphs are those of a rollout's last columns, and no memory grows."""
    policy = make_policy("Llama")
    engine = engine_of(policy, rows=20, width=40)
    writer = engine._captured[policy.model]
    known = dict(writer._graphs)
    run(engine, policy, make_batch(), length=32)
    assert writer._decoder.room == (20, 40)
    assert known
    assert all(writer._graphs[key] is graph for key, graph in known.items())


def test_a_graph_that_computes_otherwise_is_left(make_policy):
    class Stale(TapeRecorder):
        """Replays nothing, as a graph over replaced tensors would."""

        def capture(self, run):
            return lambda: None, super().capture(run)[1]

    (verdict,) = LocalEngine(recorder=Stale, kernels=False).prove(make_policy("Llama"), 4, 32)
    assert not verdict.taken
    assert "off by" in verdict.reason


@pytest.mark.parametrize(
    ("keywords", "change", "reason"),
    [
        ({}, lambda policy: policy, "there are no CUDA graphs on cpu"),
        (
            {"recorder": TapeRecorder},
            lambda policy: policy.body.layers[0].register_forward_hook(lambda *_: None),
            "it has hooks",
        ),
    ],
)
def test_what_cannot_be_captured_keeps_the_plain_loop(keywords, change, reason, make_policy, make_batch, caplog):
    policy = make_policy("Llama")
    change(policy)
    engine = LocalEngine(**keywords)
    (verdict,) = engine.prove(policy, 4, 32)
    assert not verdict.taken
    assert verdict.reason == reason
    assert not caplog.records
    with pytest.raises(UserError, match=reason):
        engine.prove(policy, 4, 32, choice="fast")
    run(engine, policy, make_batch(), length=2)


def test_what_is_switched_off_is_left_even_where_fast_paths_are_asked_for(make_policy):
    policy, engine = make_policy("Llama"), LocalEngine(capture="off", recorder=TapeRecorder)
    for choice in ("auto", "fast"):
        (verdict,) = engine.prove(policy, 4, 32, choice=choice)
        assert str(verdict) == "captured decoding: the plain path (rollout.capture=off)"


def test_hooks_that_come_later_end_captured_steps(make_policy, make_batch):
    policy = make_policy("Llama")
    engine, heard = engine_of(policy), []
    policy.body.layers[0].register_forward_hook(lambda *_: heard.append(1))
    run(engine, policy, make_batch(), length=3)
    assert heard


def test_adapters_are_merged_in_place(make_policy, make_batch):
    policy = with_adapters(make_policy("Llama"))
    engine, batch = engine_of(policy), make_batch()
    check(engine, policy, batch)
    known = captures(engine, policy)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    check(engine, policy, batch)
    assert captures(engine, policy) <= known + 2  # other numbers of rows, and no graph twice


def with_adapters(policy, **keywords):
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"], **keywords)
    model = peft.get_peft_model(policy.model, config).to(policy.body.norm.weight.dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return LanguageModel(model, policy.tokenizer, "student")


@pytest.mark.parametrize("saved", [None, ["input_layernorm", "lm_head"]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_adapters_come_and_go_and_the_model_stays_as_it_was(dtype, saved, make_policy, make_batch):
    policy = with_adapters(make_policy("Llama", dtype), modules_to_save=saved)
    batch, before = make_batch(), copy.deepcopy(policy.model.state_dict())
    with policy.model.disable_adapter():
        engine = engine_of(policy)
    found = run(engine, policy, batch)
    with policy.model.disable_adapter():
        without = run(engine, policy, batch)
        assert policy.model in engine._captured
        same(run(engine_of(policy), policy, batch), without)
    same(run(engine_of(policy), policy, batch), found)
    assert not torch.equal(found.ids_BT[:, :6], without.ids_BT[:, :6])
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.model.state_dict().items())


def test_buckets_grow_by_a_third_or_a_half():
    widths = sorted({width_bucket(columns) for columns in range(1, 1000)})
    assert widths == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
