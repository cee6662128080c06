"""The vLLM engine against plain forward passes and the local engine, with vLLM itself and with a stand-in.

Where LIT_OPD_VLLM names no `vllm` executable, only the stand-in is asked.
"""

import copy
import os
import subprocess
from pathlib import Path

import peft
import pytest
import scipy.stats
import torch
from lightning.pytorch.plugins.precision import HalfPrecision
from rollout.vllm_servers import VLLM, StandIn, free_port, vllm_serving
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from lit_opd.errors import UserError
from lit_opd.functional import law_logps
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, VllmEngine, uniforms
from lit_opd.rollout.weights import write_weights
from lit_opd.types import FinishReason, SamplingLaw

LAWS = {
    "plain": SamplingLaw(),
    "temperature": SamplingLaw(temperature=0.5),
    "hot": SamplingLaw(temperature=1.7),
    "top_p": SamplingLaw(top_p=0.8),
    "top_k": SamplingLaw(top_k=4),
    "min_p": SamplingLaw(min_p=0.1),
    "min_new_tokens": SamplingLaw(min_new_tokens=4),
    "top_k_min_p": SamplingLaw(temperature=0.8, top_k=8, min_p=0.02, min_new_tokens=2),
    "top_k_top_p": SamplingLaw(temperature=1.3, top_k=8, top_p=0.7),
}
STOP = torch.tensor([2])
LENGTH = 10
NEEDS_VLLM = [pytest.mark.slow, pytest.mark.skipif(not VLLM, reason="LIT_OPD_VLLM names no vllm executable")]
REAL = pytest.param("vllm", marks=NEEDS_VLLM)
BOUND = 2e-4  # nats, fp32 against fp32 with other kernels
BF16_BOUND = 0.3  # weights, activations and logits rounded: 0.13 seen


@pytest.fixture(scope="module")
def make_served(make_model):
    """Makes a model with heads of a size that vLLM has kernels for."""

    def make(seed=3, **config):
        sizes = {"hidden_size": 64, "intermediate_size": 48, "initializer_range": 0.15}
        return make_model(seed, **(sizes | config))

    return make


@pytest.fixture(scope="module")
def folder(make_served, save_model):
    """What the servers start from; no test uses these weights."""
    return save_model(make_served(99))


@pytest.fixture(scope="module", params=["stand_in", REAL])
def url(request, make_served, folder, tmp_path_factory):
    if request.param == "vllm":
        log = tmp_path_factory.mktemp("vllm") / "log"
        with vllm_serving(folder, log, "--dtype", "float32", "--logprobs-mode", "processed_logprobs") as address:
            yield address
    else:
        with StandIn(make_served(99)).listening() as address:
            yield address


@pytest.fixture
def model(make_served):
    return make_served()


@pytest.fixture
def stand_in(make_served):
    return StandIn(make_served(99))


@pytest.fixture
def run(tiny_tokenizer):
    """Samples with an engine from a bare model."""

    def sample(engine, model, batch, law=LAWS["plain"], num_completions=1, length=LENGTH, seed=0):
        policy = LanguageModel(model, tiny_tokenizer, "student")
        return engine.sample(policy, batch, law, num_completions,
                             uniforms((seed, 0), batch.draws, num_completions, length))  # fmt: skip

    return sample


@pytest.fixture
def error_of(full_logits):
    """How far recorded log-probabilities are from those of a model under the law (nats): the largest and the mean."""

    def measure(rollout, model, vocabulary=None):
        logits, law, errors = full_logits(model, rollout).detach()[..., :vocabulary], rollout.law, []
        for t in range(rollout.ids_BT.shape[1]):
            logps = law_logps(logits[:, t], law, STOP if t < law.min_new_tokens else None)
            expected = logps.gather(-1, rollout.ids_BT[:, t, None])[:, 0]
            errors.append((rollout.sampler_logps_BT[:, t] - expected)[rollout.mask_BT[:, t]].abs())
        return float(torch.cat(errors).max()), float(torch.cat(errors).mean())

    return measure


