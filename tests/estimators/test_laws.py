"""The laws that every registered estimator passes, whoever wrote it.

Each registered name is tested with its defaults; TABLE adds hyper-parameters that deserve a row, and says where and why
an estimator departs from what is expected of it.
"""

import inspect
from dataclasses import dataclass, field, fields, replace

import pytest
import torch

from lit_opd import estimators
from lit_opd.errors import UserError
from lit_opd.estimators.oracle import TARGETS, TabularPair, verify
from lit_opd.types import TokenBatch

VOCABULARY, SUPPORT = 4, 2


@dataclass(frozen=True)
class Case:
    """An estimator with hyper-parameters, and what differs from the contract it was registered with.

    `target`, `unbiased`: None where the declaration holds. `at_equal`: where student == teacher, the gradient is zero
    for every "sample", only in "expectation", or "never".
    """

    name: str
    kwargs: dict = field(default_factory=dict)
    target: str | None = None
    unbiased: bool | None = None
    at_equal: str = "sample"
    reason: str = "the defaults"

    def build(self):
        spec = estimators.get(self.name)
        # The default support (16) is larger than the vocabulary here.
        kwargs = ({"k": SUPPORT} if spec.needs.startswith("support") else {}) | self.kwargs
        try:
            return estimators.build(self.name, **kwargs)
        except UserError as error:
            pytest.fail(f"{error} If {self.name!r} cannot be built from its defaults, add a row with keywords that "
                        "work to TABLE in tests/estimators/test_laws.py.")  # fmt: skip

    def __str__(self):
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.kwargs.items())])


MIXED = {"sequence": 1.0, "full_vocab": {"weight": 0.5, "divergence": "forward_kl"}}
TABLE = [
    Case("hybrid", {"gamma": 1.0}, unbiased=True, reason="undiscounted, it is the sequence estimator"),
    Case("hybrid", {"gamma": 0.0}, target="reverse_kl", unbiased=True, reason="it is the token estimator"),
    Case("full_vocab", {"divergence": "forward_kl"}, target="forward_kl", reason="the target is the chosen one"),
    Case("full_vocab", {"divergence": "jsd"}, target="jsd", reason="the target is the chosen one"),
    Case("full_vocab", {"divergence": "jsd", "teacher_weight": 0.1}, target="jsd", reason="lopsided mixture"),
    Case("teacher_topk", {"k": VOCABULARY}, unbiased=True, reason="on the whole vocabulary nothing is left out"),
    Case("mix", {"terms": MIXED}, reason="has no default terms; this one has a target of its own"),
    Case("mix", {"terms": {"token": 0.25, "full_vocab": 0.75}}, target="reverse_kl", unbiased=True,
         reason="a convex combination of estimators of the same target"),
    Case("mix", {"terms": {"token": 1.0, "teacher_topk": {"weight": 1.0, "k": SUPPORT}}}, reason="every need but one"),
]  # fmt: skip


def needs_keywords(name):
    parameters = inspect.signature(estimators.get(name).fn).parameters.values()
    return any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)


def cases():
    listed = {case.name for case in TABLE}
    return [Case(name) for name in estimators.names() if name not in listed or not needs_keywords(name)] + TABLE


