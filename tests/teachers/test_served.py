"""A served teacher against the same model in this process, with vLLM itself and with a stand-in, and every fault.

Where LIT_OPD_VLLM names no `vllm` executable, only the stand-in is asked.
"""

import contextlib
import copy
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from rollout.vllm_servers import VLLM, free_port, vllm_serving
from teachers.teacher_servers import NAN, TeacherStandIn

from lit_opd import DistillationModule
from lit_opd.config import TeacherConfig
from lit_opd.errors import LintWarning, UserError
from lit_opd.models import LanguageModel
from lit_opd.teachers import LocalScorer, ServedScorer, Wanted, replicas
from lit_opd.types import SamplingLaw

NEEDS_VLLM = [pytest.mark.slow, pytest.mark.skipif(not VLLM, reason="LIT_OPD_VLLM names no vllm executable")]
BOUND = {"float32": 2e-4, "bfloat16": 0.3}  # nats: other kernels; weights, activations and logits rounded


@pytest.fixture(scope="module")
def model(make_model):
    """Heads of a size that vLLM has kernels for."""
    return make_model(2, hidden_size=64, intermediate_size=48, initializer_range=0.15, max_position_embeddings=128)


@pytest.fixture
def server(model, tiny_tokenizer):
    return TeacherStandIn(model, tiny_tokenizer)


@pytest.fixture
def rollout(make_model, make_batch, sample):
    found = sample(make_model(1), make_batch(extra_padding=2), SamplingLaw(), num_completions=2)
    return found.uncount(found.ids_BT == 7)


@pytest.fixture
def local(model, tiny_tokenizer):
    return LocalScorer(LanguageModel(model, tiny_tokenizer, "teacher"), 1000)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(replicas, "FIRST_PAUSE", 0.02)


def section(*addresses, **keys):
    plain = {"patience_s": 5.0, "timeout_s": 2.0, "canary_every": 1}
    return TeacherConfig(kind="served", server=list(addresses), **(plain | keys))


def same(found, expected, bound=1e-5):
    torch.testing.assert_close(found.logps_N, expected.logps_N, rtol=0, atol=bound)
    if expected.support_logps_NK is not None:
        torch.testing.assert_close(found.support_logps_NK, expected.support_logps_NK, rtol=0, atol=bound)
        assert torch.equal(found.support_ids_NK, expected.support_ids_NK) or bound > 1e-3


def check_agreement(address, tokenizer, rollout, local, bound):
    scorer = ServedScorer(section(address, top_k=5, timeout_s=60.0), tokenizer)
    for wanted in (Wanted(), Wanted(support=5)):
        same(scorer.score(rollout, wanted), local.score(rollout, wanted), bound)
    parts = [rollout.rows(torch.arange(0, 4)), rollout.rows(torch.arange(4, 10))]
    for found, part in zip(scorer.score_each(parts, Wanted(support=3)), parts, strict=True):
        same(found, local.score(part, Wanted(support=3)), bound)
    nothing = scorer.score(rollout.uncount(rollout.mask_BT), Wanted(support=2))
    assert nothing.logps_N.shape == (0,)
    assert nothing.support_ids_NK.shape == (0, 2)
    return scorer


def scored_while(scorer, rollout, serving):
    """Scores of a rollout for which a server was asked before it served."""
    with ThreadPoolExecutor(1) as pool, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        asked = pool.submit(scorer.score, rollout, Wanted())
        time.sleep(0.5)
        assert not asked.done()
        with serving:
            found = asked.result()
    assert sum("gave no answer" in str(warning.message) for warning in told) == 1
    return found


def test_a_served_teacher_says_what_the_same_model_says_here(server, tiny_tokenizer, rollout, local):
    with server.listening() as address:
        scorer = check_agreement(address, tiny_tokenizer, rollout, local, 1e-5)
        assert scorer.gives == {"token", "support"}
        assert scorer.untempered() is scorer
        assert ServedScorer(section(address, top_k=0), tiny_tokenizer).gives == {"token"}


@pytest.mark.timeout(1200)  # two starts of a server
@pytest.mark.parametrize("dtype", [pytest.param(name, marks=NEEDS_VLLM) for name in BOUND])
def test_vllm_says_what_the_same_model_says_here(dtype, model, save_model, tiny_tokenizer, rollout, local, tmp_path):
    """And one that was killed and started again goes on with the same numbers."""
    folder, log = save_model(model), tmp_path / "log"
    port = free_port()
    with vllm_serving(folder, log, "--dtype", dtype, port=port) as address:
        scorer = check_agreement(address, tiny_tokenizer, rollout, local, BOUND[dtype])
        if dtype != "float32":
            return
        before = scorer.score(rollout, Wanted())
    scorer.replicas.patience_s = 240.0
    same(scored_while(scorer, rollout, vllm_serving(folder, log, "--dtype", dtype, port=port)), before)


