"""Training on completions of which the student wrote only a share."""

import copy
from unittest.mock import patch

import pytest
import torch

from lit_opd import PromptDataModule
from lit_opd.distiller import Distiller
from lit_opd.errors import UserError
from lit_opd.types import FinishReason

PROMPTS = ["1+2=", "7=", "12-9+3=", "5+5=", "80-1=", "3=", "4-1="]
TERMS = {"token": 1.0, "supervised": 0.5, "full_vocab": {"weight": 0.2, "divergence": "forward_kl"}, "hybrid": 0.3}


@pytest.fixture
def make_rows(tiny_tokenizer):
    def make(column="answer"):
        rows = [{"prompt": prompt, "answer": prompt[:1] * 3} for prompt in PROMPTS]
        return PromptDataModule(tokenizer=tiny_tokenizer, train_rows=rows, validation_rows=rows[:2], batch_size=7,
                                answer_column=column)  # fmt: skip

    return make


def run(make_module, fit, data, student, teacher, **kwargs):
    """One step; returns what happened, and the whole rollout, demonstrations included."""
    module = make_module(student, teacher, optim={"micro_batch_tokens": 40}, **kwargs)
    kept, sample = [], Distiller.sample
    with patch.object(Distiller, "sample", lambda self, batch: kept.append(sample(self, batch)) or kept[-1]):
        record = fit(module, data=data, precision="64-true")
    return record, kept[0]


def test_every_term_sees_what_it_may(make_model, make_module, fit, full_logits, make_rows):
    """Score functions only the student's own tokens, cross-entropy only the others, divergences all of them."""
    student, teacher = make_model(1, torch.float64), make_model(2, torch.float64)
    record, rollout = run(make_module, fit, make_rows(), copy.deepcopy(student), teacher, estimator="mix",
                          estimator_kwargs={"terms": TERMS}, rollout={"student_share": 0.5})  # fmt: skip
    wrote = rollout.student_wrote_BT[:, 0]
    assert 0 < wrote.sum() < len(wrote)
    ids_BT1, loss = rollout.ids_BT[..., None], 0
    p_BTV, q_BTV = full_logits(student, rollout).log_softmax(-1), full_logits(teacher, rollout).detach().log_softmax(-1)
    p_BT, q_BT = p_BTV.gather(-1, ids_BT1)[..., 0], q_BTV.gather(-1, ids_BT1)[..., 0]
    for b in range(len(rollout)):
        length = int(rollout.mask_BT[b].sum())
        d = (p_BT[b] - q_BT[b]).detach()
        for t in range(length):
            loss = loss + 0.2 * (q_BTV[b, t].exp() * (q_BTV[b, t] - p_BTV[b, t])).sum()
            if wrote[b]:
                credit = sum(0.5 ** (i - t) * d[i] for i in range(t, length))
                loss = loss + (d[t] + 0.3 * credit) * p_BT[b, t]
            else:
                loss = loss - 0.5 * p_BT[b, t]
    (loss / rollout.mask_BT.sum()).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(record.gradients[0][name], parameter.grad, rtol=0, atol=1e-10)
    own = rollout.own_mask_BT
    assert record.metrics[0]["train/entropy"].item() == pytest.approx(-p_BT[own].mean().item(), rel=1e-5)
    assert record.metrics[0]["rollout/length"].item() == pytest.approx((own.sum() / wrote.sum()).item())
    assert record.metrics[0]["rollout/sampler_gap"].item() == pytest.approx(0, abs=1e-6)


def test_the_teacher_writes_what_it_would_write(make_model, make_module, fit, make_rows, full_logits):
    """A share of 0: all completions are the teacher's own samples, and nothing is left for a score function."""
    student, teacher = make_model(1, torch.float64), make_model(2, torch.float64)
    record, rollout = run(make_module, fit, make_rows(), student, teacher, estimator="token",
                          rollout={"student_share": 0.0, "temperature": 0.5})  # fmt: skip
    assert not rollout.student_wrote_BT.any()
    assert rollout.law.is_student  # the teacher's distribution as it is
    logps_BTV, ids_BT1 = full_logits(teacher, rollout).log_softmax(-1), rollout.ids_BT[..., None]
    off_BT = rollout.sampler_logps_BT - logps_BTV.gather(-1, ids_BT1)[..., 0]
    assert off_BT[rollout.mask_BT].abs().max() < 1e-5
    assert not any(gradient.any() for gradient in record.gradients[0].values())
    unread = ("train/reverse_kl", "train/entropy", "rollout/sampler_gap", "rollout/length", "rollout/eos_frac")
    assert all(record.metrics[0][name].isnan() for name in unread), "not 0: there is nothing to take a mean of"


