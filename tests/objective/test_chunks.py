"""The fused head against the plain one in float64: the loss, every value that is logged, and both gradients."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from references import made, rollout_from
from torch.utils._python_dispatch import TorchDispatchMode

from lit_opd import estimators
from lit_opd.estimators import registry
from lit_opd.functional import Head, HiddenDistributions
from lit_opd.objective import CountedPositions
from lit_opd.objective import chunks as chunks_module
from lit_opd.objective.chunks import why_plain
from lit_opd.objective.loss import head_loss
from lit_opd.teachers import wanted_by
from lit_opd.types import Estimate, SamplingLaw, ScoredRollout, Scores, TokenBatch

kernels = pytest.importorskip("lit_opd.kernels.head_rows", reason="it needs triton")

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's: numpy computes masked lanes too
]

VOCABULARY, WIDTH, TEACHER_WIDTH = 21, 4, 6
# Seven positions, in chunks of four and three: interpreted, a kernel takes its time for each.
MASK = [[1, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", 16)
    monkeypatch.setattr(chunks_module, "fused_rows", lambda rows, vocabulary: rows)


def scene(estimator, dtype, demonstrated=False, own=None, whole=None):
    """Hidden states, a head, a scored micro-batch of two prompts with two completions each, and weights."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask_BT = torch.tensor(MASK, dtype=torch.bool)
    count, ids_BT = int(mask_BT.sum()), torch.randint(VOCABULARY, mask_BT.shape, generator=generator)
    hidden_NH, weight_VH = normal(count, WIDTH).requires_grad_(), normal(VOCABULARY, WIDTH).requires_grad_()
    head = Head(weight_VH, normal(VOCABULARY).requires_grad_(), **(own or {}))
    teacher = HiddenDistributions(normal(count, TEACHER_WIDTH), Head(normal(VOCABULARY, TEACHER_WIDTH), scale=0.5), 3)
    prompts_B1, ones = torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1, dtype=torch.bool)
    rollout = rollout_from(
        prompts_B1, ones, ids_BT, torch.ones_like(mask_BT), mask_BT, -2 + 0.1 * normal(*mask_BT.shape), torch.zeros(4),
        SamplingLaw(), torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, True, not demonstrated]),
    )  # fmt: skip
    rollout = replace(rollout, rewards_B=torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=dtype))
    scores = {"teacher": scores_of(estimator, teacher, ids_BT[mask_BT], whole), "reference": Scores(normal(count) - 2)}
    micro = ScoredRollout(rollout, scores, progress=0.25)
    return hidden_NH, head, micro, mask_BT.to(dtype) / 10


def scores_of(estimator, teacher, ids_N, whole=None):
    """What the estimator asks a teacher for, and no more."""
    wanted = wanted_by(estimator)
    if wanted.full if whole is None else whole:
        return Scores(full=teacher)
    logps_NV = teacher.logps(slice(0, len(teacher)))
    support = logps_NV.topk(wanted.support, dim=-1) if wanted.support else None
    logps_N = logps_NV.gather(-1, ids_N[:, None]).squeeze(-1)
    return Scores(logps_N, *((None, None) if support is None else (support.indices, support.values)))


def computed(estimator, dtype, fused, rows=4, **keywords):
    hidden_NH, head, micro, weights_BT = scene(estimator, dtype, **keywords)
    loss, stats, _ = head_loss(hidden_NH, head, micro, estimator, weights_BT, rows, fused)
    gradients = torch.autograd.grad(loss, (hidden_NH, head.weight_VH, head.bias_V))
    return {"loss": loss.detach(), **stats, **dict(zip(("hidden", "weight", "bias"), gradients, strict=True))}


