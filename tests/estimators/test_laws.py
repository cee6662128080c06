"""The laws that every registered estimator passes, whoever wrote it.

Each registered name is tested with its defaults and with the variants it was registered with.
"""

import inspect
from dataclasses import fields, replace
from typing import NamedTuple

import pytest
import torch

from lit_opd import estimators
from lit_opd.errors import UserError
from lit_opd.estimators.oracle import TARGETS, TabularPair, verify
from lit_opd.types import TokenBatch

VOCABULARY, SUPPORT = 4, 2


class Case(NamedTuple):
    """An estimator with the keywords of one of its variants, on a support that fits the small vocabulary."""

    name: str
    keywords: dict

    def build(self):
        spec = estimators.get(self.name)
        kwargs = ({"k": SUPPORT} if spec.needs.startswith("support") else {}) | dict(self.keywords)
        try:
            return estimators.build(self.name, **kwargs)
        except UserError as error:
            pytest.fail(f"{error} {self.name!r} cannot be built from its defaults: register it with `variants`.")

    def __str__(self):
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.keywords.items())])


def needs_keywords(name):
    parameters = inspect.signature(estimators.get(name).fn).parameters.values()
    return any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)


def cases():
    found = []
    for name in estimators.names():
        variants = [Case(name, variant.keywords) for variant in estimators.get(name).variants]
        found += variants if variants and needs_keywords(name) else [Case(name, {}), *variants]
    return found


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
    support_mask_BTK = torch.rand(3, 5, SUPPORT, generator=generator) > 0.2
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
        "student_entropy_BT": -(student_BTV.exp() * student_BTV).sum(-1),
        "teacher_entropy_BT": -(teacher_BTV.exp() * teacher_BTV).sum(-1),
        "rewards_B": torch.tensor([1.0, 0.0, 0.5]).double(),
        "reference_logps_BT": student_BT - 0.1,
    }
    return TokenBatch(
        mask_BT=mask_BT, completion_ids_BT=ids_BT1.squeeze(-1), support_ids_BTK=support_BTK,
        support_mask_BTK=support_mask_BTK, groups_B=torch.tensor([4, 4, 7]), progress=0.25,
        **{k: v.to(dtype) for k, v in values.items()},
    )  # fmt: skip


def tensors(tokens):
    return {f.name: value for f in fields(tokens) if isinstance(value := getattr(tokens, f.name), torch.Tensor)}


def student_leaves(tokens):
    """The same batch with fresh student leaves, and these leaves."""
    values = {name: value for name, value in tensors(tokens).items()
              if name.startswith("student_") and "entropy" not in name}  # fmt: skip
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
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

    spoilt = {name: value for name, value in tensors(tokens).items() if name.startswith(prefixes) and value.dim() > 1}
    return replace(tokens, **{name: spoil(value) for name, value in spoilt.items()})


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
    fields_with_values = ("student", "teacher", "sampler", "kl", "reference")  # of logps, entropies and all
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
    for term in case.build().terms:
        if not term.is_local:
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
    raised = replace(low, **{name: value.float() for name, value in tensors(low).items()
                             if value.dtype == torch.bfloat16})  # fmt: skip
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
    before = {name: value.clone() for name, value in tensors(tokens).items()}
    loss_and_gradients(case.build(), tokens)
    assert all(torch.equal(getattr(tokens, name), value) for name, value in before.items())


@every_case
def test_per_position_estimators_commute_with_slicing(case):
    """Any slice of flattened counted positions gives what these positions give inside the batch."""
    for term in (term.estimator for term in case.build().terms):
        if term.spec.family == "token":
            tokens = token_batch()
            per_position = {name: value[tokens.mask_BT] for name, value in tensors(tokens).items()
                            if not name.endswith("_B")}  # fmt: skip
            flat = TokenBatch(**per_position, progress=tokens.progress)
            whole = term(tokens)
            for part in (slice(None), slice(0, 3), slice(3, None), slice(0, 0)):
                sliced = {name: value[part] for name, value in per_position.items()}
                estimate = term(TokenBatch(**sliced, progress=tokens.progress))
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
    target, unbiased, _ = estimator.contract
    if target is None:
        assert not unbiased, "unbiased for what?"
        return
    assert target in TARGETS, f"teach lit_opd.estimators.oracle the exact gradient of {target!r}"
    pair = TabularPair.random(VOCABULARY, horizon, seed=1, stop=stop)
    bias = verify(estimator, pair, target).relative_bias
    if unbiased:
        assert bias < 1e-12
    elif horizon > 1 or target != "sequence_reverse_kl":  # with one position there is no later credit to discount
        assert bias > 1e-6


@every_case
@pytest.mark.parametrize("stop", [False, True], ids=["fixed-length", "with-stop-token"])
def test_gradient_where_student_equals_teacher(case, stop):
    estimator = case.build()
    verdict = verify(estimator, TabularPair.random(VOCABULARY, 3, seed=2, stop=stop))
    assert (verdict.norm_at_equal < 1e-14) == (estimator.contract.at_equal != "never")
    assert (verdict.rms_at_equal < 1e-14) == (estimator.contract.at_equal == "sample")


def test_an_estimator_without_usable_defaults_asks_for_a_row():
    with pytest.raises(pytest.fail.Exception, match="register it with `variants`"):
        Case("mix", {}).build()


def test_mix_is_the_weighted_sum_of_its_terms():
    tokens = token_batch()
    mixed = estimators.build("mix", terms={"sequence": 1, "full_vocab": {"weight": 0.5, "divergence": "forward_kl"}})(
        tokens
    )
    parts = [estimators.build("sequence")(tokens), estimators.build("full_vocab", divergence="forward_kl")(tokens)]
    assert_equal_up_to_rounding(mixed.loss_BT, parts[0].loss_BT + 0.5 * parts[1].loss_BT)
    assert_equal_up_to_rounding(mixed.kl_BT, (parts[0].kl_BT + 0.5 * parts[1].kl_BT) / 1.5)
