"""Hidden states of every architecture, packed or padded, are those of each row alone."""

import pytest
import torch
from architectures import ATTENTION, RECURRENT, build
from references import alone, rollout_from

from lit_opd.models import LanguageModel
from lit_opd.models.forward import PaddedForward
from lit_opd.types import SamplingLaw

PADDED = {"gemma2", "gpt_oss", "bloom", "falcon", *RECURRENT} - {"qwen3_next", "qwen3_5_text"}


def make_rollout():
    """Three prompts of three lengths with two completions each; tokens in the middle that do not count."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 17, (3, 9), generator=generator).repeat_interleave(2, 0)
    starts, stops = torch.tensor([0, 0, 3, 3, 5, 5]), torch.tensor([7, 3, 5, 7, 1, 6])
    completions = torch.randint(3, 17, (6, 7), generator=generator)
    written = torch.arange(7) < stops[:, None]
    counted = written & (torch.rand(6, 7, generator=generator) < 0.8)
    return rollout_from(
        prompts, torch.arange(9) >= starts[:, None], completions, written, counted, torch.zeros(6, 7), torch.zeros(6),
        SamplingLaw(), torch.arange(3).repeat_interleave(2),
    )  # fmt: skip


@pytest.mark.parametrize("name", [*ATTENTION, *RECURRENT])
def test_counted_hidden_states_and_their_gradients_are_those_of_each_row_alone(name, tiny_tokenizer):
    policy, rollout = LanguageModel(build(name, 0), tiny_tokenizer, "student"), make_rollout()
    found, expected = policy.hidden(rollout)[0], alone(policy, rollout)
    assert isinstance(policy.forward, PaddedForward) == (name in PADDED)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    along = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    gradients = [torch.autograd.grad((x * along).sum(), weights, allow_unused=True) for x in (found, expected)]
    one, two = (torch.cat([g.flatten() for g in side if g is not None]) for side in gradients)
    assert (one - two).norm() < 1e-5 * two.norm()
