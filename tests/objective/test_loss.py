"""What estimators see of whole sequences, and what is logged of every position, against the dense models."""

import math
from dataclasses import fields, replace

import pytest
import torch
from references import scored, support_by_sets, written_by

from lit_opd import estimators
from lit_opd.errors import UserError
from lit_opd.models import LanguageModel
from lit_opd.objective import CountedPositions, sequence_tokens, student_loss, support_masses
from lit_opd.types import Estimate, SamplingLaw, TokenBatch

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
    rollout = rollout.uncount(rollout.ids_BT == 7)
    policies = [LanguageModel(m, tiny_tokenizer, k) for m, k in zip(models, KEYS, strict=True)]
    return policies, rollout, [full_logits(model, rollout).log_softmax(-1).detach() for model in models]


def tokens_of(needs, policies, rollout, rows=3, rewards_B=None):
    estimators.register_estimator(f"spy {needs}", family="sequence", needs=needs)(spy)
    estimator, (student, teacher, reference) = estimators.build(f"spy {needs}"), policies
    rollout = replace(rollout, rewards_B=rewards_B)
    micro = scored(rollout, estimator, teacher, reference if "reference" in needs else None, rows, progress=0.25)
    return sequence_tokens(estimator, micro, CountedPositions.of(micro), *student.hidden(rollout), rows)


def spy(tokens):
    return Estimate(tokens.student_logps_BT, tokens.student_logps_BT)