def test_the_data_may_write(make_model, make_module, fit, make_rows, tiny_tokenizer):
    _, rollout = run(make_module, fit, make_rows(), make_model(1, torch.float64), make_model(2, torch.float64),
                     estimator="supervised", rollout={"student_share": 0.0, "demonstrations": "data"})  # fmt: skip
    for ids, mask, prompt in zip(rollout.ids_BT, rollout.mask_BT, rollout.prompts.ids_BP, strict=True):
        text = tiny_tokenizer.decode(prompt, skip_special_tokens=True)
        assert tiny_tokenizer.decode(ids[mask]) == text[:1] * 3 + "<eos>"


@pytest.mark.parametrize(("chat", "end"), [(False, "<eos>"), (True, "<bos>")])
def test_the_data_ends_as_the_chat_template_ends_a_turn(
    chat, end, make_model, make_module, fit, make_rows, tiny_tokenizer, monkeypatch
):
    """Elsewhere with the tokenizer's own end, whichever of the ends in a generation config has the smallest id."""
    turns = "{% for m in messages %}{{ m.content }}{% if m.role != 'user' %}<bos>{% endif %}{% endfor %}"
    monkeypatch.setattr(tiny_tokenizer, "chat_template", turns)
    student, data = make_model(1), make_rows()
    student.generation_config.eos_token_id, data.config.chat = [0, 2, 3], chat
    wanted = {"student_share": 0.0, "demonstrations": "data", "max_new_tokens": 4, "num_completions": 1}
    _, rollout = run(make_module, fit, data, student, make_model(2), estimator="supervised", rollout=wanted)
    assert tiny_tokenizer.batch_decode(rollout.ids_BT[:, -1:]) == [end] * 7
    assert (rollout.finish_B == FinishReason.STOP).all()


def test_texts_of_the_data_are_repeated_and_cut_as_samples_are(make_model, make_module, fit, make_rows):
    """Three of every prompt, of two tokens each: the answers are longer, and end without a stop token."""
    wanted = {"student_share": 0.0, "demonstrations": "data", "num_completions": 3, "max_new_tokens": 2}
    _, rollout = run(make_module, fit, make_rows(), make_model(1), make_model(2), estimator="supervised",
                     rollout=wanted)  # fmt: skip
    assert rollout.prompt_index_B.tolist() == [i for i in range(7) for _ in range(3)]
    assert rollout.mask_BT.shape == (21, 2)
    assert rollout.mask_BT.all()
    assert (rollout.finish_B == FinishReason.LENGTH).all()


def test_data_without_answers_is_told(make_model, make_module, make_trainer, fit, make_rows):
    wanted = {"student_share": 0.0, "demonstrations": "data"}
    with pytest.raises(UserError, match=r"rollout.demonstrations: expected an answer in every row .* none in None"):
        run(make_module, fit, make_rows(None), make_model(1), make_model(2), rollout=wanted)
    with pytest.raises(UserError, match=r"data.answer_column: expected a column 'solution' in some row"):
        run(make_module, fit, make_rows("solution"), make_model(1), make_model(2), rollout=wanted)
    module, data = make_module(make_model(1), make_model(2), rollout=wanted), make_rows()
    data.setup("fit")
    module.trainer = make_trainer()
    module.setup("fit")
    with pytest.raises(UserError, match="rollout.demonstrations: expected prompts of a PromptDataModule"):
        module.distiller.sample(next(iter(data.train_dataloader())))


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_the_students_completions_are_the_same_whoever_else_writes(make_model, make_module, fit, make_rows, share):
    student, teacher = make_model(1, torch.float64), make_model(2, torch.float64)
    _, whole = run(make_module, fit, make_rows(), copy.deepcopy(student), teacher)
    _, mixed = run(make_module, fit, make_rows(), copy.deepcopy(student), teacher, rollout={"student_share": share})
    for b in torch.nonzero(mixed.student_wrote_BT[:, 0]).flatten():
        assert torch.equal(whole.ids_BT[b][whole.mask_BT[b]], mixed.ids_BT[b][mixed.mask_BT[b]])