@pytest.mark.parametrize("name", ["token", "teacher_topk", "sequence"])
def test_training_with_a_served_teacher_is_training_with_a_local_one(name, server, model, make_model, make_module, fit):
    with server.listening() as address:
        teachers = (section(address), model)
        found, expected = (fit(make_module(make_model(1), teacher, name)).gradients[0] for teacher in teachers)
    for key, gradient in expected.items():
        assert float((found[key] - gradient).norm() / gradient.norm()) < 1e-6, key


# How a server misbehaves when it is met, and what is said.
MET = {
    "template": ({"prefix": [1]}, r"teacher\.server: .*17 tokens.*template|teacher\.server: .*positions for"),
    "off by one": ({"shift": 1}, "scores of the token after it"),
    "other way": ({"shift": -1}, "scores of the token before it"),
    "values off": ({"off_by": -0.5}, "positions are off"),
    "temperature": ({"obeys": True}, r"with temperature=0\.25.*raw_logprobs"),
    "noise": ({"noise": 1.0}, "nats between answers"),
    "uniform": ({"even": True}, "nats for every token of it. Load the weights again"),
    "nan": ({"bad": NAN}, "log-probabilities of a distribution, found nan"),
    "above zero": ({"bad": 0.7}, r"log-probabilities of a distribution, found 0\.7"),
    "too much": ({"bad": 0.0}, "found a sum of probabilities of"),
    "cap": ({"most": 3}, r"teacher\.top_k: .*--max-logprobs 17, or lower"),
    "no model": ({"names": ("a", "b")}, r"teacher\.model: .*Known: a, b"),
}


@pytest.mark.parametrize("name", MET)
def test_a_server_that_is_no_teacher_is_refused_when_it_is_met(name, server, tiny_tokenizer):
    faults, message = MET[name]
    for attribute, value in faults.items():
        setattr(server, attribute, value)
    with server.listening() as address, pytest.raises(UserError, match=message):
        ServedScorer(section(address), tiny_tokenizer)


@pytest.mark.parametrize(("characters", "message"), [
    ("0123456789+-=", "id 15 is '=' for the student and '-' for the teacher"),
    ("0123456789+=", "id 16 is '-' for the student and"),
])  # fmt: skip
def test_another_vocabulary_is_named_by_its_first_token(
    characters, message, server, tiny_tokenizer, make_tiny_tokenizer
):
    server.tokenizer = make_tiny_tokenizer(characters)
    with server.listening() as address, pytest.raises(UserError, match=message):
        ServedScorer(section(address), tiny_tokenizer)


def test_another_split_of_a_text_is_refused(make_model, spelling):
    server = TeacherStandIn(make_model(2, vocab_size=18), spelling(whole=True))
    with server.listening() as address, pytest.raises(UserError, match="another split of a text"):
        ServedScorer(section(address), spelling(whole=False))


def test_replicas_share_the_work_and_one_that_differs_is_refused(
    server, model, make_model, tiny_tokenizer, rollout, local
):
    twin = TeacherStandIn(model, tiny_tokenizer)
    with server.listening() as one, twin.listening() as two:
        scorer = ServedScorer(section(one, two), tiny_tokenizer)
        asked = [len(s.bodies) for s in (server, twin)]
        same(scorer.score(rollout, Wanted()), local.score(rollout, Wanted()))
        assert all(len(s.bodies) > before + 3 for s, before in zip((server, twin), asked, strict=True))
        twin.model = make_model(5, hidden_size=64)
        with pytest.raises(UserError, match=f"equal to 0.1 nats, found {two}, which is"):
            ServedScorer(section(one, two), tiny_tokenizer)


TRUNCATED = (200, '{"choices": [{"prompt_logprobs": [null, {"5"')
# What goes wrong once, and is right when it is asked again.
ONCE = {
    "truncated": TRUNCATED,
    "busy": (429, {"error": {"message": "too many requests"}}),
    "broken": (500, "Internal Server Error"),
    "reset": (200, None),
}


@pytest.mark.parametrize("name", ONCE)
def test_what_fails_once_is_asked_again(name, server, tiny_tokenizer, rollout, local):
    with server.listening() as address:
        scorer = ServedScorer(section(address), tiny_tokenizer)
        server.first = [ONCE[name]] * 3
        with pytest.warns(LintWarning, match=f"{address} gave no answer"):
            same(scorer.score(rollout, Wanted()), local.score(rollout, Wanted()))


