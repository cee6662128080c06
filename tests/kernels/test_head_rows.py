"""The kernels of the head, interpreted, against log-softmax, divergences and autograd in float64."""

import math

import pytest
import torch

from lit_opd.functional import (
    Head,
    entropy,
    forward_kl,
    jsd,
    mixed_kl,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
)

kernels = pytest.importorskip("lit_opd.kernels.head_rows", reason="it needs triton")

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's: numpy computes masked lanes too
]

VOCABULARY = 37  # no multiple of a block
HEADS = {
    "plain": {},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"scale": 2.0, "softcap": 5.0, "temperature": 0.4},
}
WEIGHT = 0.3
MIXED = {"jsd": jsd, "skew_reverse_kl": skew_reverse_kl, "skew_forward_kl": skew_forward_kl,
         "tvd": lambda p, q, weight: tvd(p, q)}  # fmt: skip
DIVERGENCES = {"reverse_kl": lambda p, q, weight: reverse_kl(p, q), "forward_kl": lambda p, q, weight: forward_kl(p, q),
               "mixed_kl": mixed_kl} | MIXED  # fmt: skip


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "_BLOCK", 16)


def rows_of(rows, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(rows, VOCABULARY, generator=generator)).to(dtype) for _ in range(2)]


def extreme():
    """Logits at both ends, impossible tokens (a whole block of them first), ties, and models that agree."""
    student, teacher = rows_of(6, seed=1)
    student[0, 20], student[0, 3], teacher[0, 20], teacher[0, 3] = 80, -80, -80, 80
    student[1, :18], teacher[1, :18] = -torch.inf, -torch.inf
    student[2, 30], teacher[3, 30] = -torch.inf, -torch.inf
    student[4], teacher[4] = 1.5, 1.5
    teacher[5] = student[5]
    return student, teacher


def pair_of(student, teacher, own, others):
    shapes = [kernels.Shape(h.scale, h.softcap or 0.0, 1 / h.temperature) for h in (own, others)]
    return kernels.Pair(student.clone(), shapes[0], None if teacher is None else teacher.clone(), shapes[1])


def head(shape):
    return Head(torch.zeros(0, 0), **HEADS[shape])


def logps(head, raw):
    return head.shape_logits(raw.double()).log_softmax(-1)


def close(found, expected, atol=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=atol)


SCENES = {"one row": lambda: rows_of(1), "several": lambda: rows_of(5), "bf16": lambda: rows_of(3, torch.bfloat16),
          "extreme": extreme}  # fmt: skip


@pytest.mark.parametrize(
    ("scene", "shape"),
    [*(("extreme", shape) for shape in HEADS), ("bf16", "plain"), ("one row", "all"), ("several", "softcap")],
)
def test_one_reading_gives_normalisers_divergences_and_entropies(scene, shape):
    (student, teacher), own, other = SCENES[scene](), head(shape), head("scale")
    found = kernels.read_rows(pair_of(student, teacher, own, other), entropies=True)
    p, q = logps(own, student), logps(other, teacher)
    expected = [own.shape_logits(student.double()).logsumexp(-1), other.shape_logits(teacher.double()).logsumexp(-1),
                reverse_kl(p, q), forward_kl(p, q), entropy(p), entropy(q)]  # fmt: skip
    for value, wanted in zip(found, expected, strict=True):
        close(value, wanted)
    if scene == "extreme" and shape != "softcap":
        assert found[2, 3] == math.inf or shape == "all", "the student may write what the teacher cannot"


def gradient_by_autograd(student, teacher, own, other, name, ids, by_logps, by_divergence):
    raw = student.double().requires_grad_()
    p = logps(own, raw)
    loss = (by_logps.double() * p.gather(-1, ids)).sum()
    if name is not None:
        loss = loss + (by_divergence.double() * DIVERGENCES[name](p, logps(other, teacher), WEIGHT)).sum()
    return torch.autograd.grad(loss, raw)[0]


@pytest.mark.parametrize(
    ("name", "scene", "shape"),
    [
        *((name, scene, "all") for name in DIVERGENCES for scene in ("several", "extreme")),
        *(("reverse_kl", scene, "plain") for scene in SCENES),
        *((name, "several", shape) for name in (None, "forward_kl") for shape in HEADS),
    ],
)
def test_the_gradient_takes_the_place_of_the_logits(name, scene, shape):
    (student, teacher), own, other = SCENES[scene](), head(shape), head("scale")
    p, q = logps(own, student), logps(other, teacher)
    finite = reverse_kl(p, q).isfinite() & forward_kl(p, q).isfinite()
    student, teacher = student[finite], teacher[finite]
    assert len(student) >= 1
    generator, count = torch.Generator().manual_seed(2), len(student)
    by_logps, by_divergence = torch.randn(count, 3, generator=generator), torch.rand(count, generator=generator)
    ids = torch.tensor([[20, 36, 36], [19, 22, 30]]).repeat(count, 1)[:count]  # one of them twice, the last of all
    pair = pair_of(student, teacher, own, other)
    read, divergence = kernels.read_rows(pair), None
    if name is not None:
        mean = kernels.sum_divergence(pair, read[:2], name, WEIGHT)[1] if name in MIXED else read[2]
        divergence = (name, WEIGHT, mean, by_divergence)
    kernels.write_gradient(pair, read[:2], (ids, by_logps), divergence)
    expected = gradient_by_autograd(student, teacher, own, other, name, ids, by_logps, by_divergence)
    assert pair.student_cV.dtype == student.dtype
    assert torch.equal(pair.teacher_cV, teacher)
    # The interpreter cuts a number to bf16, where a device rounds it: a whole unit of the last of 8 bits.
    rtol, atol = (2**-7, 1e-6) if scene == "bf16" else (1e-5, 1e-5)
    torch.testing.assert_close(pair.student_cV.double(), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("weight", [0.1, 0.9])
@pytest.mark.parametrize("shape", ["plain", "all"])
@pytest.mark.parametrize("name", MIXED)
def test_a_second_reading_sums_what_mixes_both_distributions(name, shape, weight):
    (student, teacher), own, other = extreme(), head(shape), head("scale")
    pair = pair_of(student, teacher, own, other)
    found, _ = kernels.sum_divergence(pair, kernels.read_rows(pair)[:2], name, weight)
    close(found, MIXED[name](logps(own, student), logps(other, teacher), weight))


def test_every_divergence_has_a_reference():
    assert set(kernels.DIVERGENCES) == DIVERGENCES.keys()


def test_without_a_teacher_the_student_is_read_alone():
    student, _ = rows_of(3)
    pair = pair_of(student, None, head("plain"), head("plain"))
    found = kernels.read_rows(pair, entropies=True)
    close(found[0], student.double().logsumexp(-1))
    close(found[4], entropy(student.double().log_softmax(-1)))


def test_no_rows_launch_nothing():
    student, teacher = rows_of(0)
    pair = pair_of(student, teacher, head("plain"), head("plain"))
    read = kernels.read_rows(pair)
    assert read.shape == (6, 0)
    kernels.write_gradient(pair, read[:2], (torch.zeros(0, 1, dtype=torch.long), torch.zeros(0, 1)), None)


def test_rows_that_are_no_numbers_stay_none():
    student, teacher = rows_of(2)
    student[0, 5] = torch.nan
    read = kernels.read_rows(pair_of(student, teacher, head("plain"), head("plain")))
    assert read[[0, 2, 3], 0].isnan().all()
    assert read[:4, 1].isfinite().all()
