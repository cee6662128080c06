"""What estimators see of a chunk of positions, against loops over dense log-probabilities."""

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_opd import estimators
from lit_opd.functional import Head, HiddenDistributions, chunks
from lit_opd.functional.support import SUPPORTS
from lit_opd.objective import CountedPositions
from lit_opd.types import Estimate, Scores

POSITIONS, HIDDEN, VOCABULARY = 9, 4, 7
ALWAYS = {"student_logps_BT", "teacher_logps_BT", "sampler_logps_BT", "mask_BT", "completion_ids_BT", "progress"}
FIELDS = {
    "support": {"support_ids_BTK", "support_mask_BTK", "student_support_logps_BTK", "teacher_support_logps_BTK"},
    "full": {"student_full_logps_BTV", "teacher_full_logps_BTV"},
    "kl": {"kl_BT"},
    "entropy": {"student_entropy_BT", "teacher_entropy_BT"},
    "reference": {"reference_logps_BT"},
}
NEEDS = ["token", "support", "full", "token+kl", "token+entropy", "full+kl+entropy", "support+entropy+reference",
         "token+reference"]  # fmt: skip


def scene(seed=0):
    """Student logits, the dense log-probabilities of both models, sampled tokens, and the teacher's hidden states."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    student_NV, hidden_NH = 2 * normal(POSITIONS, VOCABULARY), normal(POSITIONS, HIDDEN)
    head = Head(normal(VOCABULARY, HIDDEN), temperature=0.5)
    p_NV = (student_NV.exp() / student_NV.exp().sum(-1, keepdim=True)).log()
    teacher_NV = 2 * hidden_NH @ head.weight_VH.T
    q_NV = (teacher_NV.exp() / teacher_NV.exp().sum(-1, keepdim=True)).log()
    ids_N = torch.randint(VOCABULARY, (POSITIONS,), generator=generator)
    return student_NV.requires_grad_(), p_NV, q_NV, ids_N, hidden_NH, head


def positions_of(ids_N, head, **scores):
    sampler_N, reference_N = -torch.arange(1.0, POSITIONS + 1), scores.pop("reference_logps_N", None)
    if "hidden_NH" in scores:
        scores["full"] = HiddenDistributions(scores.pop("hidden_NH"), head, rows=4)
    return CountedPositions(ids_N, sampler_N, Scores(**scores), reference_N, progress=0.25)


def spy(needs, k=2, support="teacher"):
    """An estimator with given needs; what it returns does not matter here."""

    def fn(tokens, *, k=k, support=support):
        return Estimate(tokens.student_logps_BT, tokens.student_logps_BT)

    name = f"spy {needs} {k} {support}"
    estimators.register_estimator(name, needs=needs)(fn)
    return estimators.build(name)


def filled(tokens):
    return {f.name for f in fields(tokens) if getattr(tokens, f.name) is not None}


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-12)


def most_probable(logps_V, k):
    return set(sorted(range(VOCABULARY), key=lambda v: -logps_V[v])[:k])


def dense_support(p_V, q_V, k, source):
    student, teacher = most_probable(p_V, k), most_probable(q_V, k)
    return {"student": student, "teacher": teacher, "union": student | teacher, "intersection": student & teacher}[
        source
    ]


def assert_is_support(tokens, p_NV, q_NV, k, source):
    """The slots that count hold the tokens of the dense support, each once, with their log-probabilities."""
    ids_NK, mask_NK = tokens.support_ids_BTK, tokens.support_mask_BTK
    assert ids_NK.shape[-1] == (2 * k if source == "union" else k)
    for n, (p_V, q_V) in enumerate(zip(p_NV.tolist(), q_NV.tolist(), strict=True)):
        counted = ids_NK[n][mask_NK[n]].tolist()
        assert len(counted) == len(set(counted))
        assert set(counted) == dense_support(p_V, q_V, k, source)
    close(tokens.student_support_logps_BTK.detach(), p_NV.gather(-1, ids_NK))
    close(tokens.teacher_support_logps_BTK, q_NV.gather(-1, ids_NK))


@pytest.mark.parametrize("source", SUPPORTS)
@pytest.mark.parametrize("k", [1, 3, VOCABULARY])
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.sampled_from([1, 4, POSITIONS]))
def test_supports_of_every_source(source, k, seed, rows):
    student_NV, p_NV, q_NV, ids_N, hidden_NH, head = scene(seed)
    estimator, positions = spy("support", k, source), positions_of(ids_N, head, hidden_NH=hidden_NH)
    for part in chunks(POSITIONS, rows):
        tokens = positions.chunk(student_NV[part], part).tokens(estimator)
        assert_is_support(tokens, p_NV[part], q_NV[part], k, source)
        (gradient,) = torch.autograd.grad(tokens.student_support_logps_BTK.sum(), student_NV)
        close(gradient[part].sum(-1), torch.zeros(len(p_NV[part]), dtype=torch.float64))
        assert gradient[part].any() or k == VOCABULARY
        assert not tokens.teacher_support_logps_BTK.requires_grad


@pytest.mark.parametrize("rows", [1, 4, POSITIONS])
def test_of_scored_supports_a_term_takes_as_many_as_it_asks_for(rows):
    """The teacher scored five tokens, for the largest term of a mix; here one compares two."""
    student_NV, p_NV, q_NV, ids_N, _, head = scene()
    logps, ids = q_NV.sort(descending=True)
    positions = positions_of(ids_N, head, logps_N=q_NV.gather(-1, ids_N[:, None])[:, 0],
                             support_ids_NK=ids[:, :5], support_logps_NK=logps[:, :5])  # fmt: skip
    for part in chunks(POSITIONS, rows):
        assert_is_support(positions.chunk(student_NV[part], part).tokens(spy("support")), p_NV[part], q_NV[part], 2,
                          "teacher")  # fmt: skip


def test_the_terms_of_a_mix_each_see_their_own_support():
    student_NV, p_NV, q_NV, ids_N, hidden_NH, head = scene()
    wanted = {"spy support 2 teacher": (2, "teacher"), "spy support 3 union": (3, "union"),
              "spy support 4 student": (4, "student"), "spy support 5 intersection": (5, "intersection")}  # fmt: skip
    for k, source in wanted.values():
        spy("support", k, source)
    mix = estimators.build("mix", terms=dict.fromkeys(wanted, 1.0))
    part = slice(2, 7)
    chunk = positions_of(ids_N, head, hidden_NH=hidden_NH).chunk(student_NV[part], part)
    for term in mix.terms:
        assert_is_support(chunk.tokens(term.estimator), p_NV[part], q_NV[part], *wanted[term.estimator.spec.name])


@pytest.mark.parametrize("needs", NEEDS)
def test_what_is_needed_is_filled_and_no_more(needs):
    """Also where another term of the mix had the teacher's whole distribution made."""
    student_NV, _, _, ids_N, hidden_NH, head = scene()
    reference = {"reference_logps_N": torch.zeros(POSITIONS)} if "reference" in needs else {}
    positions = positions_of(ids_N, head, hidden_NH=hidden_NH, **reference)
    tokens = positions.chunk(student_NV, slice(0, POSITIONS)).tokens(spy(needs))
    assert filled(tokens) == ALWAYS.union(*(FIELDS.get(need, set()) for need in needs.split("+")))


