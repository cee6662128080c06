"""Rollouts of which the student wrote only a share."""

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd.models import LanguageModel
from lit_opd.rollout import Written
from lit_opd.rollout import sources as under_test
from lit_opd.rollout.sources import Mixed, student_writes
from lit_opd.types import Author, FinishReason, SamplingLaw

PROMPTS = ["1+2=", "7=", "12-9+3=", "5+5="]


@dataclass
class Source:
    """Completions of a bare model, of at most so many tokens."""

    sample: Any
    model: Any
    count: int
    length: int
    author: Author = Author.STUDENT

    def complete(self, batch):
        rollout = self.sample(self.model, batch, SamplingLaw(), self.count, length=self.length)
        return replace(rollout, author_BT=torch.full_like(rollout.author_BT, self.author))


def mix(wrote, own, others, batch):
    """Completions of a mixed source whose draws are given."""
    with patch.object(under_test, "student_writes", lambda *_: wrote):
        return Mixed(own, others, share=0.5, seed=0).complete(batch)


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
    found = mix(wrote, Source(sample, student, count, 10), Source(sample, teacher, count, 5, Author.TEACHER), batch)
    alone = {True: sample(student, batch, SamplingLaw(), count, length=10),
             False: sample(teacher, batch, SamplingLaw(), count, length=5)}  # fmt: skip
    assert found.prompt_index_B.tolist() == [i for i in range(4) for _ in range(count)]
    assert torch.equal(found.student_wrote_BT[:, 0], wrote.repeat_interleave(count))
    assert set(found.author_BT.unique().tolist()) == {Author.STUDENT, Author.TEACHER}
    for row in range(4 * count):
        expected = alone[bool(wrote[row // count])]
        for name in ("ids_BT", "sampler_logps_BT", "mask_BT"):
            kept = found.mask_BT[row]
            assert torch.allclose(getattr(found, name)[row][kept].float(),
                                  getattr(expected, name)[row][expected.mask_BT[row]].float(), atol=1e-5)  # fmt: skip
        assert torch.equal(found.prompts.ids_BP[row], batch.prompts.ids_BP[row // count])


def test_the_student_writes_from_a_batch_on(make_model, make_batch, sample):
    own, other = (Source(sample, make_model(1), 1, 10, author) for author in (Author.STUDENT, Author.TEACHER))
    source = Mixed(own, other, share=1.0, seed=0, start=3)
    wrote = [source.complete(make_batch(PROMPTS)._replace(batch=number)).student_wrote_BT for number in range(5)]
    assert [bool(mask.any()) for mask in wrote] == [False, False, False, True, True]
    assert [bool(mask[:, 0].all()) for mask in wrote[3:]] == [True, True]


def test_own_mask_leaves_demonstrations_out(make_model, make_batch, sample):
    batch, wrote = make_batch(PROMPTS), torch.tensor([True, False, True, True])
    own, other = (Source(sample, make_model(1), 1, 10, author) for author in (Author.STUDENT, Author.TEACHER))
    rollout = mix(wrote, own, other, batch)
    assert torch.equal(rollout.own_mask_BT.any(1), wrote)
    alone = own.complete(batch)
    assert torch.equal(alone.own_mask_BT, alone.mask_BT)
    picked = rollout.rows(torch.tensor([1, 0]))
    assert picked.student_wrote_BT[:, 0].tolist() == [False, True]


def test_written_texts_become_tokens_that_end(make_model, make_batch, tiny_tokenizer):
    policy = LanguageModel(make_model(1), tiny_tokenizer, "student")
    texts = ["3", "7<eos>", "123456", ""]
    rollout = Written(policy, lambda rows: (texts, 2), count=2, length=4).complete(make_batch(PROMPTS))
    assert (rollout.author_BT == Author.DATA).all()
    texts = tiny_tokenizer.batch_decode([i[m].tolist() for i, m in zip(rollout.ids_BT, rollout.mask_BT,
                                                                       strict=True)])  # fmt: skip
    assert texts == ["3<eos>", "3<eos>", "7<eos>", "7<eos>", "1234", "1234", "<eos>", "<eos>"]
    stop, cut = FinishReason.STOP, FinishReason.LENGTH
    assert rollout.finish_B.tolist() == [stop] * 4 + [cut] * 2 + [stop] * 2
    assert not rollout.sampler_logps_BT.any()
