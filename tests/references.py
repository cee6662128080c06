"""Plain-Python references that the tests of estimators share, and the models and estimators these are asked about."""

import math
from dataclasses import replace

import torch

from lit_opd.estimators.contract import BoundEstimator, EstimatorSpec
from lit_opd.estimators.needs import read_needs
from lit_opd.estimators.oracle import TabularPair
from lit_opd.models.forward import PaddedForward
from lit_opd.teachers import LocalScorer, Wanted, wanted_by
from lit_opd.types import Author, Estimate, Prompts, Rollout, ScoredRollout

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


def rollout_from(
    prompt_ids_BP, prompt_mask_BP, ids_BT, real_BT, mask_BT, logps_BT, finish_B, law, index_B, wrote_B=None
):
    """A rollout from plain tensors; the student wrote the rows where `wrote_B` is True, by default all of them."""
    author_BT = torch.full(ids_BT.shape, Author.STUDENT, dtype=torch.int8)
    made = Rollout(
        Prompts(prompt_ids_BP, prompt_mask_BP), ids_BT, real_BT, mask_BT, author_BT, logps_BT, finish_B, law, index_B
    )
    return made if wrote_B is None else written_by(made, wrote_B)


def written_by(rollout, wrote_B):
    """The same tokens; the student wrote the rows where `wrote_B` is True, the data the rest."""
    author_B1 = torch.where(wrote_B, Author.STUDENT, Author.DATA).to(torch.int8)[:, None]
    return replace(rollout, author_BT=author_B1.expand(rollout.ids_BT.shape))


def padded(policy, rollout):
    """The hidden states that predict counted tokens, with every row padded and nothing shared."""
    return PaddedForward("asked for").hidden(policy, rollout)[0]


def alone(policy, rollout):
    """The hidden states that predict counted tokens, by a plain forward pass of each row without any padding."""
    found = []
    for row in range(len(rollout)):
        prompt = rollout.prompts.ids_BP[row][rollout.prompts.mask_BP[row]]
        ids = torch.cat([prompt, rollout.ids_BT[row][rollout.real_BT[row]]])[None, :-1]
        hidden = policy.body(input_ids=ids, use_cache=False).last_hidden_state[0]
        found.append(hidden[len(prompt) - 1 + torch.nonzero(rollout.mask_BT[row]).flatten()])
    return torch.cat(found)


def scored(rollout, estimator, teacher, reference=None, rows=3, progress=0.0):
    """A micro-batch with what frozen models say of it, as a training step has it scored."""
    scores = {"teacher": LocalScorer(teacher, rows).score(rollout, wanted_by(estimator))}
    if reference is not None:
        scores["reference"] = LocalScorer(reference, rows, "reference").score(rollout, Wanted())
    return ScoredRollout(rollout, scores, progress)