def test_every_field_is_the_dense_one():
    student_NV, p_NV, q_NV, ids_N, hidden_NH, head = scene()
    reference_N = -torch.arange(1.0, POSITIONS + 1).double()
    positions, wrote_N = positions_of(ids_N, head, hidden_NH=hidden_NH, reference_logps_N=reference_N), ids_N > 2
    positions, part = replace(positions, student_wrote_N=wrote_N), slice(3, 8)
    tokens = positions.chunk(student_NV[part], part).tokens(spy("full+kl+entropy+reference"))
    p, q, taken = p_NV[part], q_NV[part], ids_N[part, None]
    close(tokens.student_logps_BT.detach(), p.gather(-1, taken)[:, 0])
    close(tokens.teacher_logps_BT, q.gather(-1, taken)[:, 0])
    close(tokens.student_full_logps_BTV.detach(), p)
    close(tokens.teacher_full_logps_BTV, q)
    close(tokens.kl_BT, (p.exp() * (p - q)).sum(-1))
    close(tokens.student_entropy_BT, -(p.exp() * p).sum(-1))
    close(tokens.teacher_entropy_BT, -(q.exp() * q).sum(-1))
    assert torch.equal(tokens.reference_logps_BT, reference_N[part])
    assert torch.equal(tokens.completion_ids_BT, ids_N[part])
    assert torch.equal(tokens.sampler_logps_BT, positions.sampler_logps_N[part])
    assert torch.equal(tokens.student_wrote_BT, wrote_N[part])
    assert tokens.mask_BT.all()
    assert tokens.progress == 0.25
    carry = {name for name in filled(tokens) - {"progress"} if getattr(tokens, name).requires_grad}
    assert carry == {"student_logps_BT", "student_full_logps_BTV"}
