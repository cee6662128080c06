"""What a layer does to one token a row, against the plain layers of Llama."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from lit_opd.models.llama import rms_norm

layer = pytest.importorskip("lit_opd.kernels.decode_layer", reason="it needs triton")
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def norm_of(weight):
    return SimpleNamespace(weight=weight, variance_epsilon=1e-5)


@both
@pytest.mark.parametrize("adds", [True, False])
def test_addition_and_norm(adds, dtype):
    torch.manual_seed(0)
    hidden, added, weight = torch.randn(3, 40).to(dtype), torch.randn(3, 40).to(dtype), torch.rand(40)
    stream = hidden + added if adds else hidden.clone()
    with torch.no_grad():
        expected = rms_norm(stream, norm_of(weight), torch.bfloat16)
    found = layer.add_and_norm(hidden, added if adds else None, weight, 1e-5, torch.bfloat16)
    # The interpreter cuts bf16 off, where torch and a device round it.
    torch.testing.assert_close(hidden, stream, rtol=1e-2 if dtype == torch.bfloat16 else 0, atol=0)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-6)


@both
def test_gated_silu(dtype):
    torch.manual_seed(0)
    joined = (4 * torch.randn(2, 2 * 1100)).to(dtype)
    gate, up = joined.chunk(2, -1)
    torch.testing.assert_close(layer.gated_silu(joined), silu(gate) * up, rtol=2e-2 if dtype != torch.float32 else 1e-5,
                               atol=1e-6)  # fmt: skip


@both
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_and_cache(normed, dtype):
    torch.manual_seed(0)
    rows, heads, groups, size, columns = 2, 4, 2, 12, 5
    qkv = torch.randn(rows, (heads + 2 * groups) * size).to(dtype)
    angle = torch.rand(9, size // 2) * 6
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    weights = torch.rand(size), torch.rand(size)
    places, column = torch.tensor([3, 8]), 2
    cache = torch.full((2, rows, groups, columns, size), 7.0).to(dtype)

    found = layer.rotate_and_store(
        qkv, (cos, sin), places, torch.tensor(column), cache, heads, (*weights, 1e-5) if normed else None
    )

    qk, value = qkv.view(rows, -1, size).split([heads + groups, groups], 1)
    if normed:
        with torch.no_grad():
            parts = [rms_norm(x, norm_of(w), dtype) for x, w in zip(qk.split([heads, groups], 1), weights, strict=True)]
        qk = torch.cat(parts, 1)
    wide = qk.float()
    turned = wide * cos[places, None] + wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2) * sin[places, None]
    query, key = turned.to(dtype).split([heads, groups], 1)
    close = {"rtol": 2e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, query, **close)
    torch.testing.assert_close(cache[0, :, :, column], key, **close)
    torch.testing.assert_close(cache[1, :, :, column], value, rtol=0, atol=0)
    others = [c for c in range(columns) if c != column]
    assert (cache[:, :, :, others] == 7).all()
