"""The same numbers as other libraries' code, or the documented difference.

TRL is optional: its tests are skipped where it is not installed.
"""

import math
import os

import pytest
import torch

from lit_opd.functional import (
    forward_kl,
    jsd,
    renormalise,
    return_to_go,
    reverse_kl,
    support_divergence,
)
from lit_opd.functional.support import choose_support

DTYPES = [torch.float32, torch.float64]
TRL_BETAS = [0.0, 0.1, 0.5, 0.9, 1.0]
MISSING = "TRL is not installed: pip install trl"


def logits_and_teacher(dtype=torch.float64, rows=5, vocabulary=12):
    logits, teacher = torch.randn(2, rows, vocabulary, generator=torch.Generator().manual_seed(0)).to(dtype)
    return logits.requires_grad_(), teacher


def same(found, expected, logits):
    """Equal values, and equal gradients with respect to the logits: to 1e-6, in float64 to 1e-12."""
    atol = 1e-12 if found.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
    gradients = [torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=atol)
    assert gradients[0].norm() > 0.01


def trl(module, name):
    """An object of TRL; what it says on being imported is about its stability, not about us."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl", reason=MISSING)
    found = pytest.importorskip(f"trl.{module}", reason=f"this TRL has no {module}")
    return getattr(found, name, None) or pytest.skip(f"this TRL has no {module}.{name}")


def our_name(beta):
    """TRL's beta is the teacher's share of the mixture, our `teacher_weight`; its ends are the two KLs."""
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")


def our_scale(beta):
    """Ours is divided by w (1 - w), so that both ends are continuous; TRL's tends to zero there and jumps to the KL."""
    return 1.0 if beta in (0.0, 1.0) else beta * (1 - beta)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", TRL_BETAS)
def test_full_vocabulary_jsd_of_trl(beta, dtype):
    """`GKDTrainer.generalized_jsd_loss`: beta = 0 forward KL, beta = 1 reverse KL, else beta (1 - beta) x our JSD."""
    loss = trl("experimental.gkd.gkd_trainer", "GKDTrainer").generalized_jsd_loss
    logits, teacher = logits_and_teacher(dtype)
    expected = loss(logits, teacher, beta=beta, reduction="none").sum(-1)
    same(our_scale(beta) * jsd(logits.log_softmax(-1), teacher.log_softmax(-1), beta), expected, logits)


