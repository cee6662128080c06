"""The fused head is proved on the run's own positions, and left where it differs."""

import pytest
import torch
from references import scored, written_by

from lit_opd import estimators
from lit_opd.distiller import Distiller
from lit_opd.errors import UserError
from lit_opd.models import LanguageModel
from lit_opd.objective import chunks, prove_head
from lit_opd.objective import head_proof as proof_module
from lit_opd.types import SamplingLaw

kernels = pytest.importorskip("lit_opd.kernels.head_rows", reason="it needs triton")

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's: numpy computes masked lanes too
]


@pytest.fixture
def pair(make_model, tiny_tokenizer, make_batch, sample):
    """A student, a teacher and a rollout of two completions a prompt."""
    own, other = make_model(1), make_model(2)
    student, teacher = LanguageModel(own, tiny_tokenizer, "student"), LanguageModel(other, tiny_tokenizer, "teacher")
    return student, teacher.freeze(), sample(own, make_batch(), SamplingLaw(), num_completions=2)


def judge(pair, name="full_vocab", rows=3, choice="fast", **keywords):
    student, teacher, rollout = pair
    estimator = estimators.build(name, **keywords)
    return prove_head(student, scored(rollout, estimator, teacher), estimator, rows, choice)


@pytest.mark.parametrize("name", ["full_vocab", "token", "teacher_topk", "sequence"])
def test_it_is_taken_where_it_computes_the_same(name, pair):
    verdict = judge(pair, name)
    assert verdict.taken
    assert verdict.off < 1e-4
    assert all(parameter.grad is None for parameter in pair[0].model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_hidden_states_and_of_the_head_are_compared(tied, pair, make_model, tiny_tokenizer, monkeypatch):
    compared = []

    def prove(name, plain, fast, *rest):
        compared.extend(tuple(tensor.shape) for tensor in plain())

    monkeypatch.setattr(proof_module, "prove", prove)
    student = LanguageModel(make_model(1, tie_word_embeddings=tied), tiny_tokenizer, "student")
    judge((student, *pair[1:]))
    vocabulary, width = student.head.weight_VH.shape
    assert compared[-1] == (vocabulary, width)
    assert compared[-2][1:] == (width,)


def test_models_that_agree_are_no_reason_to_leave_it(pair):
    """At the start of a self-distillation gradients are zero up to rounding, of which two paths have two kinds."""
    student, _, rollout = pair
    assert judge((student, student, rollout)).taken


def test_a_kernel_that_is_wrong_is_left(pair, monkeypatch):
    write = kernels.write_gradient

    def wrong(pair, *args):
        write(pair, *args)
        pair.student_cV[:, :2] *= 1.01

    monkeypatch.setattr(kernels, "write_gradient", wrong)
    with pytest.raises(UserError, match=r"optim\.paths: expected fused head to compute .* found off by"):
        judge(pair)


def test_on_a_cpu_auto_is_silent_and_plain_asks_for_nothing(pair, monkeypatch):
    monkeypatch.setattr(kernels, "_launch", None)
    assert judge(pair, choice="auto").reason == "kernels do not run on cpu"
    assert not judge(pair, choice="auto").taken
    assert judge(pair, choice="plain").reason == "optim.paths=plain"


def test_it_says_why_an_estimator_has_none(pair):
    with pytest.raises(UserError, match="todi sees the whole vocabulary"):
        judge(pair, "todi")


def test_whole_prompts_are_chosen_and_no_more_than_a_chunk_needs(pair):
    student, teacher, rollout = pair
    estimator = estimators.build("full_vocab")
    micro = scored(rollout, estimator, teacher)
    for positions in (1, 10, 10_000):
        part = proof_module._first(micro, positions)
        count = int(part.rollout.mask_BT.sum())
        assert count >= min(positions, int(rollout.mask_BT.sum()))
        assert len(part.scores["teacher"].full) == count
        rows_of = part.rollout.prompt_index_B.bincount()
        assert set(rows_of[rows_of > 0].tolist()) == {2}
    assert len(proof_module._first(micro, 1).rollout) == 2


def test_the_distiller_takes_the_path_it_was_told(pair, monkeypatch):
    student, teacher, rollout = pair
    rollout = written_by(rollout, rollout.prompt_index_B % 2 == 0)
    estimator = estimators.build("full_vocab")
    micro = scored(rollout, estimator, teacher)
    launched = []
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *args, **kw: (launched.append(1), launch(*args, **kw)))
    monkeypatch.setattr(chunks, "fused_rows", lambda rows, vocabulary: rows)
    values = []
    for fused in (False, True):
        distiller = Distiller(student, estimator, None, {}, 7, 10_000, fused_head=fused)
        values.append(distiller.estimate(micro, rollout.mask_BT / 10).value)
        assert bool(launched) == fused
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=1e-6)
    assert distiller.prove_head(micro, "fast").taken