@pytest.mark.parametrize("needs", ["token", *(f"token+{extra}" for extra in FIELDS), "token+kl+entropy+groups"])
def test_what_is_needed_is_filled_and_no_more(needs, scene):
    """A batch without groups may hold a part of a prompt's completions: nobody may compare them by accident."""
    policies, rollout, _ = scene
    tokens = tokens_of(needs, policies, rollout, rewards_B=torch.ones(len(rollout)) if "rewards" in needs else None)
    filled = {f.name for f in fields(tokens) if getattr(tokens, f.name) is not None}
    assert filled == ALWAYS.union(*(FIELDS.get(need, set()) for need in needs.split("+")))


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_every_field_is_the_dense_one_where_counted_and_zero_elsewhere(rows, scene):
    policies, rollout, (p_BTV, q_BTV, r_BTV) = scene
    wrote_B, rewards_B = rollout.prompt_index_B % 2 == 0, torch.arange(len(rollout)).double()
    rollout = written_by(rollout, wrote_B)
    tokens = tokens_of("token+kl+entropy+reference+rewards+groups", policies, rollout, rows, rewards_B)
    taken = rollout.ids_BT[..., None]
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
    assert torch.equal(tokens.completion_ids_BT, rollout.ids_BT)
    assert torch.equal(tokens.mask_BT, rollout.mask_BT)
    assert torch.equal(tokens.rewards_B, rewards_B)
    assert tokens.groups_B.tolist() == [row // 2 for row in range(len(rollout))]
    assert torch.equal(tokens.student_wrote_BT, wrote_B[:, None].expand(rollout.mask_BT.shape))
    assert tokens.progress == 0.25


def stats_of(estimator, policies, rollout, rows=3, rewards_B=None):
    """The per-position values of a training step."""
    student, teacher, reference = policies
    rollout, weights_BT = replace(rollout, rewards_B=rewards_B), rollout.mask_BT / 10
    micro = scored(rollout, estimator, teacher, reference if "reference" in estimator.needs else None, rows)
    return student_loss(student, micro, estimator, weights_BT, rows).stats


TWO_SUPPORTS = {"teacher_topk": {"weight": 1.0, "k": 2}, "student_topk": {"weight": 1.0, "k": 5}, "token": 1.0}
SUPPORTS = [
    ("topk_divergence", {"k": 3, "support": "teacher"}, (3, "teacher")),
    ("topk_divergence", {"k": 3, "support": "student"}, (3, "student")),
    ("topk_divergence", {"k": 3, "support": "union"}, (3, "union")),
    ("topk_divergence", {"k": 3, "support": "intersection"}, (3, "intersection")),
    ("mix", {"terms": TWO_SUPPORTS}, (5, "student")),
    # The union of three and three is wider than four.
    ("mix", {"terms": {"teacher_topk": {"weight": 1, "k": 4}, "union_topk": {"weight": 1, "k": 3}}}, (3, "union")),
    ("prefix_opd", {"horizon": 2, "base": {"name": "teacher_topk", "k": 3}}, (3, "teacher")),
]


@pytest.mark.parametrize("rows", [2, 1000])
@pytest.mark.parametrize(("name", "keywords", "widest"), SUPPORTS)
def test_masses_are_those_of_the_widest_support_in_the_dense_distributions(name, keywords, widest, rows, scene):
    policies, rollout, (p_BTV, q_BTV, _) = scene
    stats = stats_of(estimators.build(name, **keywords), policies, rollout, rows)
    p_NV, q_NV = (x[rollout.mask_BT].exp().tolist() for x in (p_BTV, q_BTV))
    supports = [support_by_sets(p, q, *widest) for p, q in zip(p_NV, q_NV, strict=True)]
    for name, dense_NV in (("student_mass", p_NV), ("teacher_mass", q_NV)):
        expected = [sum(row[token] for token in support) for row, support in zip(dense_NV, supports, strict=True)]
        assert stats[name].tolist() == pytest.approx(expected, abs=1e-12)


def test_masses_keep_no_graph_alive():
    logps = torch.tensor([[0.5, 0.25]]).log()
    tokens = TokenBatch(
        logps[:, 0], logps[:, 0], logps[:, 0], torch.tensor([True]), support_ids_BTK=torch.tensor([[0, 1]]),
        support_mask_BTK=torch.tensor([[True, True]]), student_support_logps_BTK=logps.clone().requires_grad_(),
        teacher_support_logps_BTK=logps - 1,
    )  # fmt: skip
    masses = support_masses([tokens])
    assert not masses["student_mass"].requires_grad
    assert masses["student_mass"].tolist() == pytest.approx([0.75])
    assert masses["teacher_mass"].tolist() == pytest.approx([0.75 / math.e])


@pytest.mark.parametrize("name", ["token", "full_vocab", "sequence"])
def test_what_compares_no_support_and_sets_no_limit_logs_neither(name, scene):
    policies, rollout, _ = scene
    sampled = {"student_logps", "teacher_logps", "sampler_logps"}
    assert stats_of(estimators.build(name), policies, rollout).keys() == {"kl"} | sampled


LIMITED = {"name": "clipped_log_ratio", "max_log_ratio": 0.5}
TERM = {"weight": 1.0, "max_log_ratio": 0.5}
CLIPS = [
    ("on positions", "clipped_log_ratio", {"max_log_ratio": 0.5}),
    ("on positions, beside what sees sequences", "mix", {"terms": {"clipped_log_ratio": TERM, "sequence": 1.0}}),
    ("weighted", "position_decay", {"base": LIMITED}),
    ("on sequences", "on sequences", {}),
    ("on sequences, beside what sees positions", "mix", {"terms": {"on sequences": 1.0, "full_vocab": 1.0}}),
]


def limited_sequence(tokens):
    """As `clipped_log_ratio`, said of a whole batch; it calls masked positions clipped, which nobody may read."""
    ratio = tokens.student_logps_BT.detach() - tokens.teacher_logps_BT
    clipped = (ratio.abs() > 0.5) | ~tokens.mask_BT
    return Estimate(ratio.clamp(-0.5, 0.5) * tokens.student_logps_BT, ratio, clipped)


@pytest.mark.parametrize(("name", "keywords"), [pytest.param(*rest, id=where) for where, *rest in CLIPS])
def test_clip_activity_is_that_of_the_terms_at_tokens_they_learn_from(name, keywords, scene):
    """A demonstration has no term of an estimator that learns from the student's own tokens."""
    estimators.register_estimator("on sequences", family="sequence")(limited_sequence)
    policies, rollout, (p_BTV, q_BTV, _) = scene
    rollout = written_by(rollout, rollout.prompt_index_B % 2 == 0)
    stats = stats_of(estimators.build(name, **keywords), policies, rollout)
    taken, mask_BT = rollout.ids_BT[..., None], rollout.mask_BT
    ratio_BT = (p_BTV - q_BTV).gather(-1, taken)[..., 0]
    limited_BT = ratio_BT.abs() > 0.5
    assert 0 < limited_BT[rollout.own_mask_BT].sum() < rollout.own_mask_BT.sum()
    assert limited_BT[mask_BT & ~rollout.own_mask_BT].any()
    assert stats["clipped"].tolist() == (limited_BT & rollout.own_mask_BT)[mask_BT].double().tolist()


@pytest.mark.parametrize("name", ["clipped_log_ratio", "mopd", "tropd_forward"])
def test_a_micro_batch_without_counted_tokens_logs_the_same_names(name, scene):
    """So that whoever sums over micro-batches need not ask each of them what it has."""
    policies, rollout, _ = scene
    keywords = {"clipped_log_ratio": {"max_log_ratio": 9.0}, "tropd_forward": {"trust": 9.0, "k": 2}}.get(name, {})
    estimator, rewards_B = estimators.build(name, **keywords), torch.ones(len(rollout)).double()
    full = stats_of(estimator, policies, rollout, rewards_B=rewards_B)
    empty = stats_of(estimator, policies, rollout.uncount(rollout.mask_BT), rewards_B=rewards_B)
    assert "clipped" in full
    assert {key: (value.dtype, 0) for key, value in full.items()} == {k: (v.dtype, len(v)) for k, v in empty.items()}


@pytest.mark.parametrize(("name", "keywords"), [("k3_loss", {}), ("importance_k3", {}), ("token", {}),
                                                ("position_decay", {"base": "k3_loss"})])  # fmt: skip
def test_demonstrations_change_nothing_however_improbable(
    name, keywords, make_model, tiny_tokenizer, make_batch, sample
):
    """exp(88) overflows fp32: the k3 value of a demonstration that the student would never write is infinite."""
    models = make_model(1), make_model(2)
    models[0].config.logit_scale = 60.0
    rollout = sample(models[0], make_batch(), SamplingLaw(), num_completions=2)
    ids_BT = torch.where(rollout.prompt_index_B[:, None] % 2 == 0, rollout.ids_BT, 5)
    rollout = written_by(replace(rollout, ids_BT=ids_BT), rollout.prompt_index_B % 2 == 0)
    student, teacher = (
        LanguageModel(m, tiny_tokenizer, k, own_precision=True) for m, k in zip(models, KEYS[:2], strict=True)
    )
    estimator, weights_BT = estimators.build(name, **keywords), rollout.mask_BT / 10
    found = []
    for counted in (rollout, rollout.uncount(~rollout.own_mask_BT)):
        loss, stats, _ = student_loss(student, scored(counted, estimator, teacher), estimator, weights_BT, 3)
        gradients = torch.autograd.grad(loss, list(models[0].parameters()))
        found.append(torch.cat([loss[None], *(g.flatten() for g in gradients)]).detach())
        if counted is rollout:
            assert (stats["student_logps"] - stats["teacher_logps"]).min() < -100
    assert found[1].isfinite().all()
    assert found[1].any()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 * found[1].abs().max().item())