def test_a_server_that_is_slow_is_asked_again(server, tiny_tokenizer, rollout, local, monkeypatch):
    inner, waits = server.complete, [3.0]
    monkeypatch.setattr(server, "complete", lambda body: (time.sleep(waits.pop() if waits else 0), inner(body))[1])
    server.lock = contextlib.nullcontext()
    with server.listening() as address:
        waits.clear()
        scorer = ServedScorer(section(address, timeout_s=1.0), tiny_tokenizer)
        waits.append(3.0)
        with pytest.warns(LintWarning, match="timed out"):
            same(scorer.score(rollout, Wanted()), local.score(rollout, Wanted()))


def test_a_server_that_goes_and_comes_back_loses_nothing(server, tiny_tokenizer, rollout, local):
    port = free_port()
    with server.listening(port) as address:
        scorer = ServedScorer(section(address), tiny_tokenizer)
    same(scored_while(scorer, rollout, server.listening(port)), local.score(rollout, Wanted()))


def test_no_server_at_all_is_told_with_what_to_do(tiny_tokenizer):
    message = r"teacher\.server: expected an answer of http://127.0.0.1:9 within 0.1 s.*Start it with `vllm serve"
    with pytest.raises(UserError, match=message), pytest.warns(LintWarning):
        ServedScorer(section("http://127.0.0.1:9", patience_s=0.1), tiny_tokenizer)


def test_weights_that_change_under_a_run_end_it(server, make_model, tiny_tokenizer, rollout):
    with server.listening() as address:
        scorer = ServedScorer(section(address, canary_every=2), tiny_tokenizer)
        scorer.score(rollout, Wanted())
        server.model = make_model(7, hidden_size=64)
        scorer.score(rollout, Wanted())
        with pytest.raises(UserError, match=r"the weights that the run began with.*others at http.*--resume auto"):
            scorer.score(rollout, Wanted())


@pytest.mark.parametrize("several", [False, True])
def test_a_resumed_run_refuses_a_server_with_other_weights_than_it_began_with(
    several, server, make_model, make_module, make_trainer, make_data, tmp_path
):
    """Whatever the server has said since: the first scores go from checkpoint to checkpoint."""
    kept, rows = server.model, [{"prompt": "1+2=", "teacher": "a"}, {"prompt": "7=", "teacher": "a"}]

    def trained(address, steps, start, end):
        several_keys = {"teachers": {"a": section(address), "b": make_model(3)}} if several else {}
        module = make_module(make_model(1), None if several else section(address), "token", **several_keys)
        trainer, data = make_trainer(steps), make_data(rows, teacher_column="teacher" if several else None)
        trainer.fit(module, data, ckpt_path=start and tmp_path / start, weights_only=True)
        trainer.save_checkpoint(tmp_path / end)

    with server.listening() as address:
        trained(address, 1, None, "1.ckpt")
        trained(address, 2, "1.ckpt", "2.ckpt")
        server.model = make_model(7, hidden_size=64)
        with pytest.raises(UserError, match=r"the weights that the run began with.*others at http"):
            trained(address, 3, "2.ckpt", "3.ckpt")
        saved = torch.load(tmp_path / "2.ckpt", weights_only=True)
        torch.save(saved | {"scorer": {}}, tmp_path / "old.ckpt")  # from before there was such a state
        trained(address, 3, "old.ckpt", "3.ckpt")
        server.model = kept
        trained(address, 3, "2.ckpt", "3.ckpt")


def test_noise_is_held_against_what_there_is_to_learn(server, model, make_batch, sample, tiny_tokenizer):
    near = copy.deepcopy(model)
    near.lm_head.weight.data *= 1.3
    rollouts = {name: sample(one, make_batch(), SamplingLaw(), num_completions=4, length=20)
                for name, one in {"same": model, "near": near}.items()}  # fmt: skip
    with server.listening() as address:
        server.noise = 0.12
        met = [ServedScorer(section(address, canary_every=99), tiny_tokenizer) for _ in range(3)]
        server.noise = 0.0
        assert all(0.03 < scorer.meeting.noise < 0.1 for scorer in met)
        with pytest.raises(UserError, match="less noise than there is to learn, found answers about one sequence that"):
            met[0].score(rollouts["same"], Wanted())
        with pytest.warns(LintWarning, match=r"nats apart, where student and teacher are 0\.\d.*batch-invariant"):
            found = met[1].score(rollouts["near"], Wanted())
        sampled = rollouts["near"].sampler_logps_BT[rollouts["near"].mask_BT].tolist()
        apart = [abs(own - other) for own, other in zip(sampled, found.logps_N.tolist(), strict=True)]
        assert met[1].gap == pytest.approx(sum(apart) / len(apart), rel=1e-5)
        met[1].score(rollouts["same"], Wanted())  # later, when the student has learnt, nothing is said of it
        met[2].score(replace(rollouts["same"], law=SamplingLaw(temperature=0.5)), Wanted())
        met[2].score(rollouts["same"].rows(torch.arange(2)), Wanted())  # too few tokens to tell
        assert met[2].gap is None


