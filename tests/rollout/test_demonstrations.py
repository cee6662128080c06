"""Rollouts of which the student wrote only a share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd.models import LanguageModel
from lit_opd.rollout.demonstrations import join, student_writes, take_prompts, written
from lit_opd.types import FinishReason, SamplingLaw

PROMPTS = ["1+2=", "7=", "12-9+3=", "5+5="]


def test_the_share_is_the_share():
    draws = [(step, place) for step in range(100) for place in range(20)]
    for share in (0.0, 0.3, 1.0):
        assert student_writes(3, draws, share).float().mean().item() == pytest.approx(share, abs=0.04)


def test_who_writes_depends_on_the_draw_alone():
    draws = [(1, 0), (1, 1), (1, 2), (2, 0)]
    whole = student_writes(5, draws, 0.5)
    assert torch.equal(torch.cat([student_writes(5, [draw], 0.5) for draw in draws]), whole)
    many = [(step, 0) for step in range(64)]
    assert not torch.equal(student_writes(5, many, 0.5), student_writes(6, many, 0.5))


@settings(deadline=None, max_examples=20)
@given(st.lists(st.booleans(), min_size=4, max_size=4).filter(lambda w: any(w) and not all(w)), st.integers(1, 3))
def test_joined_rollouts_hold_every_row_in_the_order_of_the_batch(
    make_model, make_batch, sample, tiny_tokenizer, wrote, count
):
    batch, wrote = make_batch(PROMPTS), torch.tensor(wrote)
    student, teacher = make_model(1), make_model(2)
    first, second = (take_prompts(batch, torch.nonzero(chosen).flatten()) for chosen in (wrote, ~wrote))
    own = sample(student, first, SamplingLaw(), count, length=10)
    demonstrated = sample(teacher, second, SamplingLaw(), count, length=5)
    found = join(own, demonstrated, wrote)
    alone = {True: sample(student, batch, SamplingLaw(), count, length=10),
             False: sample(teacher, batch, SamplingLaw(), count, length=5)}  # fmt: skip
    assert found.prompt_index_B.tolist() == [i for i in range(4) for _ in range(count)]
    assert torch.equal(found.student_wrote_B, wrote.repeat_interleave(count))
    for row in range(4 * count):
        expected = alone[bool(wrote[row // count])]
        for name in ("completion_ids_BT", "sampler_logps_BT", "mask_BT"):
            kept = found.mask_BT[row]
            assert torch.allclose(getattr(found, name)[row][kept].float(),
                                  getattr(expected, name)[row][expected.mask_BT[row]].float(), atol=1e-5)  # fmt: skip
        assert torch.equal(found.prompt_ids_BP[row], batch.prompt_ids_BP[row // count])


def test_own_mask_leaves_demonstrations_out(make_model, make_batch, sample):
    batch, wrote = make_batch(PROMPTS), torch.tensor([True, False, True, True])
    own, other = (sample(make_model(1), take_prompts(batch, torch.nonzero(w).flatten()), SamplingLaw())
                  for w in (wrote, ~wrote))  # fmt: skip
    rollout = join(own, other, wrote)
    assert torch.equal(rollout.own_mask_BT.any(1), wrote)
    assert torch.equal(own.own_mask_BT, own.mask_BT)
    picked = rollout.rows(torch.tensor([1, 0]))
    assert picked.student_wrote_B.tolist() == [False, True]


def test_written_texts_become_tokens_that_end(make_model, make_batch, tiny_tokenizer):
    policy = LanguageModel(make_model(1), tiny_tokenizer, "student")
    rollout = written(policy, make_batch(PROMPTS), ["3", "7", "123456", ""], num_completions=2, length=4)
    texts = tiny_tokenizer.batch_decode([i[m].tolist() for i, m in zip(rollout.completion_ids_BT, rollout.mask_BT,
                                                                       strict=True)])  # fmt: skip
    assert texts == ["3<eos>", "3<eos>", "7<eos>", "7<eos>", "1234", "1234", "<eos>", "<eos>"]
    stop, cut = FinishReason.STOP, FinishReason.LENGTH
    assert rollout.finish_B.tolist() == [stop] * 4 + [cut] * 2 + [stop] * 2
    assert not rollout.sampler_logps_BT.any()
