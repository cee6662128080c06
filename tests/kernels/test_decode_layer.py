"""What a layer does to one token a row, against the plain layers of Llama."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import silu

from lit_opd.models.llama import rms_norm

decode_layer = pytest.importorskip("lit_opd.kernels.decode_layer", reason="it needs triton")
layer = pytest.importorskip("lit_opd.kernels.layer", reason="it needs triton")

pytestmark = pytest.mark.usefixtures("interpreted")
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def norm_of(weight):
    return SimpleNamespace(weight=weight, variance_epsilon=1e-5)


@both
def test_gated_silu(dtype):
    torch.manual_seed(0)
    gate, up = (4 * torch.randn(2, 2 * 1100)).to(dtype).chunk(2, -1)
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(layer.gated_silu(gate, up), silu(gate) * up, rtol=rtol, atol=1e-6)


@both
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_and_cache(normed, dtype):
    torch.manual_seed(0)
    rows, heads, groups, size, columns = 2, 4, 2, 12, 5
    joined = torch.randn(rows, (heads + 2 * groups) * size).to(dtype)
    qk, value = joined.view(rows, -1, size).split([heads + groups, groups], 1)
    angle = torch.rand(rows, 1, size // 2) * 6
    cos, sin = torch.cat([angle.cos()] * 2, -1), torch.cat([-angle.sin(), angle.sin()], -1)
    weights = torch.rand(size), torch.rand(size)
    cache, column = torch.full((2, rows, groups, columns, size), 7.0).to(dtype), 2

    norms = (*weights, 1e-5) if normed else None
    found = decode_layer.rotate_and_store(qk, value, (cos, sin), cache, torch.tensor([column]), norms)

    if normed:
        with torch.no_grad():
            parts = [rms_norm(x, norm_of(w), dtype) for x, w in zip(qk.split([heads, groups], 1), weights, strict=True)]
        qk = torch.cat(parts, 1)
    wide = qk.float()
    turned = wide * cos + wide.unflatten(-1, (2, -1)).flip(-2).flatten(-2) * sin
    query, key = turned.to(dtype).split([heads, groups], 1)
    close = {"rtol": 2e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found, query, **close)
    torch.testing.assert_close(cache[0, :, :, column], key, **close)
    torch.testing.assert_close(cache[1, :, :, column], value, rtol=0, atol=0)
    others = [c for c in range(columns) if c != column]
    assert (cache[:, :, :, others] == 7).all()