def assert_same(estimator, **keywords):
    found, expected = (
        computed(estimator, torch.float32, True, **keywords),
        computed(estimator, torch.float64, False, **keywords),
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32, name
        torch.testing.assert_close(
            found[name].double(), value.double(), rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.fixture
def launched(monkeypatch):
    """Counts the kernels that ran, so that no test compares the plain path with itself."""
    seen = []
    launch = kernels._launch
    monkeypatch.setattr(
        kernels, "_launch", lambda kernel, *args, **kw: (seen.append(kernel), launch(kernel, *args, **kw))
    )
    return seen


PLAIN = {"adaptive_kl", "logit_matching", "taid", "todi", "veto"}
FUSED = [name for name in registry.names() if name not in PLAIN and name != "mix" and ":" not in name]
KEYWORDS = [
    ("full_vocab", {"divergence": "forward_kl"}),
    ("full_vocab", {"divergence": "jsd", "teacher_weight": 0.3}),
    ("full_vocab", {"divergence": "jsd", "teacher_weight": 1}),
    ("full_vocab", {"divergence": "jsd", "teacher_weight": 0}),
    *(
        ("full_vocab", {"divergence": name, "skew": skew})
        for name in ("skew_reverse_kl", "skew_forward_kl")
        for skew in (0.3, 0)
    ),
    ("full_vocab", {"divergence": "tvd"}),
    *(("mixed_kl", {"forward_weight": weight}) for weight in (0, 0.3, 1)),
    ("mix", {"terms": {"full_vocab": 1.0, "token": 0.5, "teacher_topk": {"weight": 0.5, "k": 3}}}),
    ("mix", {"terms": {"full_vocab": {"weight": 1.0, "divergence": "jsd"}, "sequence": 0.5}}),
    *(("topk_divergence", {"k": 3, "support": support}) for support in ("student", "union", "intersection")),
    ("prefix_opd", {"horizon": 2, "base": {"name": "teacher_topk", "k": 3}}),
]


@pytest.mark.parametrize(("name", "keywords"), [*((name, {}) for name in FUSED), *KEYWORDS])
def test_a_fused_head_computes_what_the_plain_one_does(name, keywords, launched):
    small = dict(estimators.get(name).small)
    if "k" in estimators.get(name).defaults:
        small["k"] = 3
    estimator = estimators.build(name, **(small | keywords))
    assert why_plain(estimator) is None
    assert_same(estimator, demonstrated=not estimator.needs & {"rewards", "groups"})
    assert kernels._write in launched


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_a_formula_over_the_vocabulary_without_a_kernel_takes_the_plain_path(name, launched):
    estimator = estimators.build(name)
    assert why_plain(estimator) == f"{name} sees the whole vocabulary by a formula without a kernel"
    assert_same(estimator)
    assert not launched


def test_every_estimator_is_fused_or_says_why_not():
    said = {name: why_plain(estimators.build(name)) for name in registry.names() if name != "mix" and ":" not in name}
    assert {name for name, reason in said.items() if reason} == PLAIN
    told = (Path(__file__).parents[2] / "docs/speed.md").read_text()
    assert all(f"`{name}`" in told for name in PLAIN)
    both = {"full_vocab": 1.0, "todi": 1.0}
    assert why_plain(estimators.build("mix", terms=both)).startswith("todi sees")
    two = [{"name": "full_vocab", "weight": 1.0, "kwargs": {"divergence": name}} for name in ("jsd", "forward_kl")]
    assert (
        why_plain(estimators.build("mix", terms=two)) == "its terms have several divergences over the whole vocabulary"
    )
    same = [{"name": "full_vocab", "weight": weight} for weight in (1.0, 0.5)]
    assert_same(estimators.build("mix", terms=same))


def test_what_a_micro_batch_holds_may_keep_the_plain_path(launched):
    estimator = estimators.build("full_vocab")
    _, _, micro, _ = scene(estimator, torch.float32)
    positions = CountedPositions.of(micro)
    assert why_plain(estimator, positions) is None
    assert "merged_stops" in why_plain(estimator, replace(positions, merged=((1, 2),)))
    assert "put together" in why_plain(estimator, replace(positions, teacher=Scores(full=object())))
    assert "float32" in why_plain(estimator, positions, torch.float64)
    computed(estimator, torch.float64, True)
    assert not launched


@pytest.mark.parametrize("own", [{"scale": 0.5}, {"softcap": 2.0}, {"scale": 2.0, "softcap": 3.0, "temperature": 0.7}])
@pytest.mark.parametrize("name", ["full_vocab", "teacher_topk"])
def test_the_shape_of_the_head_is_differentiated(name, own):
    assert_same(estimators.build(name), own=own)


@pytest.mark.parametrize("rows", [1, 13, 100])
def test_chunks_change_nothing(rows):
    assert_same(estimators.build("mix", terms={"full_vocab": 1.0, "token": 0.5}), rows=rows)


def test_a_users_own_function_is_asked_as_it_is(launched):
    def squared(tokens: TokenBatch) -> Estimate:
        gap = tokens.student_logps_BT - tokens.teacher_logps_BT
        return Estimate(gap.square() * tokens.student_entropy_BT, gap.detach())

    assert_same(made(squared, "token+entropy"))
    assert kernels._write in launched

    def whole(tokens: TokenBatch) -> Estimate:
        gap = tokens.student_full_logps_BTV - tokens.teacher_full_logps_BTV
        return Estimate(gap.square().mean(-1), gap.mean(-1).detach())

    assert "without a kernel" in why_plain(made(whole, "full"))


def test_without_gradients_only_values_are_computed(launched):
    estimator = estimators.build("full_vocab")
    hidden_NH, head, micro, weights_BT = scene(estimator, torch.float32)
    with torch.no_grad():
        loss = head_loss(hidden_NH, head, micro, estimator, weights_BT, 4, True)
    assert not loss.value.requires_grad
    assert kernels._write not in launched
    assert torch.equal(loss.value, computed(estimator, torch.float32, True)["loss"])


def test_nothing_counted_gives_nothing(launched):
    estimator = estimators.build("full_vocab")
    hidden_NH, head, micro, weights_BT = scene(estimator, torch.float32)
    rollout = micro.rollout.uncount(micro.rollout.mask_BT)
    empty = micro._replace(rollout=rollout, scores={name: scores[:0] for name, scores in micro.scores.items()})
    loss, stats, _ = head_loss(hidden_NH[:0], head, empty, estimator, weights_BT, 4, True)
    assert loss.item() == 0
    assert {len(values) for values in stats.values()} == {0}
    loss.backward()
    assert not head.weight_VH.grad.any()


def test_a_frozen_head_gets_no_gradient():
    estimator = estimators.build("full_vocab")
    hidden_NH, head, micro, weights_BT = scene(estimator, torch.float32)
    loss = head_loss(hidden_NH, head.detach(), micro, estimator, weights_BT, 4, True)
    loss.value.backward()
    expected = computed(estimator, torch.float64, False)["hidden"]
    torch.testing.assert_close(hidden_NH.grad.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["full_vocab", "token", "teacher_topk"])
def test_under_autocast_gradients_are_those_of_the_plain_path_up_to_rounding(name):
    """Interpreted, numbers are cut to bf16: a whole unit of the last of 8 bits, which is half of one on average."""
    estimator = estimators.build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (computed(estimator, torch.float32, fused) for fused in (True, False))
    for name, value in expected.items():
        bound = 2**-7 if name in ("hidden", "weight", "bias") else 1e-5
        assert (found[name] - value).norm() <= bound * value.norm(), name


class Waits(TorchDispatchMode):
    """Collects what makes the host wait for an accelerator: results whose size or value it must know."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::")
        masks = (
            name.startswith("index")
            and any(x.dtype == torch.bool for x in args[1] if x is not None and not isinstance(x, int))
            if len(args) > 1 and isinstance(args[1], list | tuple)
            else False
        )
        if masks or name.split(".")[0].startswith(self.NAMES):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_what_makes_a_host_wait_is_noticed():
    values, mask = torch.arange(3.0), torch.tensor([True, False, True])
    for wait in (lambda: values[mask], lambda: bool(mask.any()), lambda: float(values[0]), mask.nonzero,
                 lambda: values.masked_select(mask)):  # fmt: skip
        with Waits() as noticed:
            wait()
        assert noticed.seen
    with Waits() as noticed:
        values[torch.tensor([0, 2])].sum()
    assert not noticed.seen


@pytest.mark.parametrize("fused", [False, True])
def test_an_accelerator_makes_the_host_wait_nowhere(fused):
    """But when a rollout is counted, which happens once, before the first forward pass."""
    for name in FUSED if not fused else ("full_vocab", "sequence", "teacher_topk"):
        estimator = estimators.build(name, **estimators.get(name).small)
        demonstrated = not estimator.needs & {"rewards", "groups"}
        hidden_NH, head, micro, weights_BT = scene(estimator, torch.float32, demonstrated=demonstrated)
        micro.rollout.count()
        with Waits() as noticed:
            head_loss(hidden_NH, head, micro, estimator, weights_BT, 4, fused).value.backward()
        assert not noticed.seen, name
