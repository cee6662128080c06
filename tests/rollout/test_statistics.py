"""What a rollout looks like, on rollouts written by hand."""

import pytest
import torch
from references import rollout_from

from lit_opd.config import DataConfig
from lit_opd.data.guarded import Guarded
from lit_opd.rollout import rollout_sums
from lit_opd.rollout.statistics import repetition
from lit_opd.types import FinishReason, SamplingLaw


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([1, 2, 3], 0.0), ([1, 2, 3, 4, 5], 0.0), ([7] * 10, 6 / 7), ([1, 2, 1, 2, 1, 2, 1, 2], 3 / 5)],
)
def test_repetition_is_the_share_of_four_grams_seen_before(ids, expected):
    padded = torch.tensor([ids + [0] * 8])
    mask = torch.arange(padded.shape[1])[None] < len(ids)
    assert repetition(padded, mask).item() == pytest.approx(expected)


def test_sums_count_sequences():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], dtype=torch.bool)
    finish = torch.tensor([FinishReason.STOP, FinishReason.LENGTH, FinishReason.STOP])
    prompts = torch.ones(3, 1, dtype=torch.long)
    rollout = rollout_from(prompts, prompts.bool(), mask.long(), mask, mask, mask.float(), finish, SamplingLaw(),
                      torch.arange(3))  # fmt: skip
    sums = {name: value.item() for name, value in rollout_sums(rollout).items()}
    expected = {"rows": 3, "length": 7, "truncated_frac": 1, "eos_frac": 2, "repetition_frac": 0}
    assert sums == expected
    failing = Guarded(lambda text, row: row["reward"], DataConfig(on_verifier_error="zero"))
    for reward in (None, None, 1, None):  # the first is of an interrupted step
        failing("", {"reward": reward})
    sums = {name: float(value) for name, value in rollout_sums(rollout, failing).items()}
    assert sums == {**expected, "verifier_error_frac": 2}
