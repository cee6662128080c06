"""One training step against a dense, naive reference: all logits at once, one batch, plain autograd."""

import copy
import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from references import written_by

from lit_opd import DistillationModule, estimators
from lit_opd.rollout import LocalEngine
from lit_opd.types import TokenBatch

BUDGETS = {"one-batch": 10_000, "few-rows": 40, "row-by-row": 1}
AGGREGATIONS = ["token_mean", "sequence_mean", "sequence_sum"]
CUTS = list(itertools.product(BUDGETS, AGGREGATIONS))
MIXED = {"sequence": 0.5, "leave_one_out": 0.2, "token": 0.1, "exopd": 0.3, "teacher_topk": {"weight": 0.7, "k": 3},
         "topk_divergence": {"weight": 0.4, "k": 2, "support": "union"}, "student_topk": {"weight": 0.6, "k": 5},
         "full_vocab": {"weight": 0.3, "divergence": "jsd"}}  # fmt: skip
# One of each kind: its own position, rows of a group, a support of both models, the vocabulary, a sum, weights.
KINDS = [
    ("token", {}), ("leave_one_out", {}), ("topk_divergence", {"k": 3, "support": "union"}), ("full_vocab", {}),
    ("mix", {"terms": MIXED}), ("entropy_weighted", {"base": {"name": "full_vocab", "divergence": "forward_kl"}}),
]  # fmt: skip
MORE = [
    ("full_vocab", {"divergence": "forward_kl"}), ("full_vocab", {"divergence": "jsd"}), ("hybrid", {"gamma": 0.9}),
    ("topk_divergence", {"k": 4, "support": "student"}), ("topk_divergence", {"k": 4, "support": "intersection"}),
    ("mix", {"terms": {"sequence": 1.0, "teacher_topk": {"weight": 1.0, "k": 5}}}),
    ("tip", {"base": {"name": "teacher_topk", "k": 4}}),
]  # fmt: skip
COMPLETIONS, PROGRESS = 3, 0.375


def buildable(name):
    """Keywords: the defaults, or the first variant's where one has no default; a support that leaves something out."""
    spec, parameters = estimators.get(name), inspect.signature(estimators.get(name).fn).parameters.values()
    required = any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)
    kwargs = dict(spec.variants[0].keywords) if required else {}
    return ({"k": 4} if "support" in spec.needs else {}) | kwargs


CASES = [*((name, buildable(name)) for name in estimators.names()), *MORE]
every_case = pytest.mark.parametrize(("name", "kwargs"), CASES, ids=lambda v: str(v)[:60])


def cuts():
    """Every case with one of the nine cuts, in turn; one of each kind with all."""
    turns = [(*case, *CUTS[number % 9]) for number, case in enumerate(CASES)]
    return turns + [(*kind, *cut) for kind in KINDS for cut in CUTS if (*kind, *cut) not in turns]


def dense_support(student_BTV, teacher_BTV, k, source):
    """Ids and mask of the tokens compared; where both models name some, in the order of their ids."""
    best = {"student": student_BTV.argsort(descending=True), "teacher": teacher_BTV.argsort(descending=True)}
    if source in best:
        ids_BTK = best[source][..., :k]
        return ids_BTK, torch.ones_like(ids_BTK, dtype=torch.bool)
    member_BTMV = torch.zeros(2, *student_BTV.shape, dtype=torch.bool)
    for model, ids_BTV in enumerate(best.values()):
        member_BTMV[model].scatter_(-1, ids_BTV[..., :k], True)
    member_BTV = member_BTMV.any(0) if source == "union" else member_BTMV.all(0)
    ids_BTV = member_BTV.int().argsort(dim=-1, descending=True, stable=True)
    size = 2 * k if source == "union" else k
    return ids_BTV[..., :size], member_BTV.gather(-1, ids_BTV)[..., :size]


def rewards_of(rollout, tokenizer):
    texts = [tokenizer.decode(ids[mask], skip_special_tokens=True)
             for ids, mask in zip(rollout.ids_BT, rollout.real_BT, strict=True)]  # fmt: skip
    return torch.tensor([float(len(text) > 3) for text in texts])


