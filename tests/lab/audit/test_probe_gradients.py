import itertools
from dataclasses import replace

import pytest
import torch

from lit_opd.lab.audit.probe_gradients import _groups, cosine, flip_test, gradient, group_gradients, norm


def dense_reverse_kl(evidence, full_logits):
    """Mean over counted tokens of the reverse KL, by plain forward passes of both models."""
    student, teacher = (
        full_logits(m.model, evidence.rollout).log_softmax(-1) for m in (evidence.student, evidence.teacher)
    )
    values = (student.exp() * (student - teacher)).sum(-1)
    return values[evidence.rollout.mask_BT].mean()


def test_the_gradient_is_that_of_the_mean_over_all_counted_tokens(make_evidence, full_logits):
    evidence = make_evidence(masked=(5,)).but(micro_batch_tokens=100)
    assert len(evidence.distiller.score(evidence.rollout)) > 4
    found = gradient(evidence)
    expected = torch.autograd.grad(dense_reverse_kl(evidence, full_logits), evidence.parameters)
    assert norm([a - b for a, b in zip(found, expected, strict=True)]) < 1e-5 * norm(list(expected))
    assert norm(list(expected)) > 1e-3


def test_groups_of_completions_add_up_to_all(make_evidence):
    evidence = make_evidence(estimator="token")
    groups_GF = group_gradients(evidence)
    assert len(groups_GF) == 16
    whole = torch.cat([g.flatten() for g in gradient(evidence, aggregation="sequence_sum")])
    torch.testing.assert_close(groups_GF.mean(0), whole, rtol=1e-4, atol=1e-6)


def test_completions_of_a_prompt_stay_together_where_they_are_compared(make_evidence):
    for estimator, together in (("leave_one_out", True), ("token", False)):
        evidence = make_evidence(estimator=estimator)
        # Twelve prompts: sixteen groups of rows cut through them.
        evidence = replace(evidence, rollout=evidence.rollout.rows(torch.arange(48)))
        owners = [set(evidence.rollout.prompt_index_B[index].tolist()) for index in _groups(evidence)]
        assert sorted(i for index in _groups(evidence) for i in index.tolist()) == list(range(48))
        assert (sum(map(len, owners)) == len(set().union(*owners))) == together


def test_no_weight_moves_and_no_mode_changes(make_evidence):
    evidence = make_evidence(estimator="token")
    evidence.student.model.train()
    before = [p.detach().clone() for p in evidence.student.model.parameters()]
    gradient(evidence)
    assert evidence.student.model.training
    assert all(p.grad is None for p in evidence.parameters)
    assert all(torch.equal(a, b) for a, b in zip(before, evidence.student.model.parameters(), strict=True))
    evidence.student.model.eval()


def test_a_rollout_of_which_nothing_counts_has_no_gradient(make_evidence):
    evidence = make_evidence()
    nothing = replace(evidence, rollout=evidence.rollout.uncount(evidence.rollout.mask_BT))
    assert norm(gradient(nothing)) == 0


def test_flipping_signs_is_enumerated_rightly():
    torch.manual_seed(0)
    gradients_GF = torch.randn(6, 5, dtype=torch.float64) + 0.4
    sums = [
        (torch.tensor(signs, dtype=torch.float64) @ gradients_GF).norm()
        for signs in itertools.product((-1, 1), repeat=6)
    ]
    observed = gradients_GF.sum(0).norm()
    exact = sum(s >= observed - 1e-9 for s in sums) / len(sums)
    found = flip_test(gradients_GF)
    assert found.p_value == pytest.approx(float(exact), abs=0.03)
    assert found.noise_ratio == pytest.approx(float(observed / gradients_GF.norm()))


def test_noise_is_rarely_taken_for_a_mean_and_a_mean_is_found():
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(300, 16, 40, dtype=torch.float64, generator=generator)
    scales = torch.linspace(0.1, 3, 40, dtype=torch.float64)
    false = sum(flip_test(g).p_value < 0.05 for g in noise * scales)
    assert 3 <= false <= 28  # 15 of 300 expected
    assert all(flip_test(g).p_value < 0.01 for g in (noise[:20] + 1.0) * scales)


def test_gradients_of_zero_are_no_evidence():
    assert flip_test(torch.zeros(4, 3)) == (0.0, 1.0)


def test_cosine_and_norm_are_over_all_tensors():
    first, second = [torch.tensor([3.0]), torch.tensor([[4.0]])], [torch.tensor([-4.0]), torch.tensor([[3.0]])]
    assert norm(first) == pytest.approx(5)
    assert cosine(first, second) == pytest.approx(0)
    assert cosine(first, [2 * t for t in first]) == pytest.approx(1)
    assert cosine(first, [torch.zeros(1), torch.zeros(1, 1)]) == 0


def test_of_a_large_model_inner_products_of_all_its_numbers_are_kept(make_evidence, monkeypatch):
    evidence, size = make_evidence(estimator="token"), 512
    whole_GF = group_gradients(evidence).double()
    monkeypatch.setattr("lit_opd.lab.audit.probe_gradients._SKETCH", size)
    kept_GF, again_GF = group_gradients(evidence).double(), group_gradients(evidence).double()
    assert kept_GF.shape == (16, size)
    assert whole_GF.shape[1] > 4 * size
    assert torch.equal(kept_GF, again_GF), "two estimators are compared by the same signs"
    lengths_G = whole_GF.norm(dim=1)
    error_GG = (kept_GF @ kept_GF.T - whole_GF @ whole_GF.T) / (lengths_G[:, None] * lengths_G)
    assert error_GG.abs().max() < 4 * (2 / size) ** 0.5
    assert error_GG.square().mean().sqrt() < 1.5 * (2 / size) ** 0.5
