"""The chunked head against a dense reference that makes all logits at once."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from lit_opd.functional import Head, chunk_rows, chunks, head_logits, position_losses
from lit_opd.functional import head as head_module
from lit_opd.functional.head import HiddenDistributions, block_rows

HIDDEN, VOCABULARY = 5, 7
SHAPES = {
    "plain": {"bias": False},
    "bias": {"bias": True},
    "scale": {"bias": True, "scale": 0.25},
    "softcap": {"bias": False, "softcap": 1.5},
    "scale-softcap": {"bias": True, "scale": 2.0, "softcap": 3.0},
    "temperature": {"bias": True, "temperature": 2.5},
    "scale-softcap-temperature": {"bias": True, "scale": 2.0, "softcap": 3.0, "temperature": 0.4},
}


def problem(positions, bias=True, scale=1.0, softcap=None, temperature=1.0, dtype=torch.float64):
    """Hidden states, a head whose tensors want gradients, and a loss with a different target at each position."""
    generator = torch.Generator().manual_seed(positions)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    hidden = normal(positions, HIDDEN)
    head = Head(normal(VOCABULARY, HIDDEN), normal(VOCABULARY) if bias else None, scale, softcap, temperature)
    teacher = torch.randn(positions, VOCABULARY, generator=generator).double().log_softmax(-1)

    def kl(logits, part):
        student = logits.log_softmax(-1)
        kl = (student.exp() * (student - teacher[part].to(student.dtype))).sum(-1)
        return (kl * (1.0 + kl.detach())).sum(), {"kl": kl, "entropy": -(student.exp() * student).sum(-1)}

    return hidden, head, kl


def dense(hidden, head, chunk_loss):
    logits = hidden @ head.weight_VH.T * head.scale
    if head.bias_V is not None:
        logits = logits + head.scale * head.bias_V
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logits = logits / head.temperature
    return chunk_loss(logits, slice(0, len(hidden)))


def gradients(loss, hidden, head):
    sources = [x for x in (hidden, head.weight_VH, head.bias_V) if x is not None and x.requires_grad]
    return torch.autograd.grad(loss, sources)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("positions", "rows"), [(6, 1), (6, 2), (6, 4), (6, 6), (6, 100), (1, 3), (0, 4)])
def test_loss_stats_and_gradients_are_those_of_the_dense_head(shape, positions, rows):
    hidden, head, chunk_loss = problem(positions, **SHAPES[shape])
    loss, stats = position_losses(hidden, head, chunk_loss, rows)
    expected, expected_stats = dense(hidden, head, chunk_loss)
    close(loss, expected)
    for name, value in expected_stats.items():
        close(stats[name], value.detach())
        assert stats[name].shape == (positions,)
        assert not stats[name].requires_grad
    for found, wanted in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        close(found, wanted)


def test_the_gradient_is_scaled_by_what_comes_from_above():
    hidden, head, chunk_loss = problem(5)
    loss, _ = position_losses(hidden, head, chunk_loss, 2)
    expected, _ = dense(hidden, head, chunk_loss)
    pairs = zip(gradients(3 * loss.square(), hidden, head), gradients(3 * expected.square(), hidden, head), strict=True)
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_gradient_goes_on_into_what_made_the_hidden_states():
    hidden, head, chunk_loss = problem(5)
    body = torch.eye(HIDDEN, dtype=torch.float64).requires_grad_()
    (found,) = torch.autograd.grad(position_losses((hidden @ body).tanh(), head, chunk_loss, 2)[0], body)
    (wanted,) = torch.autograd.grad(dense((hidden @ body).tanh(), head, chunk_loss)[0], body)
    close(found, wanted)


def test_gradients_of_several_calls_add_up():
    hidden, head, chunk_loss = problem(5)
    for _ in range(2):
        position_losses(hidden, head, chunk_loss, 2)[0].backward()
    expected, _ = dense(hidden, head, chunk_loss)
    close(head.weight_VH.grad, 2 * gradients(expected, hidden, head)[1])


@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_head_gets_no_gradient(bias):
    hidden, head, chunk_loss = problem(5, bias=bias)
    frozen = replace(head, weight_VH=head.weight_VH.detach(), bias_V=head.bias_V.detach() if bias else None)
    loss, _ = position_losses(hidden, frozen, chunk_loss, 2)
    assert loss.grad_fn.gradients[1:] == [None, None], "a buffer the size of the head was made for nothing"
    loss.backward()
    assert frozen.weight_VH.grad is None
    close(hidden.grad, gradients(dense(hidden, frozen, chunk_loss)[0], hidden, frozen)[0])


def test_a_frozen_body_leaves_the_head_trainable():
    hidden, head, chunk_loss = problem(5)
    hidden = hidden.detach()
    loss, _ = position_losses(hidden, head, chunk_loss, 2)
    for found, wanted in zip(gradients(loss, hidden, head), gradients(dense(hidden, head, chunk_loss)[0], hidden, head),
                             strict=True):  # fmt: skip
        close(found, wanted)


@pytest.mark.parametrize("positions", [5, 0])
def test_without_gradients_only_values_are_computed(positions):
    hidden, head, chunk_loss = problem(positions)
    seen = []

    def spy(logits, part):
        seen.append(logits.requires_grad)
        return chunk_loss(logits, part)

    with torch.no_grad():
        loss, stats = position_losses(hidden, head, spy, 2)
    assert not loss.requires_grad
    assert not any(seen)
    close(loss, dense(hidden, head, chunk_loss)[0].detach())
    assert len(stats["kl"]) == positions


def test_no_chunk_is_larger_than_asked_and_every_position_is_seen_once():
    hidden, head, chunk_loss = problem(11)
    seen = []

    def spy(logits, part):
        assert len(logits) == part.stop - part.start
        seen.append(len(logits))
        return chunk_loss(logits, part)

    position_losses(hidden, head, spy, 4)
    assert seen == [4, 4, 3]


@pytest.mark.parametrize("slab", [1, 3, 7])
def test_no_copy_of_the_whole_head_is_made(slab, monkeypatch):
    """Neither of its weights nor of its gradient, in the compute dtype: both models' heads are read by slabs."""
    hidden, head, chunk_loss = problem(6, bias=False, dtype=torch.float32)
    seen = []

    def linear(x, weight, bias):
        seen.append((weight.dtype, len(weight)))
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(head_module, "_CPU_SLAB", slab)
    monkeypatch.setattr(head_module, "linear", linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        position_losses(hidden, head, chunk_loss, 3)
        head_logits(hidden, head)
    assert {dtype for dtype, _ in seen} == {torch.bfloat16}
    assert max(rows for _, rows in seen) == slab
    assert sum(rows for _, rows in seen) == 3 * VOCABULARY


def test_a_head_that_is_read_whole_is_cast_once(monkeypatch):
    hidden, head, chunk_loss = problem(6, dtype=torch.float32)
    seen = []
    monkeypatch.setattr(head_module, "linear", lambda *args: (seen.append(args[1:]), linear(*args))[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        position_losses(hidden, head, chunk_loss, 2)
    assert len(seen) == 3
    assert {tensor.dtype for pair in seen for tensor in pair} == {torch.bfloat16}
    assert len({(weight.data_ptr(), bias.data_ptr()) for weight, bias in seen}) == 1


class Made(TorchDispatchMode):
    """Counts results of the shape of the head that have memory of their own."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.shape == (VOCABULARY, HIDDEN):
            self.count += result.untyped_storage().data_ptr() not in given
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_as_large_as_the_head_is_made_at_every_chunk(dtype):
    hidden, head, chunk_loss = problem(6, dtype=dtype)
    counts = []
    for rows in (6, 1):
        with Made() as made:
            position_losses(hidden, head, chunk_loss, rows)
        counts.append(made.count)
    assert counts[0] == counts[1] == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [2, 3, 5, 8, 11])
def test_within_a_chunk_blocks_change_nothing(shape, rows, monkeypatch):
    hidden, head, chunk_loss = problem(11, **SHAPES[shape])
    seen = []

    def spy(logits, part):
        seen.append((part.start, part.stop))
        return chunk_loss(logits, part)

    monkeypatch.setattr(head_module, "_CPU_BLOCK_BYTES", 3 * 4 * VOCABULARY)
    monkeypatch.setattr(head_module, "_CPU_SLAB", 3)  # tokens of the vocabulary, the last slab with one
    loss, stats = position_losses(hidden, head, spy, rows)
    assert [i for start, stop in seen for i in range(start, stop)] == list(range(11))
    assert max(stop - start for start, stop in seen) == min(rows, 3)
    expected, expected_stats = dense(hidden, head, chunk_loss)
    close(loss, expected)
    close(stats["kl"], expected_stats["kl"].detach())
    for found, wanted in zip(gradients(loss, hidden, head), gradients(expected, hidden, head), strict=True):
        close(found, wanted)


def test_a_block_without_gradient_adds_none(monkeypatch):
    """In the place of its logits must not stand these logits."""
    hidden, head, chunk_loss = problem(6)

    def first_only(logits, part):
        loss, stats = chunk_loss(logits, part)
        return (loss if part.start == 0 else loss.detach()), stats

    monkeypatch.setattr(head_module, "_CPU_BLOCK_BYTES", 2 * 4 * VOCABULARY)
    loss, _ = position_losses(hidden, head, first_only, 4)
    expected = gradients(dense(hidden[:2], head, chunk_loss)[0], hidden, head)
    for found, wanted in zip(gradients(loss, hidden, head), expected, strict=True):
        close(found, wanted)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.sampled_from(sorted(SHAPES)))
def test_distributions_are_the_dense_ones_and_each_chunk_is_projected_once(rows, block, shape):
    hidden, head, _ = problem(11, **SHAPES[shape])
    made, dense = HiddenDistributions(hidden, head, rows), head_logits(hidden, head).detach()
    with patch.object(head_module, "_project", wraps=head_module._project) as project:
        for chunk in chunks(11, rows):
            inner = [
                slice(chunk.start + p.start, chunk.start + p.stop) for p in chunks(chunk.stop - chunk.start, block)
            ]
            close(torch.cat([made.logits(part) for part in inner]), dense[chunk])
        assert project.call_count == len(list(chunks(11, rows)))
    assert len(made._projected_cV) == 0, "a projection outlived the pass that made it"
    close(made.logits(slice(0, 11)), dense)
    close(made.logps(slice(0, 11)), dense.log_softmax(-1))
    chosen = torch.tensor([7, 2, 10])
    close(made[chosen].logits(slice(0, 3)), dense[chosen])
    assert not made.logps(slice(0, 1)).requires_grad


def test_under_autocast_the_projection_is_bf16_and_the_loss_fp32():
    hidden, head, chunk_loss = problem(6, dtype=torch.float32)
    seen = []

    def spy(logits, part):
        seen.append((logits.dtype, torch.is_autocast_enabled("cpu"), logits.detach().clone()))
        return chunk_loss(logits, part)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = position_losses(hidden, head, spy, 4)
        rebuilt = head_logits(hidden, head)
    low = [x.bfloat16() for x in (hidden, head.weight_VH, head.bias_V)]
    assert [entry[:2] for entry in seen] == [(torch.float32, False)] * 2
    assert torch.equal(torch.cat([entry[2] for entry in seen]), linear(*low).float())
    assert torch.equal(rebuilt, linear(*low).float())
    found = gradients(loss, hidden, head)
    wanted = gradients(dense(hidden, head, chunk_loss)[0], hidden, head)
    for gradient, reference in zip(found, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - reference).norm() < 0.03 * reference.norm()


def test_a_bf16_model_gets_bf16_gradients():
    hidden, head, chunk_loss = problem(6, dtype=torch.bfloat16)
    loss, stats = position_losses(hidden, head, chunk_loss, 4)
    assert loss.dtype == stats["kl"].dtype == torch.float32
    assert {gradient.dtype for gradient in gradients(loss, hidden, head)} == {torch.bfloat16}


@pytest.mark.parametrize("rows", [1, 7, 600])
def test_a_bf16_sum_over_chunks_is_as_exact_as_one_product(rows):
    hidden, head, chunk_loss = problem(600, dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, head.weight_VH, head.bias_V)]
    found = gradients(position_losses(hidden, head, chunk_loss, rows)[0], hidden, head)
    wanted = torch.autograd.grad(dense(exact[0], Head(*exact[1:]), chunk_loss)[0], exact)
    for gradient, reference in zip(found, wanted, strict=True):
        assert (gradient - reference).norm() < 0.005 * reference.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_head_logits_are_those_of_the_dense_head(shape):
    hidden, head, _ = problem(4, **SHAPES[shape])
    close(head_logits(hidden, head), dense(hidden, head, lambda logits, part: logits))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 50), st.integers(1, 60))
def test_chunks_cover_all_positions_in_order(positions, rows):
    parts = list(chunks(positions, rows))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(positions))
    assert all(0 < part.stop - part.start <= rows for part in parts)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("vocabulary", [512, 49_152, 151_936])
def test_chunk_rows_keep_within_the_budget(device, vocabulary):
    """Two models' logits in fp32, and eight copies of the block that is worked on."""
    device, row = torch.device(device), 4 * vocabulary
    rows = chunk_rows(vocabulary, 256, device)
    block = block_rows(vocabulary, device) or rows
    assert rows > 1
    assert 0.9 * 256 * 2**20 < 2 * rows * row + 8 * block * row <= 256 * 2**20
    assert chunk_rows(10**9, 1, device) == 1
