"""Plain-Python references that the tests of estimators share, and the models and estimators these are asked about."""

import math

import torch

from lit_opd.estimators.contract import BoundEstimator, EstimatorSpec
from lit_opd.estimators.needs import read_needs
from lit_opd.estimators.oracle import TabularPair
from lit_opd.types import Estimate

PAIRS = {
    "fixed-length": TabularPair.random(5, 3, seed=11),
    "with-stop-token": TabularPair.random(5, 3, seed=12, stop=True),
    "far-apart": TabularPair.random(4, 2, seed=13, scale=2.0),
}


def close(found, expected, atol=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=atol)


def normal_logits(rows=3, vocabulary=6):
    """Those of a student, which take a gradient, and those of a teacher."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = 1.5 * torch.randn(2, rows, vocabulary, generator=generator, dtype=torch.float64)
    return student.requires_grad_(), teacher


def softmax(logits):
    total = math.fsum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def kl(a, b):
    """KL(a||b); what has no probability under a adds nothing."""
    return math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x)


def best(values, k):
    return set(sorted(range(len(values)), key=lambda token: -values[token])[:k])


def support_by_sets(student, teacher, k, source):
    s, t = best(student, k), best(teacher, k)
    return sorted({"teacher": t, "student": s, "union": s | t, "intersection": s & t}[source])


def slopes(function, point, step=1e-5):
    """Central differences of a function of a list."""

    def at(i, shift):
        return function([z + shift * (i == j) for j, z in enumerate(point)])

    return [(at(i, step) - at(i, -step)) / (2 * step) for i in range(len(point))]


def made(fn, needs="token", family="token"):
    """A function as an estimator that declares what it needs."""
    return BoundEstimator(EstimatorSpec(fn.__name__, fn, family=family, needs=read_needs("needs", needs)), {})


def log_ratio(tokens):
    return (tokens.student_logps_BT - tokens.teacher_logps_BT).detach()


def score_function(tokens):
    return Estimate(log_ratio(tokens) * tokens.student_logps_BT, log_ratio(tokens))