class Dense:
    """The whole batch at once: all logits of the three models, every field filled, no chunk and no micro-batch."""

    def __init__(self, student, teacher, reference, rollout, full_logits, tokenizer):
        self.rollout, self.rewards_B = rollout, rewards_of(rollout, tokenizer)
        self.student_BTV = full_logits(student, rollout).log_softmax(-1)
        self.teacher_BTV = full_logits(teacher, rollout).log_softmax(-1).detach()
        self.reference_BTV = full_logits(reference, rollout).log_softmax(-1).detach()

    def tokens(self, estimator):
        p, q, ids_BT1 = self.student_BTV, self.teacher_BTV, self.rollout.ids_BT[..., None]
        k, fixed = estimator.support_size, p.detach()
        support, member = dense_support(fixed, q, k, estimator.support) if k else (None, None)
        return TokenBatch(
            student_logps_BT=p.gather(-1, ids_BT1)[..., 0],
            teacher_logps_BT=q.gather(-1, ids_BT1)[..., 0],
            sampler_logps_BT=self.rollout.sampler_logps_BT,
            mask_BT=self.rollout.mask_BT,
            completion_ids_BT=ids_BT1[..., 0],
            student_wrote_BT=self.rollout.student_wrote_BT,
            support_ids_BTK=support,
            support_mask_BTK=member,
            student_support_logps_BTK=p.gather(-1, support) if k else None,
            teacher_support_logps_BTK=q.gather(-1, support) if k else None,
            student_full_logps_BTV=p,
            teacher_full_logps_BTV=q,
            kl_BT=(fixed.exp() * (fixed - q)).sum(-1),
            student_entropy_BT=-(fixed.exp() * fixed).sum(-1),
            teacher_entropy_BT=-(q.exp() * q).sum(-1),
            rewards_B=self.rewards_B,
            groups_B=torch.arange(len(p)) // COMPLETIONS,
            reference_logps_BT=self.reference_BTV.gather(-1, ids_BT1)[..., 0],
            progress=PROGRESS,
        )

    def step(self, estimator, aggregation):
        """Loss and reverse KL of the step; the gradients are then the student's.

        What is right only over the student's own samples sees no demonstrations, and no KL is logged of them.
        """
        mask_BT, loss_BT, kl_BT, share = self.rollout.mask_BT, 0.0, 0.0, 0.0
        own_BT = mask_BT & self.rollout.student_wrote_BT
        for term in estimator.terms:
            seen_BT = own_BT if term.estimator.spec.on_policy else mask_BT
            estimate = term(replace(self.tokens(term.estimator), mask_BT=seen_BT))
            loss_BT = loss_BT + term.weight * torch.where(seen_BT, estimate.loss_BT, 0.0)
            kl_BT, share = kl_BT + term.weight * estimate.kl_BT, share + term.weight
        loss = reduce_naively(loss_BT, mask_BT, aggregation)
        loss.backward()
        return loss.item(), (kl_BT[own_BT].mean() / share).item()


def with_demonstrations(engine):
    """Completions of every other prompt pass for what somebody else wrote."""
    inner = engine.sample

    def sample(*args):
        rollout = inner(*args)
        return written_by(rollout, rollout.prompt_index_B % 2 == 0)

    engine.sample = sample
    return engine


def reduce_naively(loss_BT, mask_BT, aggregation):
    """The mean over all tokens, or the mean over sequences of each one's mean or sum; loops, no weights."""
    rows = [loss_T[mask_T] for loss_T, mask_T in zip(loss_BT, mask_BT, strict=True) if mask_T.any()]
    if aggregation == "token_mean":
        return torch.cat(rows).mean()
    return torch.stack([row.mean() if aggregation == "sequence_mean" else row.sum() for row in rows]).mean()