def assert_equal_up_to_rounding(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


every_case = pytest.mark.parametrize("case", cases(), ids=str)


def token_batch(dtype=torch.float64, seed=0):
    """A [3, 5] batch with every field filled; the mask has holes (tool output) as well as padding."""
    generator = torch.Generator().manual_seed(seed)
    mask_BT = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    student_BTV, teacher_BTV = torch.randn(2, 3, 5, VOCABULARY, generator=generator).double().log_softmax(-1)
    ids_BT1 = torch.randint(VOCABULARY, (3, 5, 1), generator=generator)
    support_BTK = teacher_BTV.topk(SUPPORT, dim=-1).indices
    student_BT = student_BTV.gather(-1, ids_BT1).squeeze(-1)
    values = {
        "student_logps_BT": student_BT,
        "teacher_logps_BT": teacher_BTV.gather(-1, ids_BT1).squeeze(-1),
        "sampler_logps_BT": student_BT + 0.01,
        "student_support_logps_BTK": student_BTV.gather(-1, support_BTK),
        "teacher_support_logps_BTK": teacher_BTV.gather(-1, support_BTK),
        "student_full_logps_BTV": student_BTV,
        "teacher_full_logps_BTV": teacher_BTV,
        "kl_BT": (student_BTV.exp() * (student_BTV - teacher_BTV)).sum(-1),
        "rewards_B": torch.tensor([1.0, 0.0, 0.5]).double(),
        "reference_logps_BT": student_BT - 0.1,
    }
    return TokenBatch(mask_BT=mask_BT, support_ids_BTK=support_BTK, **{k: v.to(dtype) for k, v in values.items()})


def student_leaves(tokens):
    """The same batch with fresh student leaves, and these leaves."""
    names = [f.name for f in fields(tokens) if f.name.startswith("student_")]
    leaves = {name: getattr(tokens, name).detach().clone().requires_grad_() for name in names}
    return replace(tokens, **leaves), leaves


def loss_and_gradients(estimator, tokens):
    """The masked sum, as the module forms it, and its gradient on every student value (zeros where unused)."""
    tokens, leaves = student_leaves(tokens)
    loss = torch.where(tokens.mask_BT, estimator(tokens).loss_BT, 0.0).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, gradients, strict=True))


def with_garbage(tokens, garbage, prefixes):
    """The batch with other values at masked positions of the fields whose name starts with one of `prefixes`."""

    def spoil(value):
        mask = tokens.mask_BT.reshape(tokens.mask_BT.shape + (1,) * (value.dim() - 2))
        return torch.where(mask, value, garbage(value))

    spoilt = [f.name for f in fields(tokens) if f.name.startswith(prefixes) and getattr(tokens, f.name).dim() > 1]
    return replace(tokens, **{name: spoil(getattr(tokens, name)) for name in spoilt})


def assert_same_and_zero_where_masked(estimator, clean, dirty):
    loss, gradients = loss_and_gradients(estimator, clean)
    dirty_loss, dirty_gradients = loss_and_gradients(estimator, dirty)
    assert_equal_up_to_rounding(dirty_loss, loss)
    for name, gradient in gradients.items():
        assert_equal_up_to_rounding(dirty_gradients[name], gradient)
        assert (dirty_gradients[name][~clean.mask_BT] == 0).all(), name


@every_case
def test_finite_garbage_where_masked_has_no_effect(case):
    """Loss and every gradient stay the same, whichever field holds the garbage."""
    clean, generator = token_batch(), torch.Generator().manual_seed(3)
    fields_with_values = ("student", "teacher", "sampler", "kl", "reference")
    dirty = with_garbage(clean, lambda x: 100 * torch.randn(x.shape, generator=generator, dtype=x.dtype),
                         fields_with_values)  # fmt: skip
    assert_same_and_zero_where_masked(case.build(), clean, dirty)


@every_case
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_teacher_values_where_masked_have_no_effect(case, garbage):
    """A teacher gives -inf, or anything, at a position it could not score.

    The law is for what sees [B, T]: per-position estimators are called on counted positions only, and the
    per-position terms of a mix likewise.
    """
    for _, term in case.build().terms:
        if term.spec.family != "token":
            clean = token_batch()
            dirty = with_garbage(clean, lambda x: torch.full_like(x, garbage), ("teacher_logps",))
            assert_same_and_zero_where_masked(term, clean, dirty)


@every_case
def test_all_masked_gives_zero(case):
    tokens = replace(token_batch(), mask_BT=torch.zeros(3, 5, dtype=torch.bool))
    loss, gradients = loss_and_gradients(case.build(), tokens)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in gradients.values())


@every_case
def test_float64_stays(case):
    estimate = case.build()(token_batch(torch.float64))
    assert estimate.loss_BT.dtype == estimate.kl_BT.dtype == torch.float64


@every_case
def test_bf16_is_raised_to_fp32_before_any_maths(case):
    low = token_batch(torch.bfloat16)
    raised = replace(low, **{f.name: value.float() for f in fields(low)
                             if (value := getattr(low, f.name)).dtype == torch.bfloat16})  # fmt: skip
    estimate, expected = case.build()(low), case.build()(raised)
    assert estimate.loss_BT.dtype == estimate.kl_BT.dtype == torch.float32
    assert torch.equal(estimate.loss_BT, expected.loss_BT)
    assert torch.equal(estimate.kl_BT, expected.kl_BT)


