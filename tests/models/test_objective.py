"""What estimators see of whole sequences, against the dense models."""

from dataclasses import fields, replace

import pytest
import torch

from lit_opd import estimators
from lit_opd.models import LanguageModel, score
from lit_opd.models.objective import counted_positions, sequence_tokens
from lit_opd.types import Estimate, SamplingLaw, ScoredRollout

KEYS = ("student", "teacher", "reference")
ALWAYS = {"student_logps_BT", "teacher_logps_BT", "sampler_logps_BT", "mask_BT", "completion_ids_BT", "progress"}
FIELDS = {
    "kl": {"kl_BT"},
    "entropy": {"student_entropy_BT", "teacher_entropy_BT"},
    "rewards": {"rewards_B"},
    "groups": {"groups_B"},
    "reference": {"reference_logps_BT"},
}


@pytest.fixture(scope="module")
def scene(make_model, tiny_tokenizer, make_batch, sample, full_logits):
    """Three models, a rollout with holes in its mask and tempered samples, and their dense log-probabilities."""
    models = [make_model(seed, torch.float64, hidden_size=size) for seed, size in ((1, 16), (2, 24), (3, 8))]
    rollout = sample(models[0], make_batch(), SamplingLaw(temperature=0.8), num_completions=2)
    rollout = rollout.uncount(rollout.completion_ids_BT == 7)
    policies = [LanguageModel(m, tiny_tokenizer, k) for m, k in zip(models, KEYS, strict=True)]
    return policies, rollout, [full_logits(model, rollout).log_softmax(-1).detach() for model in models]


def tokens_of(needs, policies, rollout, rows=3, rewards_B=None):
    estimators.register_estimator(f"spy {needs}", family="sequence", needs=needs)(spy)
    estimator, (student, teacher, reference) = estimators.build(f"spy {needs}"), policies
    scores = score(teacher, reference if "reference" in needs else None, rollout, estimator, rows)
    micro = ScoredRollout(rollout, scores, rewards_B, progress=0.25)
    hidden_NH = student.counted_hidden(rollout)
    return sequence_tokens(
        estimator, micro, counted_positions(micro, teacher.head, rows), hidden_NH, student.head, rows
    )


def spy(tokens):
    return Estimate(tokens.student_logps_BT, tokens.student_logps_BT)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("needs", ["token", *(f"token+{extra}" for extra in FIELDS), "token+kl+entropy+groups"])
def test_what_is_needed_is_filled_and_no_more(needs, scene):
    """A batch without groups may hold a part of a prompt's completions: nobody may compare them by accident."""
    policies, rollout, _ = scene
    tokens = tokens_of(needs, policies, rollout, rewards_B=torch.ones(len(rollout)) if "rewards" in needs else None)
    filled = {f.name for f in fields(tokens) if getattr(tokens, f.name) is not None}
    assert filled == ALWAYS.union(*(FIELDS.get(need, set()) for need in needs.split("+")))


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_every_field_is_the_dense_one_where_counted_and_zero_elsewhere(rows, scene):
    policies, rollout, (p_BTV, q_BTV, r_BTV) = scene
    wrote_B, rewards_B = rollout.prompt_index_B % 2 == 0, torch.arange(len(rollout)).double()
    rollout = replace(rollout, student_wrote_B=wrote_B)
    tokens = tokens_of("token+kl+entropy+reference+rewards+groups", policies, rollout, rows, rewards_B)
    taken = rollout.completion_ids_BT[..., None]
    expected = {
        "student_logps_BT": p_BTV.gather(-1, taken)[..., 0],
        "teacher_logps_BT": q_BTV.gather(-1, taken)[..., 0],
        "reference_logps_BT": r_BTV.gather(-1, taken)[..., 0],
        "kl_BT": (p_BTV.exp() * (p_BTV - q_BTV)).sum(-1),
        "student_entropy_BT": -(p_BTV.exp() * p_BTV).sum(-1),
        "teacher_entropy_BT": -(q_BTV.exp() * q_BTV).sum(-1),
    }
    for name, values_BT in expected.items():
        counted_BT = torch.where(rollout.mask_BT, values_BT, 0.0)
        torch.testing.assert_close(getattr(tokens, name).detach(), counted_BT, rtol=0, atol=1e-12)
        assert getattr(tokens, name).requires_grad == (name == "student_logps_BT")
    assert torch.equal(tokens.sampler_logps_BT, rollout.sampler_logps_BT)
    assert torch.equal(tokens.completion_ids_BT, rollout.completion_ids_BT)
    assert torch.equal(tokens.mask_BT, rollout.mask_BT)
    assert torch.equal(tokens.rewards_B, rewards_B)
    assert tokens.groups_B.tolist() == [row // 2 for row in range(len(rollout))]
    assert torch.equal(tokens.student_wrote_BT, wrote_B[:, None].expand(rollout.mask_BT.shape))
    assert tokens.progress == 0.25