NO_ESTIMATES = {
    "summed": (lambda e, t: replace(e, loss_BT=e.loss_BT.sum(-1, keepdim=True)), "a loss_BT of shape"),
    "one_number": (lambda e, t: replace(e, loss_BT=e.loss_BT.mean()), "found shape []"),
    "python_number": (lambda e, t: replace(e, loss_BT=1.0), "found float"),
    "integers": (lambda e, t: replace(e, loss_BT=e.loss_BT.long()), "found torch.int64"),
    "half": (lambda e, t: replace(e, loss_BT=e.loss_BT.half()), "in torch.float64, found torch.float16"),
    "narrower": (lambda e, t: replace(e, loss_BT=e.loss_BT.float()), "in torch.float64, found torch.float32"),
    "no_gradient": (lambda e, t: replace(e, loss_BT=e.loss_BT.detach()), "depends on the student"),
    "transposed": (lambda e, t: replace(e, loss_BT=e.loss_BT.flatten()[None]), "a loss_BT of shape"),
    "kl_summed": (lambda e, t: replace(e, kl_BT=e.kl_BT.sum()), "a kl_BT of shape"),
    "clip_share": (lambda e, t: replace(e, clipped_BT=torch.tensor(True)), "a clipped_BT of shape"),
    "clip_count": (lambda e, t: replace(e, clipped_BT=torch.zeros_like(e.kl_BT)), "a clipped_BT of torch.bool"),
    "a_tensor": (lambda e, t: e.loss_BT, "found Tensor"),
    "nothing": (lambda e, t: None, "found NoneType"),
    "raises": (lambda e, t: 1 / 0, "found ZeroDivisionError: division by zero (" + __file__ + ", line"),
    "leaves": (lambda e, t: exit(0), "found SystemExit: 0"),
}  # fmt: skip


@pytest.mark.parametrize("family", ["token", "sequence"])
@pytest.mark.parametrize("case", NO_ESTIMATES)
def test_what_is_no_estimate_is_refused_at_the_first_batch(case, family, scene):
    """Broadcasting would make a loss of it, another one than was meant."""
    change, told = NO_ESTIMATES[case]
    policies, rollout, _ = scene

    def own(tokens):
        log_ratio = tokens.student_logps_BT.detach() - tokens.teacher_logps_BT
        return change(Estimate(log_ratio * tokens.student_logps_BT, log_ratio), tokens)

    estimators.register_estimator(case, family=family)(own)
    with pytest.raises(UserError) as caught:
        stats_of(estimators.build(case), policies, rollout)
    assert str(caught.value).startswith("estimator.name: expected ")
    assert told in str(caught.value)
    assert case in str(caught.value)


def test_a_weighting_gives_a_factor_for_every_token(scene):
    estimators.register_weighting("by_row")(lambda tokens: torch.ones(len(tokens.mask_BT), 1, dtype=torch.float64))
    policies, rollout, _ = scene
    with pytest.raises(UserError, match=r"^estimator.name: expected a weighting to return factors of shape"):
        stats_of(estimators.build("by_row", base="token"), policies, rollout)
