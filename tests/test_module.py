"""One training step against a dense, naive reference: all logits at once, one batch, plain autograd."""

import copy

import pytest
import torch

from lit_opd import estimators
from lit_opd.types import Estimate, TokenBatch

BUDGETS = {"one-batch": 10_000, "few-rows": 40, "row-by-row": 1}
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum"]
MIXED = {"sequence": 0.5, "full_vocab": {"weight": 0.3, "divergence": "jsd"}, "token": 0.1,
         "teacher_topk": {"weight": 0.7, "k": 3}}  # fmt: skip


def cases():
    """(name, keywords) of every registered estimator, and more of those whose keywords matter here."""
    for name in estimators.names():
        if name != "mix":
            yield name, {"k": 4} if estimators.get(name).needs.startswith("support") else {}
    yield from (("full_vocab", {"divergence": d}) for d in ("forward_kl", "jsd"))
    yield "hybrid", {"gamma": 0.9}
    yield "mix", {"terms": MIXED}
    yield "mix", {"terms": {"sequence": 1.0, "teacher_topk": {"weight": 1.0, "k": 5}}}
    yield "mix", {"terms": {"support_of_2": {"weight": 1.0}, "teacher_topk": {"weight": 2.0, "k": 6}}}


def support_of_2(tokens, *, k=2):
    """The sum of a support's log-probabilities: shows which tokens, and how many, a term was given."""
    return Estimate(tokens.student_support_logps_BTK.sum(-1), tokens.student_logps_BT.detach() * 0)


@pytest.fixture(autouse=True)
def _second_support_estimator(monkeypatch):
    """Two support sizes in one mix need two names; one is registered here, and forgotten after each test."""
    from lit_opd.estimators import registry

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    estimators.register_estimator("support_of_2", needs="support")(support_of_2)


every_case = pytest.mark.parametrize(("name", "kwargs"), list(cases()), ids=lambda v: str(v)[:60])


def dense_batch(rollout, student_logits, teacher_logits, k, rewards_B):
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1).detach()
    ids = rollout.completion_ids_BT[..., None]
    support = teacher.topk(k, dim=-1).indices if k else None
    return TokenBatch(
        student_logps_BT=student.gather(-1, ids)[..., 0],
        teacher_logps_BT=teacher.gather(-1, ids)[..., 0],
        sampler_logps_BT=rollout.sampler_logps_BT,
        mask_BT=rollout.mask_BT,
        support_ids_BTK=support,
        student_support_logps_BTK=student.gather(-1, support) if k else None,
        teacher_support_logps_BTK=teacher.gather(-1, support) if k else None,
        student_full_logps_BTV=student,
        teacher_full_logps_BTV=teacher,
        kl_BT=(student.exp() * (student - teacher)).sum(-1).detach(),
        rewards_B=rewards_B,
    )


def terms_of(name, kwargs):
    if name != "mix":
        return [(1.0, name, kwargs)]
    terms = [(n, dict(v) if isinstance(v, dict) else {"weight": v}) for n, v in kwargs["terms"].items()]
    return [(v.pop("weight"), n, v) for n, v in terms]


def reduce_naively(loss_BT, mask_BT, aggregation):
    """The mean over all tokens, or the mean over sequences of each one's mean or sum; loops, no weights."""
    rows = [loss_T[mask_T] for loss_T, mask_T in zip(loss_BT, mask_BT, strict=True) if mask_T.any()]
    if not rows:
        return loss_BT.sum() * 0
    if aggregation == "token_mean":
        return torch.cat(rows).mean()
    return torch.stack([row.mean() if aggregation == "sequence_mean" else row.sum() for row in rows]).mean()


def rewards_of(rollout, tokenizer):
    texts = [tokenizer.decode(ids[mask], skip_special_tokens=True)
             for ids, mask in zip(rollout.completion_ids_BT, rollout.completion_mask_BT, strict=True)]  # fmt: skip
    return torch.tensor([float(len(text) > 3) for text in texts])


def dense_step(student, teacher, rollout, name, kwargs, aggregation, full_logits, tokenizer):
    """Loss and gradients of one step."""
    student.zero_grad()
    student_logits, teacher_logits = full_logits(student, rollout), full_logits(teacher, rollout).detach()
    loss_BT = 0
    for weight, term, keywords in terms_of(name, kwargs):
        k = keywords.get("k", 2) if estimators.get(term).needs.startswith("support") else 0
        tokens = dense_batch(rollout, student_logits, teacher_logits, k, rewards_of(rollout, tokenizer))
        loss_BT = loss_BT + weight * estimators.build(term, **keywords)(tokens).loss_BT
    loss = reduce_naively(loss_BT, rollout.mask_BT, aggregation)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters()}


def uncounted(rollout, token_id):
    return rollout.uncount(rollout.completion_ids_BT == token_id)


def assert_close(found, expected, tolerance):
    """Every gradient within `tolerance` of the largest expected entry."""
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max().item() / scale
        assert error <= tolerance, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@every_case
