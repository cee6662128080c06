"""What every teacher taught in a step, by hand."""

from dataclasses import replace

import pytest
import torch

from lit_opd.measures.ledger import teacher_report, teacher_sums
from lit_opd.types import Author, SamplingLaw


def test_tokens_and_kl_go_to_teachers_by_weight_and_demonstrations_to_none(make_model, make_batch, sample):
    found = sample(make_model(1), make_batch(("7=", "5+5=")), SamplingLaw(), length=4)
    mask_BT = torch.tensor([[True, True, True, True], [True, True, False, False]])
    author_BT = torch.full_like(mask_BT, Author.STUDENT, dtype=torch.int8)
    author_BT[0, 3] = Author.DATA
    ids_BT = torch.ones_like(mask_BT, dtype=torch.long)
    rollout = replace(
        found, ids_BT=ids_BT, real_BT=mask_BT, mask_BT=mask_BT, author_BT=author_BT,
        routes_BM=torch.tensor([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]]),
    )  # fmt: skip
    kl_N = torch.tensor([1.0, 2.0, 3.0, 100.0, 4.0, 6.0])
    sums = {name: float(value) for name, value in teacher_sums([(rollout, {"kl": kl_N})] * 2, "abc").items()}
    assert sums == {"a/tokens": 5.5, "a/kl": 23.0, "b/tokens": 4.5, "b/kl": 9.0, "c/tokens": 0.0, "c/kl": 0.0}
    report = teacher_report(sums, "abc")
    assert report["teacher/a/tokens"] == 5.5
    assert report["teacher/a/reverse_kl"] == pytest.approx(23 / 5.5)
    assert report["teacher/a/kl_share"] == pytest.approx(23 / 32)
    assert report["teacher/c/reverse_kl"] != report["teacher/c/reverse_kl"]
    assert report["teacher/c/kl_share"] == 0
    assert teacher_sums([(rollout, {"kl": kl_N})], []) == teacher_report({}, []) == {}
