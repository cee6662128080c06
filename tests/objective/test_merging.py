"""Merged tokens are one symbol to every estimator: the loss is that of the images of both laws under the merging."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from references import close, rollout_from

from lit_opd import estimators
from lit_opd.estimators.oracle.laws import cases
from lit_opd.functional import Head, reverse_kl
from lit_opd.objective import student_loss
from lit_opd.teachers import LocalScorer, wanted_by
from lit_opd.types import SamplingLaw, ScoredRollout

ROWS, LENGTH, VOCABULARY = 6, 4, 11
GROUPS = [[7, 2], [4, 9, 5]]
# The columns of a vocabulary in which a group is one token, by the first of its members, and what stands in each.
COLUMNS = [[0], [1], [3], [4, 9, 5], [6], [7, 2], [8], [10]]


class Table:
    """A model that is a table of logits, one row of it for every counted token of its rollout."""

    def __init__(self, logits_NV):
        self.logits_NV = logits_NV

    def hidden(self, rollout):
        assert len(self.logits_NV) == rollout.mask_BT.sum()
        return self.logits_NV, Head(torch.eye(self.logits_NV.shape[1], dtype=self.logits_NV.dtype))

    def evaluating(self):
        return nullcontext()

    precision = evaluating


def image(logits_NV):
    """The law of the symbols: probabilities are summed, and there are as many columns as symbols."""
    probs_NV = logits_NV.exp() / logits_NV.exp().sum(-1, keepdim=True)
    return torch.stack([probs_NV[:, column].sum(-1) for column in COLUMNS], dim=-1).log()


def symbols(ids):
    """The number of the column that each token is in."""
    return torch.tensor([next(i for i, c in enumerate(COLUMNS) if index in c) for index in ids.flatten()]).view_as(ids)


def make_rollout(seed=0):
    """Rows with holes in their mask, of two completions a prompt, the last of them demonstrations."""
    g = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=g)
    ids_BT[0], ids_BT[1, 0] = torch.tensor([7, 2, 9, 5]), 4
    mask_BT = torch.rand(ROWS, LENGTH, generator=g) < 0.8
    mask_BT[0] = True
    sampler_BT = -3 * torch.rand(ROWS, LENGTH, generator=g, dtype=torch.float64)
    ones_BT = torch.ones_like(mask_BT)
    rollout = rollout_from(ids_BT[:, :1], ones_BT[:, :1], ids_BT, ones_BT, mask_BT, sampler_BT, torch.zeros(ROWS),
                           SamplingLaw(), torch.arange(ROWS) // 2, torch.arange(ROWS) < ROWS - 1)  # fmt: skip
    return replace(rollout, rewards_B=torch.rand(ROWS, generator=g, dtype=torch.float64))


def make_logits(count, seed=1):
    """Of a student, a teacher and a reference."""
    return 2 * torch.randn(3, count, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scored_by(teacher, reference, rollout, estimator, merged=()):
    wanted = wanted_by(estimator)._replace(merged=merged)
    scores = {"teacher": LocalScorer(Table(teacher), 5).score(rollout, wanted)}
    alone = wanted._replace(support=0, full=False)
    scores["reference"] = LocalScorer(Table(reference), 5).score(rollout, alone)
    return ScoredRollout(rollout, scores, 0.25, merged)


def found(estimator, logits, rollout, merged=()):
    student_NV = logits[0].clone().requires_grad_()
    micro = scored_by(*logits[1:], rollout, estimator, merged)
    loss, stats, _ = student_loss(Table(student_NV), micro, estimator, weights(rollout), 5)
    return loss.detach(), torch.autograd.grad(loss, student_NV)[0], stats


def weights(rollout):
    return rollout.mask_BT * torch.linspace(0.5, 1.5, LENGTH, dtype=torch.float64)


def written_in_symbols(rollout, student_NV):
    """The same tokens as symbols, of which the sampler knows the probability if it splits them as the student does."""
    log_p_NV, mask_BT = student_NV.log_softmax(-1), rollout.mask_BT
    ids_N = rollout.ids_BT[mask_BT]
    split_N = log_p_NV.gather(-1, ids_N[:, None]) - image(student_NV).gather(-1, symbols(ids_N)[:, None])
    sampler_BT = rollout.sampler_logps_BT.clone()
    sampler_BT[mask_BT] -= split_N[:, 0]
    return replace(rollout, ids_BT=symbols(rollout.ids_BT), sampler_logps_BT=sampler_BT)


def of_images(estimator, logits, rollout):
    """The same as `found`, of models with a smaller vocabulary and without any merging."""
    student_NV = logits[0].clone().requires_grad_()
    rollout = written_in_symbols(rollout, logits[0])
    micro = scored_by(*(image(x) for x in logits[1:]), rollout, estimator)
    loss, stats, _ = student_loss(Table(image(student_NV)), micro, estimator, weights(rollout), 5)
    return loss.detach(), torch.autograd.grad(loss, student_NV)[0], stats


def every_case():
    for name in estimators.names():
        for keywords in cases(estimators.get(name)):
            yield pytest.param(name, keywords, id="-".join([name, *(f"{k}={v}" for k, v in keywords.items())]))


@pytest.mark.parametrize(("name", "keywords"), every_case())
def test_loss_and_gradient_are_those_of_models_in_which_a_group_is_one_token(name, keywords):
    estimator, rollout = estimators.build(name, **keywords), make_rollout()
    logits = make_logits(int(rollout.mask_BT.sum()))
    for value, expected in zip(
        found(estimator, logits, rollout, GROUPS), of_images(estimator, logits, rollout), strict=True
    ):
        if isinstance(value, dict):
            assert value.keys() == expected.keys()
            value, expected = torch.stack(list(value.values())), torch.stack(list(expected.values()))
        assert expected.isfinite().all()
        close(value, expected, atol=1e-10)


@pytest.mark.parametrize(("name", "keywords"), every_case())
def test_groups_of_one_token_change_no_bit(name, keywords):
    estimator, rollout = estimators.build(name, **keywords), make_rollout()
    logits = make_logits(int(rollout.mask_BT.sum()))
    plain, merged = (found(estimator, logits, rollout, groups) for groups in ((), [[3], [7]]))
    assert torch.equal(plain[0], merged[0])
    assert torch.equal(plain[1], merged[1])


@pytest.mark.parametrize("name", ["full_vocab", "token", "teacher_topk", "sequence", "hybrid"])
def test_a_split_inside_a_group_has_no_gradient(name):
    """The teacher ends with another token of the group: no loss is left, and no push from the one to the other."""
    estimator, rollout = estimators.build(name, **({"k": 3} if "topk" in name else {})), make_rollout()
    student, _, reference = make_logits(int(rollout.mask_BT.sum()))
    teacher = student.clone()
    teacher[:, [7, 2]] = student[:, [2, 7]]
    logits = torch.stack([student, teacher, reference])
    loss, gradient, _ = found(estimator, logits, rollout, GROUPS)
    assert gradient.abs().max() < 1e-12
    if name in ("full_vocab", "token"):
        assert loss.abs() < 1e-12
    assert found(estimator, logits, rollout)[1].abs().max() > 1e-3


def enumerated(law_V):
    """Every token once, as a completion of one token, under a law that samples it."""
    ids_BT, ones_BT = torch.arange(VOCABULARY)[:, None], torch.ones(VOCABULARY, 1, dtype=torch.bool)
    return rollout_from(ids_BT, ones_BT, ids_BT, ones_BT, ones_BT, law_V.log()[:, None], torch.zeros(VOCABULARY),
                        SamplingLaw(), torch.arange(VOCABULARY))  # fmt: skip


def expected_gradient(estimator, student_V, teacher_V, sampler_V, merged):
    """The exact expectation, over what the sampler draws, of the gradient by the student's logits."""
    rollout = enumerated(sampler_V)
    leaf_V = student_V.clone().requires_grad_()
    rows = [x.expand(VOCABULARY, -1) for x in (teacher_V, teacher_V)]
    micro = scored_by(*rows, rollout, estimator, merged)
    loss = student_loss(Table(leaf_V.expand(VOCABULARY, -1)), micro, estimator, sampler_V[:, None], 5).value
    return torch.autograd.grad(loss, leaf_V)[0]