def test_loss_and_gradients_are_those_of_the_dense_reference(
    name, kwargs, aggregation, budget, make_model, make_module, fit, full_logits, tiny_tokenizer
):
    """In float64 to 1e-10, whatever the cut into micro-batches; prompts of 2 to 7 tokens, "7" not counted."""
    student, teacher = make_model(1, torch.float64), make_model(2, torch.float64, hidden_size=24)
    module = make_module(copy.deepcopy(student), teacher, name, estimator_kwargs=kwargs, aggregation=aggregation,
                         masked_tokens=["7"], optim={"micro_batch_tokens": BUDGETS[budget]})  # fmt: skip
    record = fit(module, precision="64-true")
    rollout = uncounted(record.rollouts[0], tiny_tokenizer.convert_tokens_to_ids("7"))
    assert not torch.equal(rollout.mask_BT, rollout.completion_mask_BT), "no masked token was sampled"
    loss, gradients = dense_step(student, teacher, rollout, name, kwargs, aggregation, full_logits, tiny_tokenizer)
    assert_close(record.gradients[0], gradients, 1e-10)
    assert record.metrics[0]["train/loss"].item() == pytest.approx(loss, rel=1e-5, abs=1e-6)


@every_case
def test_in_fp32_the_cut_changes_only_the_rounding(
    name, kwargs, make_model, make_module, fit, full_logits, tiny_tokenizer
):
    student, teacher = make_model(1, initializer_range=0.2), make_model(2, initializer_range=0.2)
    found, rollouts = {}, {}
    for budget, tokens in BUDGETS.items():
        module = make_module(copy.deepcopy(student), teacher, name, estimator_kwargs=kwargs,
                             optim={"micro_batch_tokens": tokens})  # fmt: skip
        record = fit(module)
        found[budget], rollouts[budget] = record.gradients[0], record.rollouts[0]
    _, dense = dense_step(student.double(), teacher.double(), rollouts["one-batch"], name, kwargs, "token_mean",
                          full_logits, tiny_tokenizer)  # fmt: skip
    assert_close(found["one-batch"], {n: g.float() for n, g in dense.items()}, 1e-5)
    assert_close(found["few-rows"], found["one-batch"], 2e-6)
    assert_close(found["row-by-row"], found["one-batch"], 2e-6)


def test_two_updates_a_rollout_are_two_steps_on_its_two_halves(
    make_model, make_module, fit, full_logits, tiny_tokenizer
):
    """Each with its own count; the second with the weights that the first left."""
    student, teacher = make_model(1, torch.float64), make_model(2, torch.float64)
    record = fit(make_module(copy.deepcopy(student), teacher, optim={"updates_per_rollout": 2, "lr": 0.01}), 2,
                 precision="64-true")  # fmt: skip
    assert len(record.rollouts) == 1
    assert len(record.gradients) == 2
    rollout = record.rollouts[0]
    for update in range(2):
        half = rollout.rows(torch.arange(len(rollout)).chunk(2)[update])
        student.load_state_dict(record.weights[update])
        _, gradients = dense_step(student, teacher, half, "full_vocab", {}, "token_mean", full_logits, tiny_tokenizer)
        assert_close(record.gradients[update], gradients, 1e-10)
    assert not torch.equal(record.weights[0]["lm_head.weight"], record.weights[1]["lm_head.weight"])


def test_more_updates_than_rows_leave_nothing_undone(make_model, make_module, fit, make_data):
    """A process may have fewer rows than updates; the others wait for it."""
    record = fit(make_module(make_model(1), make_model(2), optim={"updates_per_rollout": 4}), 4, make_data(["7="]))
    assert len(record.gradients) == 4
    assert [bool(g["lm_head.weight"].any()) for g in record.gradients] == [True, False, True, False]


@every_case
def test_a_rollout_without_counted_tokens_gives_zero_gradient(name, kwargs, make_model, make_module, fit):
    module = make_module(make_model(1), make_model(2), name, estimator_kwargs=kwargs, masked_tokens=list(range(17)))
    record = fit(module)
    assert not any(g.any() for g in record.gradients[0].values())
    assert record.metrics[0]["train/loss"] == record.metrics[0]["train/reverse_kl"] == 0


def test_the_logged_numbers_of_a_step(make_model, make_module, fit, full_logits):
    student, teacher = make_model(1, torch.float64), make_model(2, torch.float64)
    record = fit(make_module(copy.deepcopy(student), teacher, optim={"micro_batch_tokens": 40}), precision="64-true")
    rollout, logged = record.rollouts[0], {k: v.item() for k, v in record.metrics[0].items()}
    mask = rollout.mask_BT
    p, q = (full_logits(m, rollout).log_softmax(-1)[mask].detach() for m in (student, teacher))
    assert logged["train/reverse_kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    taken = p.gather(-1, rollout.completion_ids_BT[mask][:, None])
    assert logged["train/entropy"] == pytest.approx(-taken.mean().item(), rel=1e-5)
    norms = torch.stack([g.norm() for g in record.gradients[0].values()])
    assert logged["train/grad_norm"] == pytest.approx(norms.norm().item(), rel=1e-5)
    assert logged["rollout/sampler_gap"] == pytest.approx(0, abs=1e-6)
    lengths = mask.sum(1)
    stopped = (rollout.completion_ids_BT == 2).any(1)
    assert logged["rollout/length"] == pytest.approx(lengths.double().mean().item())
    assert logged["rollout/eos_frac"] == pytest.approx(stopped.double().mean().item())
    assert logged["rollout/truncated_frac"] == pytest.approx(1 - stopped.double().mean().item())
    phases = sum(logged[f"perf/{name}"] for name in ("rollout_s", "teacher_s", "student_s"))
    assert logged["perf/step_s"] == pytest.approx(phases, rel=1e-3)
    assert logged["perf/peak_memory_mb"] > 50