def calls_of(engine, monkeypatch):
    """The paths that an engine asks for from now on."""
    calls, inner = [], engine._call

    def recording(path, body=None):
        calls.append(path.partition("?")[0])
        return inner(path, body)

    monkeypatch.setattr(engine, "_call", recording)
    return calls


def test_greedy_tokens_are_those_of_the_local_engine(url, model, make_batch, run):
    greedy = SamplingLaw(temperature=0)
    model.generation_config.eos_token_id = [2, 9]
    found, expected = (run(e, model, make_batch(extra_padding=2), greedy, 2) for e in (VllmEngine(url), LocalEngine()))
    for name in ("ids_BT", "real_BT", "mask_BT", "author_BT", "sampler_logps_BT", "finish_B", "prompt_index_B"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert all(map(torch.equal, found.prompts, expected.prompts))
    assert set(found.finish_B.tolist()) == {FinishReason.STOP, FinishReason.LENGTH}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_sampler_logps_are_those_of_the_law_that_sampled(law, url, model, make_batch, run, error_of):
    rollout = run(VllmEngine(url), model, make_batch(), law, 6)
    assert rollout.law == law
    assert error_of(rollout, model)[0] < BOUND
    assert rollout.sampler_logps_BT.dtype == torch.float32
    assert not rollout.sampler_logps_BT[~rollout.mask_BT].any()


def test_completions_end_at_stop_tokens_and_not_before_min_new_tokens(url, make_served, make_batch, run):
    model = make_served(5, initializer_range=0.02)  # near uniform: stop tokens come early
    model.generation_config.eos_token_id = [2, 5, 6, 7]
    stop = torch.tensor([2, 5, 6, 7])
    for least in (0, 4):
        rollout = run(VllmEngine(url), model, make_batch(), SamplingLaw(min_new_tokens=least), 8)
        lengths_B, is_stop_BT = rollout.mask_BT.sum(1), torch.isin(rollout.ids_BT, stop) & rollout.mask_BT
        stopped_B = rollout.finish_B == FinishReason.STOP
        assert torch.equal(stopped_B, is_stop_BT.any(1))
        assert is_stop_BT[stopped_B, lengths_B[stopped_B] - 1].all()
        assert (is_stop_BT.sum(1) <= 1).all()
        assert (lengths_B[~stopped_B] == LENGTH).all()
        assert lengths_B.min() == least + 1
        assert stopped_B.any()
        assert not stopped_B.all()


def test_seeds_alone_tell_what_is_drawn(url, model, make_batch, run):
    engine = VllmEngine(url)
    one, same, other = (run(engine, model, make_batch(), num_completions=4, seed=s) for s in (0, 0, 1))
    assert torch.equal(one.ids_BT, same.ids_BT)
    assert not torch.equal(one.ids_BT[:, :4], other.ids_BT[:, :4])
    assert len({tuple(row) for row in one.ids_BT[:4].tolist()}) > 1


def test_draws_follow_the_law(url, model, make_batch, run, full_logits):
    law, batch = SamplingLaw(temperature=1.5, top_k=8), make_batch(["1+2="])
    rollout = run(VllmEngine(url), model, batch, law, 600, length=1)
    chances = law_logps(full_logits(model, rollout)[:1, 0].detach(), law)[0].exp()
    counts, possible = torch.bincount(rollout.ids_BT[:, 0], minlength=len(chances)), chances > 0
    assert not counts[~possible].any()
    assert (
        scipy.stats.chisquare(counts[possible], 600 * chances[possible].double() / chances.double().sum()).pvalue > 1e-3
    )


def test_the_server_follows_the_weights_whatever_changes_them(url, model, make_batch, run, error_of, monkeypatch):
    engine, batch = VllmEngine(url), make_batch([prompt * 10 for prompt in ("1+2=", "80-1")])
    run(engine, model, batch)
    calls = calls_of(engine, monkeypatch)
    run(engine, model, batch)
    assert "/collective_rpc" not in calls
    before = copy.deepcopy(model)
    model.lm_head.weight.data.mul_(-1)  # through .data, no version counter moves
    changed = run(engine, model, batch, num_completions=4)
    assert calls.count("/collective_rpc") == 1
    assert error_of(changed, model)[0] < BOUND
    assert error_of(changed, before)[1] > 0.5
    with torch.no_grad():  # the prompts are long enough to be cached: keys and values that it must forget
        model.model.layers[0].self_attn.k_proj.weight.mul_(-1.5)
    assert error_of(run(engine, model, batch, num_completions=4), model)[0] < BOUND


def test_adapters_are_merged_for_the_server_and_stay_as_they_are(url, model, make_batch, run, error_of):
    lora = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    adapted = peft.get_peft_model(copy.deepcopy(model), lora)
    before = copy.deepcopy(adapted.state_dict())
    rollout = run(VllmEngine(url), adapted, make_batch(), num_completions=4)
    assert error_of(rollout, adapted)[0] < BOUND
    assert error_of(rollout, model)[1] > 0.05
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_log_probabilities_stay_fp32_where_training_is_bf16(model, make_batch, tiny_tokenizer, monkeypatch):
    """As Lightning trains under bf16-true: bf16 is torch's default dtype then."""
    engine, policy, batch = (
        VllmEngine("http://127.0.0.1"),
        LanguageModel(model, tiny_tokenizer, "student"),
        make_batch(),
    )
    written = iter([([5, 2], [-5.1234567, -0.0123456]), *[([5], [-11.4321])] * (len(batch.rows) - 1)])
    monkeypatch.setattr(engine, "_request", lambda body: next(written))
    with HalfPrecision("bf16-true").train_step_context():
        numbers = uniforms((0, 0), batch.draws, 1, 1)
        rollout = engine._complete(policy, batch, SamplingLaw(), 1, numbers)
    assert rollout.sampler_logps_BT.dtype == torch.float32
    found = sorted(rollout.sampler_logps_BT[rollout.mask_BT].tolist())
    assert found == pytest.approx([*[-11.4321] * (len(batch.rows) - 1), -5.1234567, -0.0123456], abs=1e-6)
    assert rollout.ids_BT.dtype == torch.long


def test_tokens_outside_the_shared_vocabulary_are_never_sampled(url, model, make_batch, tiny_tokenizer, error_of):
    policy, batch = LanguageModel(model, tiny_tokenizer, "student"), make_batch()
    numbers = uniforms((0, 0), batch.draws, 10, 3)
    assert VllmEngine(url).sample(policy, batch, SamplingLaw(), 10, numbers).ids_BT.max() >= 12
    policy.vocabulary = 12
    cut = VllmEngine(url).sample(policy, batch, SamplingLaw(), 10, numbers)
    assert cut.ids_BT.max() < 12
    assert error_of(cut, model, vocabulary=12)[0] < BOUND


def test_training_keeps_the_sampler_equal_to_the_student(url, model, make_served, make_module, fit, full_logits):
    module = make_module(model, make_served(4), rollout={"engine": "vllm", "server": url}, optim={"lr": 1.0})
    record = fit(module, steps=3)
    gaps = [float(metrics["rollout/sampler_gap"]) for metrics in record.metrics]
    moved = [float((a["lm_head.weight"] - b["lm_head.weight"]).abs().max())
             for a, b in zip(record.weights[1:], record.weights, strict=False)]  # fmt: skip
    assert isinstance(module.engine, VllmEngine)
    assert len(gaps) == 3
    assert max(map(abs, gaps)) < 1e-4
    assert min(moved) > 1e-3


def test_training_without_pushes_shows_in_the_sampler_gap(url, model, make_served, make_module, fit, monkeypatch):
    """What makes the test above mean something."""
    module = make_module(model, make_served(4), rollout={"engine": "vllm", "server": url}, optim={"lr": 1.0})
    weights, inner = module.engine.weights, module.engine.weights.push
    labels = []
    monkeypatch.setattr(
        weights, "push", lambda *arguments: labels.append(labels[0] if labels else inner(*arguments)) or labels[0]
    )
    gaps = [float(metrics["rollout/sampler_gap"]) for metrics in fit(module, steps=3).metrics]
    assert abs(gaps[0]) < 1e-4
    assert max(map(abs, gaps[1:])) > 1e-3


TRAINING = """
import sys
import lightning as L
import torch
from lit_opd import DistillationModule, PromptDataModule

PROMPTS = ["1+2=", "7=", "12-9+3=", "5+5=", "80-1="]


def train(student, teacher, url, devices):
    rollout = {"engine": "vllm", "server": url, "max_new_tokens": 6, "num_completions": 2}
    module = DistillationModule(student, teacher, rollout=rollout, optim={"name": "SGD", "lr": 1.0, "clip_norm": None})
    data = PromptDataModule(train_rows=PROMPTS, validation_rows=PROMPTS, batch_size=5, tokenizer=module.tokenizer)
    trainer = L.Trainer(
        max_steps=3, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0,
    )
    trainer.fit(module, data)
    return module.model.state_dict(), float(trainer.callback_metrics["rollout/sampler_gap"])


if __name__ == "__main__":
    student, teacher, url, out = sys.argv[1:]
    results = train(student, teacher, url, 2)
    torch.save(results, f"{out}.{torch.distributed.get_rank()}")
"""


@pytest.mark.slow
def test_two_processes_share_a_server_and_make_the_weights_of_one(url, make_served, save_model, tmp_path, warm_python):
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(TRAINING)
    paths = [save_model(make_served(seed)) for seed in (3, 4)]
    command = [warm_python, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
               str(script), *paths, url, str(out)]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    namespace = {"__name__": "training"}
    exec(compile(TRAINING, "training", "exec"), namespace)  # noqa: S102
    one, gap = namespace["train"](*paths, url, 1)
    assert abs(gap) < 1e-4
    for rank in (0, 1):
        weights, gap = torch.load(f"{out}.{rank}", weights_only=True)
        assert abs(gap) < 1e-4
        for name, value in weights.items():
            torch.testing.assert_close(value, one[name], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="LIT_OPD_VLLM names no vllm executable")
def test_a_bf16_server_is_near_its_fp32_student(folder, model, make_batch, run, error_of, tmp_path):
    with vllm_serving(folder, tmp_path / "log", "--dtype", "bfloat16", "--logprobs-mode", "processed_logprobs") as url:
        for law in (SamplingLaw(), SamplingLaw(temperature=0.5)):
            largest, mean = error_of(run(VllmEngine(url), model, make_batch(), law, 20), model)
            print(f"bf16 server, fp32 student, temperature {law.temperature}: {largest:.4f} at most, {mean:.4f} mean")
            assert largest < BF16_BOUND


@pytest.mark.slow
@pytest.mark.skipif(not VLLM, reason="LIT_OPD_VLLM names no vllm executable")
def test_a_server_as_it_starts_by_default_is_refused(folder, model, make_batch, run, tmp_path):
    serving = vllm_serving(folder, tmp_path / "log", "--dtype", "bfloat16")
    with serving as url, pytest.raises(UserError, match="--logprobs-mode processed_logprobs"):
        run(VllmEngine(url), model, make_batch())


def test_raw_log_probabilities_are_refused(stand_in, model, make_batch, run):
    stand_in.raw = True
    with stand_in.listening() as url, pytest.raises(UserError) as caught:
        run(VllmEngine(url), model, make_batch())
    assert str(caught.value) == (
        "rollout.server: expected log-probabilities of the sampling law, found those at temperature 1. "
        "Start the server with --logprobs-mode processed_logprobs."
    )


def test_a_server_that_computes_something_else_is_refused(stand_in, model, make_batch, run, monkeypatch):
    monkeypatch.setattr(stand_in.model, "load_state_dict", lambda state: None)
    with stand_in.listening() as url, pytest.raises(UserError) as caught:
        run(VllmEngine(url), model, make_batch())
    assert str(caught.value).startswith(
        "rollout.server: expected the student's log-probabilities, found others, off by"
    )


@pytest.mark.parametrize(
    ("size", "found"), [(12, "a smaller one (400: out of vocabulary: [16])"), (20, "a larger one")]
)
def test_another_vocabulary_is_refused(size, found, make_served, model, make_batch, run):
    with StandIn(make_served(99, vocab_size=size)).listening() as url, pytest.raises(UserError) as caught:
        run(VllmEngine(url), model, make_batch())
    assert str(caught.value) == (
        f"rollout.server: expected a model with the student's vocabulary (17), found {found}. "
        "Serve the student's own folder."
    )


def test_no_server_is_told_with_how_to_start_one(model, make_batch, run):
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError) as caught:
        run(VllmEngine(url), model, make_batch())
    assert str(caught.value).startswith(f"rollout.server: expected a vLLM server at {url}, found ")
    assert "refused" in str(caught.value)
    assert "Start it: VLLM_SERVER_DEV_MODE=1 vllm serve STUDENT_FOLDER --logprobs-mode" in str(caught.value)