@every_case
def test_one_value_a_position_and_only_the_loss_carries_grad(case):
    tokens, _ = student_leaves(token_batch())
    estimate = case.build()(tokens)
    assert estimate.loss_BT.shape == estimate.kl_BT.shape == tokens.mask_BT.shape
    assert estimate.loss_BT.requires_grad
    assert not estimate.kl_BT.requires_grad


@every_case
def test_inputs_are_left_alone(case):
    tokens = token_batch()
    before = {f.name: getattr(tokens, f.name).clone() for f in fields(tokens)}
    loss_and_gradients(case.build(), tokens)
    assert all(torch.equal(getattr(tokens, name), value) for name, value in before.items())


@every_case
def test_per_position_estimators_commute_with_slicing(case):
    """Any slice of flattened counted positions gives what these positions give inside the batch."""
    for _, term in case.build().terms:
        if term.spec.family == "token":
            tokens = token_batch()
            per_position = {f.name: getattr(tokens, f.name)[tokens.mask_BT] for f in fields(tokens)
                            if f.name != "rewards_B"}  # fmt: skip
            flat = TokenBatch(**per_position)
            whole = term(tokens)
            for part in (slice(None), slice(0, 3), slice(3, None), slice(0, 0)):
                estimate = term(TokenBatch(**{name: value[part] for name, value in per_position.items()}))
                assert_equal_up_to_rounding(estimate.loss_BT, whole.loss_BT[tokens.mask_BT][part])
                assert_equal_up_to_rounding(estimate.kl_BT, whole.kl_BT[tokens.mask_BT][part])
            _, gradients = loss_and_gradients(term, tokens)
            _, flat_gradients = loss_and_gradients(term, flat)
            for name, gradient in gradients.items():
                assert_equal_up_to_rounding(flat_gradients[name], gradient[tokens.mask_BT])


@every_case
@pytest.mark.parametrize("stop", [False, True], ids=["fixed-length", "with-stop-token"])
@pytest.mark.parametrize("horizon", [1, 3])
def test_declared_bias_holds_in_both_directions(case, horizon, stop):
    """Declared unbiased: equal to the target's gradient. Declared biased: provably different from it."""
    estimator = case.build()
    target = case.target or estimator.spec.target
    if target is None:
        assert not estimator.spec.unbiased, "unbiased for what?"
        return
    assert target in TARGETS, f"teach lit_opd.estimators.oracle the exact gradient of {target!r}"
    pair = TabularPair.random(VOCABULARY, horizon, seed=1, stop=stop)
    bias = verify(estimator, pair, target).relative_bias
    if estimator.spec.unbiased if case.unbiased is None else case.unbiased:
        assert bias < 1e-12
    elif horizon > 1 or target != "sequence_reverse_kl":  # with one position there is no later credit to discount
        assert bias > 1e-6


@every_case
@pytest.mark.parametrize("stop", [False, True], ids=["fixed-length", "with-stop-token"])
def test_gradient_where_student_equals_teacher(case, stop):
    verdict = verify(case.build(), TabularPair.random(VOCABULARY, 3, seed=2, stop=stop))
    assert (verdict.norm_at_equal < 1e-14) == (case.at_equal != "never")
    assert (verdict.rms_at_equal < 1e-14) == (case.at_equal == "sample")


def test_an_estimator_without_usable_defaults_asks_for_a_row():
    with pytest.raises(pytest.fail.Exception, match="add a row"):
        Case("mix").build()


def test_mix_is_the_weighted_sum_of_its_terms():
    tokens = token_batch()
    mixed = estimators.build("mix", terms=MIXED)(tokens)
    parts = [estimators.build("sequence")(tokens), estimators.build("full_vocab", divergence="forward_kl")(tokens)]
    assert_equal_up_to_rounding(mixed.loss_BT, parts[0].loss_BT + 0.5 * parts[1].loss_BT)
    assert_equal_up_to_rounding(mixed.kl_BT, (parts[0].kl_BT + 0.5 * parts[1].kl_BT) / 1.5)
