"""Scoring by a server overlaps with sampling: what is asked when, and that no number depends on it."""

import threading

import pytest
import torch
from rollout.vllm_servers import StandIn
from teachers.teacher_servers import TeacherStandIn

from lit_opd.config import TeacherConfig
from lit_opd.models import LanguageModel
from lit_opd.rollout import LocalEngine, VllmEngine, uniforms
from lit_opd.rollout.fused import FusedDecoder
from lit_opd.teachers import Scorer, ServedScorer, Wanted
from lit_opd.types import SamplingLaw

HINT = "1{prompt}"
TEXTS = ("1+2=", "33-4=", "5", "7+7=", "12-8=")
ROWS = [{"prompt": text, "answer": "42", "teacher": "ab"[i % 2]} for i, text in enumerate(TEXTS)]
LENGTH = 16


@pytest.fixture
def make_student(make_model):
    """Makes one whose completions end at different times, some of them not before they are cut."""
    return lambda: make_model(1, hidden_size=64, intermediate_size=48, initializer_range=0.2)


@pytest.fixture
def server(make_model, tiny_tokenizer):
    return TeacherStandIn(make_model(2, initializer_range=0.2), tiny_tokenizer)


def section(address, **keys):
    return TeacherConfig(kind="served", server=address, patience_s=5.0, canary_every=99, **keys)


def asked_while(server, monkeypatch):
    """Note what happens in which order; a decoder from which rows have left waits for the server to be asked."""
    events, asked, widest = [], threading.Event(), []
    complete, step = server.complete, FusedDecoder.step

    def completed(body):
        events.append("asked")
        asked.set()
        return complete(body)

    def stepped(decoder, ids_A):
        widest.append(len(ids_A))
        if len(ids_A) < max(widest):
            asked.wait(5)
        events.append("sampled")
        return step(decoder, ids_A)

    monkeypatch.setattr(server, "complete", completed)
    monkeypatch.setattr(FusedDecoder, "step", stepped)
    return events


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_completion_that_has_ended_is_scored_while_others_are_sampled(
    stage, server, make_student, make_module, make_trainer, make_data, monkeypatch
):
    with server.listening() as address:
        keys = {"rollout": {"max_new_tokens": LENGTH}, "evaluation": {"num_completions": 4}}
        module = make_module(make_student(), section(address), "token", **keys)
        events = asked_while(server, monkeypatch)
        getattr(make_trainer(limit_val_batches=stage == "validate"), stage)(module, make_data(ROWS))
    assert events.index("asked") < len(events) - 1 - events[::-1].index("sampled")


@pytest.mark.parametrize(("kind", "name"), [("one", "token"), ("routed", "teacher_topk"), ("demonstrated", "token")])
def test_no_number_depends_on_the_overlap_and_nothing_is_asked_twice(
    kind, name, server, make_student, make_module, make_model, make_data, fit, tiny_tokenizer, monkeypatch
):
    """With masked tokens, a stop token among them, prompts of the teacher's own, and two updates a rollout."""
    twin = TeacherStandIn(make_model(3, initializer_range=0.2), tiny_tokenizer)

    def trained():
        with server.listening() as first, twin.listening() as second:
            several = {"teachers": {"a": section(first), "b": section(second)}} if kind == "routed" else {}
            own = {"student_share": 0.5, "demonstrations": "data"} if kind == "demonstrated" else {}
            keys = {"rollout": {"max_new_tokens": LENGTH, **own}, "optim": {"updates_per_rollout": 2}}
            teacher = None if several else section(first)
            module = make_module(make_student(), teacher, name, masked_tokens=["<eos>", "7"], **keys, **several)
            shown = {"teachers.a" if several else "teacher": {"prompt_template": HINT}}
            server.bodies, twin.bodies = [], []
            record = fit(module, data=make_data(ROWS, shown=shown, teacher_column="teacher" if several else None))
        return record, [sorted(tuple(body["prompt"]) for body in one.bodies) for one in (server, twin)]

    found, asked = trained()
    monkeypatch.setattr(ServedScorer, "ahead", Scorer.ahead)
    expected, alone = trained()
    assert asked == alone
    assert 0 < sum(map(len, asked)) <= 2 * len(ROWS)
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    losses = [float(record.metrics[0]["train/loss"]) for record in (found, expected)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("engine", ["local", "vllm"])
def test_engines_tell_of_every_completion_once(engine, make_student, make_batch, tiny_tokenizer):
    policy, told = LanguageModel(make_student(), tiny_tokenizer, "student"), []
    batch = make_batch(extra_padding=2)._replace(ended=lambda *ended: told.append(ended))
    numbers_BT = uniforms((0, 0), batch.draws, 2, LENGTH)
    with StandIn(make_student()).listening() as address:
        sampler = LocalEngine() if engine == "local" else VllmEngine(address)
        rollout = sampler.sample(policy, batch, SamplingLaw(), 2, numbers_BT)
    assert all(one is batch for one, _, _ in told)
    rows = zip(rollout.prompt_index_B.tolist(), rollout.ids_BT, rollout.real_BT, strict=True)
    written = [(prompt, ids_T[real_T].tolist()) for prompt, ids_T, real_T in rows]
    assert sorted((prompt, ids) for _, prompt, ids in told) == sorted(written)


def test_what_was_begun_and_never_scored_is_dropped(server, make_batch, tiny_tokenizer):
    """As after an interrupt, or where the law of the next rollout is another."""
    batch, server.lock = make_batch(), threading.Lock()
    with server.listening() as address:
        scorer = ServedScorer(section(address, in_flight=1), tiny_tokenizer)
        asked = len(server.bodies)
        with server.lock:  # the first of these is under way for as long as it is held
            begin = scorer.ahead(Wanted())
            for prompt in range(5):
                begin(batch, prompt, [5, 6, 7])
            dropped = list(scorer._begun.values())
            scorer.ahead(Wanted())
        assert sum(answer.cancelled() for answer in dropped) >= 4
        assert not scorer._begun
        assert len(server.bodies) <= asked + 1


def test_a_row_longer_than_the_server_takes_is_not_begun(server, make_batch, tiny_tokenizer):
    with server.listening() as address:
        scorer = ServedScorer(section(address), tiny_tokenizer)
        begin = scorer.ahead(Wanted())
        begin(make_batch(), 0, [5] * scorer.meeting.context)
        assert not scorer._begun