@pytest.mark.parametrize("beta", TRL_BETAS)
def test_chunked_kernel_of_trl(beta):
    """What `DistillationTrainer` runs, with an identity as vocabulary head; fp32 only."""
    kernel = trl("kernels.chunked_divergence", "ChunkedDivergenceFunction")
    logits, teacher = logits_and_teacher(torch.float32)
    eye = torch.eye(logits.shape[-1])
    expected, _ = kernel.apply(logits, eye, None, teacher, eye, None, beta, 1.0, 1.0, None, 1.0, None)
    same(our_scale(beta) * jsd(logits.log_softmax(-1), teacher.log_softmax(-1), beta), expected, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mass", ["renormalise", "tail"])
@pytest.mark.parametrize("beta", TRL_BETAS)
def test_student_top_k_of_trl(beta, mass, dtype):
    """SDPO's loss on the student's K most probable tokens, with a tail bucket or renormalised."""
    loss = trl("experimental.sdpo.loss_utils", "compute_topk_self_distillation_loss")
    logits, teacher = logits_and_teacher(dtype)
    tail = mass == "tail"
    expected = loss(logits, teacher, distillation_topk=4, distillation_alpha=beta, distillation_add_tail=tail)
    ids = logits.topk(4, dim=-1).indices
    student, teacher = (x.log_softmax(-1).gather(-1, ids) for x in (logits, teacher))
    found = support_divergence(student, teacher, divergence=our_name(beta), mass=mass, teacher_weight=beta)
    same(our_scale(beta) * found, expected, logits)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mass", ["renormalise", "tail"])
def test_union_support_of_trl(mass, dtype):
    """IW-OPD's JSD on the union of both models' K most probable tokens, a token of both counted once."""
    loss = trl("experimental.iw_opd.iw_opd_trainer", "IWOPDTrainer").generalized_jsd_loss
    logits, teacher = logits_and_teacher(dtype)
    expected = loss(logits[None], teacher[None], beta=0.3, reduction="none", top_k=4, add_tail=mass == "tail")
    student, teacher = logits.log_softmax(-1), teacher.log_softmax(-1)
    ids, mask = choose_support(student.detach(), teacher, 4, "union")
    assert not mask.all()
    student, teacher = student.gather(-1, ids), teacher.gather(-1, ids)
    found = support_divergence(student, teacher, mask, divergence="jsd", mass=mass, teacher_weight=0.3)
    same(0.3 * 0.7 * found, expected[0].sum(-1), logits)


def test_the_tail_of_trl_has_a_floor_of_1e_7_and_ours_the_epsilon():
    """With 1e-9 outside on the teacher's side, float64: TRL's bucket holds 1e-7, ours what is there."""
    add_tail = trl("experimental.sdpo.loss_utils", "add_tail_bucket")
    divergence = trl("experimental.sdpo.loss_utils", "compute_divergence")
    student, teacher = torch.tensor([[0.6, 0.3], [0.5, 0.5 - 1e-9]], dtype=torch.float64).log()
    known = [(0.6, 0.5), (0.3, 0.5 - 1e-9), (0.1, 1e-9)]
    exact = math.fsum(p * math.log(p / q) for p, q in known)
    found = support_divergence(student, teacher, divergence="reverse_kl", mass="tail")
    assert found.item() == pytest.approx(exact, abs=1e-6)
    theirs = divergence(add_tail(student), add_tail(teacher), 1.0).item()
    assert theirs == pytest.approx(exact - 0.1 * math.log(100), abs=1e-3)


def test_the_tail_bucket_on_the_sampled_token_alone_is_not_the_reverse_kl():
    """TRL's server path: a two-bucket KL of the sampled token, whose expected gradient points elsewhere."""
    add_tail = trl("experimental.sdpo.loss_utils", "add_tail_bucket")
    divergence = trl("experimental.sdpo.loss_utils", "compute_divergence")
    logits, teacher = logits_and_teacher(rows=1)
    student, teacher = logits.log_softmax(-1)[0], teacher.log_softmax(-1)[0]
    probs = student.detach().exp()
    theirs = sum(
        p * divergence(add_tail(s[None]), add_tail(t[None]), 1.0)
        for p, s, t in zip(probs, student, teacher, strict=True)
    )
    ours = support_divergence(student[:, None], teacher[:, None], divergence="reverse_kl", mass="tail")
    same((probs * ours).sum(), theirs, logits)
    full, two_buckets = (torch.autograd.grad(x, logits, retain_graph=True)[0].flatten()
                         for x in (reverse_kl(student, teacher), theirs))  # fmt: skip
    assert torch.cosine_similarity(full, two_buckets, dim=0) < 0.99


def test_the_renormalised_formula_of_the_paper():
    """arXiv:2603.25562, eq. 6-8: sum of p' (log p' - log q') over the teacher's K most probable tokens, in loops."""
    logits, teacher = logits_and_teacher()
    student, teacher = logits.detach().softmax(-1), teacher.softmax(-1)
    ids = teacher.topk(4, dim=-1).indices
    expected = []
    for p, q, support in zip(student.tolist(), teacher.tolist(), ids.tolist(), strict=True):
        p_hat = {v: p[v] / sum(p[u] for u in support) for v in support}
        q_hat = {v: q[v] / sum(q[u] for u in support) for v in support}
        expected.append(math.fsum(p_hat[v] * (math.log(p_hat[v]) - math.log(q_hat[v])) for v in support))
    on_support = student.log().gather(-1, ids), teacher.log().gather(-1, ids)
    expected = torch.tensor(expected, dtype=torch.float64)
    for found in (support_divergence(*on_support, divergence="reverse_kl", mass="renormalise"),
                  reverse_kl(*map(renormalise, on_support))):  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kls_of_torch(dtype):
    logits, teacher = logits_and_teacher(dtype)
    student, teacher = logits.log_softmax(-1), teacher.log_softmax(-1)
    p, q = (torch.distributions.Categorical(logits=x) for x in (student, teacher))
    kl_div = torch.nn.functional.kl_div  # of (log b, log a) is KL(a || b)
    same(reverse_kl(student, teacher), torch.distributions.kl_divergence(p, q), logits)
    same(forward_kl(student, teacher), torch.distributions.kl_divergence(q, p), logits)
    same(reverse_kl(student, teacher), kl_div(teacher, student, log_target=True, reduction="none").sum(-1), logits)
    same(forward_kl(student, teacher), kl_div(student, teacher, log_target=True, reduction="none").sum(-1), logits)


def test_exact_expectations_of_k1_k2_k3():
    """Schulman's estimators of the KL's value: k1 and k3 are unbiased, k2 is not."""
    logits, teacher = logits_and_teacher()
    student, teacher = logits.detach().log_softmax(-1), teacher.log_softmax(-1)
    d = student - teacher
    k1, k2, k3 = ((student.exp() * k).sum(-1) for k in (d, d.square() / 2, (-d).exp() - 1 + d))
    kl = reverse_kl(student, teacher)
    torch.testing.assert_close(k1, kl, rtol=0, atol=1e-13)
    torch.testing.assert_close(k3, kl, rtol=0, atol=1e-13)
    assert ((k2 - kl).abs() > 0.01).all()


def test_suffix_sums_of_torch_are_the_undiscounted_return():
    values = torch.randn(3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(return_to_go(values, 1.0), values.flip(1).cumsum(1).flip(1), rtol=0, atol=1e-13)