def test_numbers_that_go_wrong_later_make_no_gradient(server, tiny_tokenizer, rollout):
    with server.listening() as address:
        scorer = ServedScorer(section(address, canary_every=99), tiny_tokenizer)
        server.bad = NAN
        with pytest.raises(UserError, match="log-probabilities of a distribution, found nan"):
            scorer.score(rollout, Wanted())


def test_a_row_longer_than_the_server_takes_is_refused_before_it_is_asked(server, tiny_tokenizer, rollout):
    server.context = 6
    with server.listening() as address:
        scorer = ServedScorer(section(address), tiny_tokenizer)
        asked = len(server.bodies)
        with pytest.raises(UserError, match=r"rollout.max_new_tokens: .*at most 5 tokens.*--max-model-len"):
            scorer.score_each([rollout], Wanted())
        assert len(server.bodies) <= asked + 1  # the canary


def test_a_key_is_sent_and_never_shown(server, tiny_tokenizer, monkeypatch):
    with server.listening() as address:
        monkeypatch.setenv("TEACHER_KEY", "very-secret-key")
        scorer = ServedScorer(section(address, key_variable="TEACHER_KEY"), tiny_tokenizer)
        assert scorer.replicas._headers["Authorization"] == "Bearer very-secret-key"
        server.first = [(401, {"error": {"message": "bad key very-secret-key"}})]
        with pytest.raises(UserError, match=r"teacher\.key_variable: expected a key that http") as error:
            scorer.replicas.ask("/v1/completions", {})
        server.first = [(400, {"error": {"message": "not with very-secret-key"}})]
        with pytest.raises(UserError, match=r"\$TEACHER_KEY") as refusal:
            scorer.replicas.ask("/v1/completions", {})
        assert "very-secret" not in f"{error.value} {refusal.value}"
        with pytest.raises(UserError, match=r"teacher\.key_variable: expected a key in \$NONE, found none"):
            ServedScorer(section(address, key_variable="NONE"), tiny_tokenizer)


def test_no_more_are_under_way_than_is_allowed(server, tiny_tokenizer, rollout, monkeypatch):
    inner, under_way, most = server.complete, [], []

    def complete(body):
        under_way.append(1)
        most.append(len(under_way))
        time.sleep(0.02)
        under_way.pop()
        return inner(body)

    monkeypatch.setattr(server, "complete", complete)
    server.lock = contextlib.nullcontext()
    with server.listening() as address:
        scorer = ServedScorer(section(address, in_flight=3), tiny_tokenizer)
        scorer.score(rollout, Wanted())
    assert max(most) == 3


def test_estimators_that_ask_for_more_name_the_nearest_that_does_not(server, make_model, tiny_tokenizer):
    with server.listening() as address:
        make = lambda name, **keys: DistillationModule(  # noqa: E731
            make_model(1), section(address, **keys), name, tokenizer=tiny_tokenizer
        )
        with pytest.raises(UserError, match=r"full_vocab.*needs full. Set estimator.name=teacher_topk"):
            make("full_vocab")
        with pytest.raises(UserError, match=r"teacher_topk.*needs support. Set estimator.name=token"):
            make("teacher_topk", top_k=0)


@pytest.mark.parametrize(("keys", "message"), [
    ({"kind": "served"}, r"teacher\.server: expected a value, found nothing"),
    ({"kind": "served", "server": "127.0.0.1:80"}, r"teacher\.server: .*http://HOST:PORT"),
    ({"kind": "served", "server": []}, r"teacher\.server: .*http://HOST:PORT"),
    ({"kind": "served", "server": "http://h:1", "temperature": 2.0}, r"teacher\.temperature: expected 1"),
    ({"path": "x", "server": "http://h:1"}, r"teacher\.kind: expected served.*found local"),
    ({"kind": "served", "server": "http://h:1", "path": "x"}, r"teacher\.path: expected nothing"),
])  # fmt: skip
def test_a_section_that_cannot_be_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        TeacherConfig(**keys).check("teacher")