@pytest.mark.parametrize(("path", "answer", "message"), [
    ("/server_info", (404, ""), "expected a vLLM server in development mode at URL, found no /server_info. Start it: "
     "VLLM_SERVER_DEV_MODE=1 vllm serve"),
    ("/server_info", (200, "<html>"), "expected a vLLM server at URL, found Expecting value"),
    ("/server_info", (200, "{}"), "expected a vLLM server at URL, found an answer without 'vllm_config'"),
    ("/v1/completions", (400, {"error": {"message": "too long"}}), "found a smaller one (400: too long)"),
    ("/v1/completions", (500, "it\nbroke"), "expected an answer from /v1/completions, found 500: it broke."),
    ("/collective_rpc", (500, {"error": {"message": "no file"}}), "expected an answer from /collective_rpc, found 500: "
     "no file. Look at what the server prints."),
    ("/reset_prefix_cache", (200, {"success": False}), "expected a prefix cache that can be dropped, found one in use. "
     "Start one server for each run."),
])  # fmt: skip
def test_what_the_server_refuses_is_told(path, answer, message, stand_in, model, make_batch, run):
    stand_in.answers[path] = answer
    with stand_in.listening() as url, pytest.raises(UserError) as caught:
        run(VllmEngine(url), model, make_batch())
    assert str(caught.value).startswith("rollout.server: ")
    assert message.replace("URL", url) in str(caught.value)


