"""The fused head on a card: against the plain one, in time against the products, and in memory."""

import time

import pytest
import torch
from references import rollout_from

from lit_opd import estimators
from lit_opd.functional import Head, HiddenDistributions, chunk_rows
from lit_opd.functional.head_gradients import adds_wide
from lit_opd.objective.chunks import why_plain
from lit_opd.objective.loss import head_loss
from lit_opd.types import SamplingLaw, ScoredRollout, Scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device"),
]
VOCABULARY = 151_936
SHAPES = [(1024, 2048), (2048, 4096), (4096, 4096)]
ESTIMATORS = [
    ("full_vocab", {}),
    ("full_vocab", {"divergence": "forward_kl"}),
    ("full_vocab", {"divergence": "jsd", "teacher_weight": 0.3}),
    ("token", {}),
    ("sequence", {}),
    ("student_topk", {}),
    ("entropy_aware", {}),
]


def scene(positions, vocabulary, width, teacher_width, dtype, teacher_dtype=torch.bfloat16):
    """One completion of N tokens, both models' hidden states and heads; logits have a standard deviation of about 2."""
    torch.manual_seed(0)

    def normal(*shape, std=1.0, dtype=dtype):
        return (std * torch.randn(*shape, device="cuda")).to(dtype)

    hidden_NH = normal(positions, width).requires_grad_()
    head = Head(normal(vocabulary, width, std=2 * width**-0.5).requires_grad_())
    teacher_VG = normal(vocabulary, teacher_width, std=2 * teacher_width**-0.5, dtype=teacher_dtype)
    teacher = HiddenDistributions(normal(positions, teacher_width, dtype=teacher_dtype), Head(teacher_VG), 128)
    ids_BT = torch.randint(vocabulary, (1, positions), device="cuda")
    ones_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    rollout = rollout_from(
        ids_BT[:, :1], ones_BT[:, :1], ids_BT, ones_BT, ones_BT, torch.full(ids_BT.shape, -3.0, device="cuda"),
        torch.zeros(1, device="cuda"), SamplingLaw(), torch.zeros(1, dtype=torch.long, device="cuda"),
    )  # fmt: skip
    rollout = type(rollout)(**{**vars(rollout), "author_BT": rollout.author_BT.cuda()})
    return hidden_NH, head, ScoredRollout(rollout, {"teacher": Scores(full=teacher)})


def computed(estimator, inputs, fused, rows, precision):
    hidden_NH, head, micro = inputs
    weights_BT = torch.full_like(micro.rollout.sampler_logps_BT, 1 / micro.rollout.ids_BT.numel())
    with torch.autocast("cuda", precision, enabled=precision != torch.float32):
        loss, stats, _ = head_loss(hidden_NH, head, micro, estimator, weights_BT, rows, fused)
    gradients = torch.autograd.grad(loss, (hidden_NH, head.weight_VH))
    return {"loss": loss.detach(), **stats, **dict(zip(("hidden", "weight"), gradients, strict=True))}


@pytest.mark.parametrize(("name", "keywords"), ESTIMATORS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [32_000, 5_003])
def test_it_computes_what_the_plain_head_does(name, keywords, precision, vocabulary):
    estimator = estimators.build(name, **keywords)
    assert why_plain(estimator) is None
    inputs = scene(300, vocabulary, 128, 256, torch.float32)
    found, expected = (computed(estimator, inputs, fused, 70, precision) for fused in (True, False))
    for key, value in expected.items():
        bound = 2**-9 if precision != torch.float32 and key in ("hidden", "weight") else 1e-4
        off = float((found[key] - value).norm() / value.norm())
        print(f"{name} {keywords} {precision} V={vocabulary} {key}: off by {off:.2g}")
        assert off <= bound, key


def test_products_of_16_bits_are_added_in_fp32_at_once():
    assert adds_wide(torch.device("cuda"), torch.bfloat16), "torch refuses a sum of another dtype than the factors"


@pytest.mark.parametrize(("width", "teacher_width"), SHAPES)
def test_time_against_the_products_and_working_memory(width, teacher_width):
    inputs, estimator = scene(8192, VOCABULARY, width, teacher_width, torch.float32), estimators.build("full_vocab")
    rows = chunk_rows(VOCABULARY, "auto", torch.device("cuda"))
    inputs[2].rollout.count()

    def run():
        return computed(estimator, inputs, True, rows, torch.bfloat16)

    floor, spent = seconds(lambda: products(inputs)), seconds(run)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    gradients = sum(kept[name].nbytes for name in ("hidden", "weight"))
    working = (torch.cuda.max_memory_allocated() - before - gradients) / 2**30
    copy = inputs[1].weight_VH.nbytes / 2 / 2**30  # that of autocast, in bf16
    print(f"H {width}, teacher {teacher_width}: {1e3 * spent:.1f} ms, {spent / floor:.2f} x the products")
    print(f"{working:.2f} GiB beside inputs and gradients, {copy:.2f} of them the head in bf16")
    assert working - copy < 0.7


def products(inputs):
    """The four products that no implementation does without, in bf16, a chunk at a time."""
    hidden_NH, head, micro = inputs
    teacher, weight_VH = micro.scores["teacher"].full, head.weight_VH.detach().bfloat16()
    for part in hidden_NH.detach().bfloat16().split(1024):
        logits_cV = part @ weight_VH.T
        teacher.hidden_NH[: len(part)] @ teacher.head.weight_VH.T
        logits_cV @ weight_VH
        logits_cV.T @ part


def seconds(run):
    run()
    taken = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return sorted(taken)[2]


def test_the_host_never_waits():
    inputs, estimator = scene(300, 32_000, 128, 256, torch.float32), estimators.build("full_vocab")
    inputs[2].rollout.count()
    computed(estimator, inputs, True, 70, torch.bfloat16)  # compiled, and cuBLAS set up
    torch.cuda.set_sync_debug_mode("error")
    try:
        computed(estimator, inputs, True, 70, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