def kl_of_images(student_V, teacher_V):
    leaf_V = student_V.clone().requires_grad_()
    return torch.autograd.grad(reverse_kl(*(image(x[None]) for x in (leaf_V, teacher_V))).sum(), leaf_V)[0]


@pytest.mark.parametrize("name", ["token", "full_vocab"])
def test_the_expected_gradient_is_that_of_the_divergence_between_the_images(name):
    student_V, teacher_V, _ = make_logits(1)[:, 0]
    expected_V, estimator = kl_of_images(student_V, teacher_V), estimators.build(name)
    merged_V, plain_V = (
        expected_gradient(estimator, student_V, teacher_V, student_V.softmax(-1), groups) for groups in (GROUPS, ())
    )
    close(merged_V, expected_V)
    assert (plain_V - expected_V).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "keywords"), [("importance_reverse_kl", {"correction": "full"}), ("importance_k3", {})]
)
def test_importance_weights_stay_exact_under_any_law_that_sampled(name, keywords):
    """The sampler's probability of a group is not recorded: the ratio has to be that of the token it drew."""
    student_V, teacher_V, sampler_V = make_logits(1)[:, 0]
    estimator = estimators.build(name, **keywords)
    found_V = expected_gradient(estimator, student_V, teacher_V, sampler_V.softmax(-1), GROUPS)
    close(found_V, kl_of_images(student_V, teacher_V))