def gradients_of(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def uncounted(rollout, token_id):
    return rollout.uncount(rollout.ids_BT == token_id)


def assert_close(found, expected, tolerance):
    """Every gradient within `tolerance` of the largest expected entry."""
    scale = max(g.abs().max().item() for g in expected.values())
    assert scale > 0
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max().item() / scale
        assert error <= tolerance, f"{name}: off by {error:.1e}"


@pytest.fixture
def midway(monkeypatch):
    """Every step is one in the midst of training."""
    monkeypatch.setattr(DistillationModule, "progress", PROGRESS)


@pytest.fixture
def models(make_model):
    """Makes student, teacher and reference."""

    def make(dtype=torch.float64, **config):
        return [make_model(seed, dtype, hidden_size=size, **config) for seed, size in ((1, 16), (2, 24), (3, 8))]

    return make


@pytest.mark.usefixtures("midway")
@pytest.mark.parametrize(("name", "kwargs", "budget", "aggregation"), cuts(), ids=lambda v: str(v)[:60])
def test_loss_and_gradients_are_those_of_the_dense_reference(
    name, kwargs, budget, aggregation, models, make_module, fit, full_logits, tiny_tokenizer
):
    """In float64 to 1e-10, whatever the cut into micro-batches; off-policy; 2 to 7 prompt tokens, no "7" counted."""
    student, teacher, reference = models()
    module = make_module(copy.deepcopy(student), teacher, name, estimator_kwargs=kwargs, aggregation=aggregation,
                         masked_tokens=["7"], optim={"micro_batch_tokens": BUDGETS[budget]}, reference=reference,
                         rollout={"temperature": 0.8, "num_completions": COMPLETIONS},
                         engine=with_demonstrations(LocalEngine()))  # fmt: skip
    record = fit(module, precision="64-true")
    rollout = uncounted(record.rollouts[0], tiny_tokenizer.convert_tokens_to_ids("7"))
    assert not torch.equal(rollout.mask_BT, rollout.real_BT), "no masked token was sampled"
    dense = Dense(student, teacher, reference, rollout, full_logits, tiny_tokenizer)
    loss, kl = dense.step(module.estimator, aggregation)
    assert_close(record.gradients[0], gradients_of(student), 1e-10)
    assert record.metrics[0]["train/loss"].item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert record.metrics[0]["train/reverse_kl"].item() == pytest.approx(kl, rel=1e-5, abs=1e-6)


def step_in_fp32(name, kwargs, budget, models, make_module, fit):
    """The gradients, the rollout and the bound estimator of a step."""
    student, teacher, reference = models(torch.float32, initializer_range=0.2)
    module = make_module(student, teacher, name, estimator_kwargs=kwargs, reference=reference,
                         optim={"micro_batch_tokens": BUDGETS[budget]}, rollout={"num_completions": COMPLETIONS},
                         engine=with_demonstrations(LocalEngine()))  # fmt: skip
    record = fit(module)
    return record.gradients[0], record.rollouts[0], module.estimator


CASES_IN_FP32 = [(*case, list(BUDGETS)[number % 3]) for number, case in enumerate(CASES)]


@pytest.mark.usefixtures("midway")
@pytest.mark.parametrize(("name", "kwargs", "budget"), CASES_IN_FP32, ids=lambda v: str(v)[:60])
def test_in_fp32_a_step_is_the_dense_one_in_float64(
    name, kwargs, budget, models, make_module, fit, full_logits, tiny_tokenizer
):
    found, rollout, estimator = step_in_fp32(name, kwargs, budget, models, make_module, fit)
    student, *others = (model.double() for model in models(torch.float32, initializer_range=0.2))
    Dense(student, *others, rollout, full_logits, tiny_tokenizer).step(estimator, "token_mean")
    assert_close(found, {n: g.float() for n, g in gradients_of(student).items()}, 1e-5)


@pytest.mark.parametrize(("name", "kwargs"), KINDS, ids=lambda v: str(v)[:60])
def test_in_fp32_the_cut_changes_only_the_rounding(name, kwargs, models, make_module, fit):
    whole, *cut = (step_in_fp32(name, kwargs, budget, models, make_module, fit)[0] for budget in BUDGETS)
    for gradients in cut:
        assert_close(gradients, whole, 2e-6)


@pytest.mark.usefixtures("midway")
@pytest.mark.parametrize(("name", "first"), [("full_vocab", 8), ("leave_one_out", 9)])
def test_two_updates_a_rollout_are_two_steps_on_its_two_halves(
    name, first, models, make_module, fit, full_logits, tiny_tokenizer
):
    """Of 5 prompts with 3 completions: 8 and 7 rows, or whole prompts; the second with the weights the first left."""
    student, teacher, reference = models()
    record = fit(make_module(copy.deepcopy(student), teacher, name, optim={"updates_per_rollout": 2, "lr": 0.01},
                             rollout={"num_completions": COMPLETIONS}, engine=with_demonstrations(LocalEngine())),
                 2, precision="64-true")  # fmt: skip
    assert len(record.rollouts) == 1
    assert len(record.gradients) == 2
    for update, rows in enumerate(torch.arange(len(record.rollouts[0])).split([first, 15 - first])):
        student.load_state_dict(record.weights[update])
        student.zero_grad()
        dense = Dense(student, teacher, reference, record.rollouts[0].rows(rows), full_logits, tiny_tokenizer)
        dense.step(estimators.build(name), "token_mean")
        assert_close(record.gradients[update], gradients_of(student), 1e-10)
    assert not torch.equal(record.weights[0]["lm_head.weight"], record.weights[1]["lm_head.weight"])


@pytest.mark.parametrize(
    ("name", "done"), [("full_vocab", [True, False, True, False]), ("leave_one_out", [True, False, False, False])]
)
def test_more_updates_than_rows_leave_nothing_undone(name, done, make_model, make_module, fit, make_data):
    """A process may have fewer rows, or prompts, than updates; the others wait for it."""
    module = make_module(make_model(1), make_model(2), name, optim={"updates_per_rollout": 4})
    record = fit(module, 4, make_data(["7="]))
    assert [bool(g["lm_head.weight"].any()) for g in record.gradients] == done


@every_case
def test_a_rollout_without_counted_tokens_gives_zero_gradient(name, kwargs, make_model, make_module, fit):
    module = make_module(make_model(1), make_model(2), name, estimator_kwargs=kwargs, masked_tokens=list(range(17)))
    record = fit(module)
    assert not any(g.any() for g in record.gradients[0].values())
    assert record.metrics[0]["train/loss"] == 0
    assert record.metrics[0]["train/reverse_kl"].isnan(), "a mean over nothing"


def test_the_logged_numbers_of_a_step(make_model, make_module, fit, full_logits):
    student, teacher = make_model(1, torch.float64), make_model(2, torch.float64)
    record = fit(make_module(copy.deepcopy(student), teacher, optim={"micro_batch_tokens": 40}), precision="64-true")
    rollout, logged = record.rollouts[0], {k: v.item() for k, v in record.metrics[0].items()}
    mask = rollout.mask_BT
    p, q = (full_logits(m, rollout).log_softmax(-1)[mask].detach() for m in (student, teacher))
    assert logged["train/reverse_kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-5)
    taken = p.gather(-1, rollout.ids_BT[mask][:, None])
    assert logged["train/entropy"] == pytest.approx(-taken.mean().item(), rel=1e-5)
    norms = torch.stack([g.norm() for g in record.gradients[0].values()])
    assert logged["train/grad_norm"] == pytest.approx(norms.norm().item(), rel=1e-5)
    assert logged["rollout/sampler_gap"] == pytest.approx(0, abs=1e-6)
    lengths = mask.sum(1)
    stopped = (rollout.ids_BT == 2).any(1)
    assert logged["rollout/length"] == pytest.approx(lengths.double().mean().item())
    assert logged["rollout/eos_frac"] == pytest.approx(stopped.double().mean().item())
    assert logged["rollout/truncated_frac"] == pytest.approx(1 - stopped.double().mean().item())
    phases = sum(logged[f"perf/{name}"] for name in ("rollout_s", "teacher_s", "student_s"))
    assert logged["perf/step_s"] == pytest.approx(phases, rel=1e-3)
    assert logged["perf/peak_memory_mb"] > 50