@pytest.mark.parametrize(("choice", "message"), [
    ({"text": "1"}, "expected token ids with their log-probabilities, found none. Use vLLM 0.32."),
    ({"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "abort"},
     "expected completions up to a stop token or rollout.max_new_tokens, found one ended by 'abort'. Look at what"),
])  # fmt: skip
def test_completions_that_are_not_whole_are_refused(choice, message, stand_in, model, make_batch, run):
    with stand_in.listening() as url:
        engine = VllmEngine(url)
        run(engine, model, make_batch())
        stand_in.answers["/v1/completions"] = (200, {"choices": [choice]})
        with pytest.raises(UserError) as caught:
            run(engine, model, make_batch())
    assert message in str(caught.value)


def test_a_refused_request_of_a_rollout_is_told(stand_in, model, make_batch, run):
    with stand_in.listening() as url:
        engine = VllmEngine(url)
        run(engine, model, make_batch())
        stand_in.answers["/v1/completions"] = (400, {"error": {"message": "max_tokens=100 is too long"}})
        with pytest.raises(
            UserError, match="expected an answer from /v1/completions, found 400: max_tokens=100 is too"
        ):
            run(engine, model, make_batch())


def test_weights_of_another_run_in_the_middle_of_a_rollout_are_noticed(stand_in, model, make_batch, run, monkeypatch):
    with stand_in.listening() as url:
        engine = VllmEngine(url)
        run(engine, model, make_batch())
        inner = engine._complete

        def complete(*args):
            stand_in.label = "another"
            return inner(*args)

        monkeypatch.setattr(engine, "_complete", complete)
        with pytest.raises(UserError) as caught:
            run(engine, model, make_batch())
    assert str(caught.value) == ("rollout.server: expected a server of this run alone, found other weights on it "
                                 "(another). Start one server for each run.")  # fmt: skip


def test_a_server_started_anew_gets_the_weights_again(stand_in, make_served, model, make_batch, run, error_of):
    with stand_in.listening() as url:
        engine = VllmEngine(url)
        run(engine, model, make_batch())
        stand_in.model, stand_in.label = make_served(99), "default"
        assert error_of(run(engine, model, make_batch(), num_completions=4), model)[0] < BOUND


def test_a_push_that_broke_off_is_made_again(stand_in, model, make_batch, run, error_of):
    with stand_in.listening() as url:
        engine = VllmEngine(url)
        run(engine, model, make_batch())
        first = stand_in.label
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)
        stand_in.answers["/reset_prefix_cache"] = (500, "")
        with pytest.raises(UserError):
            run(engine, model, make_batch())
        del stand_in.answers["/reset_prefix_cache"]
        with torch.no_grad():
            model.lm_head.weight.mul_(-1)  # the weights that the server had before, and has no longer
        run(engine, model, make_batch())
    assert stand_in.label == first
    assert stand_in.calls.count("/collective_rpc") == 3


def test_processes_of_one_run_push_once(stand_in, model, make_batch, run):
    with stand_in.listening() as url:
        for _ in range(3):  # as data-parallel processes do: each its engine and its copy of the same weights
            run(VllmEngine(url), copy.deepcopy(model), make_batch())
    assert stand_in.calls.count("/collective_rpc") == 1


def test_weights_travel_in_the_dtype_served_and_leave_nothing_behind(
    stand_in, model, make_batch, run, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stand_in.dtype = torch.bfloat16
    stand_in.model.to(torch.bfloat16)
    with stand_in.listening() as url:
        run(VllmEngine(url), model, make_batch())
    assert {value.dtype for value in stand_in.waiting.values()} == {torch.bfloat16}
    assert model.lm_head.weight.dtype == torch.float32
    assert [Path(name).suffix for name in os.listdir(tmp_path)] in ([], [".lock"])


@pytest.mark.parametrize("kind", ["tied", "experts"])
def test_weights_travel_under_the_names_of_a_saved_model(kind, make_served, tmp_path):
    small = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}  # fmt: skip
    tied = kind == "tied"
    model = make_served(tie_word_embeddings=True) if tied else MixtralForCausalLM(MixtralConfig(**small))
    (tmp_path / "pushed").mkdir()
    write_weights(model, str(tmp_path / "pushed"), torch.float32)
    model.save_pretrained(tmp_path / "saved")
    pushed, saved = (load_file(tmp_path / name / "model.safetensors") for name in ("pushed", "saved"))
    assert pushed.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in pushed.items())


def test_the_teacher_is_sampled_in_this_process(model, make_batch, tiny_tokenizer):
    policy, batch = LanguageModel(model, tiny_tokenizer, "teacher"), make_batch()
    numbers = uniforms((0, 0), batch.draws, 2, 5)
    engines = (VllmEngine(f"http://127.0.0.1:{free_port()}"), LocalEngine())
    found, expected = (engine.sample(policy, batch, SamplingLaw(), 2, numbers) for engine in engines)
    assert torch.equal(found.ids_BT, expected.ids_BT)


def test_sharded_weights_are_refused(stand_in, model, make_batch, run):
    model.lm_head.weight.full_tensor = lambda: None  # what sharded parameters have
    with stand_in.listening() as url, pytest.raises(UserError) as caught:
        run(VllmEngine(url), model, make_batch())
    assert str(caught.value) == (
        "rollout.engine: expected local for a sharded model, found vllm. Set rollout.engine=local."
    )
