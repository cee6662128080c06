"""The kernels of decoding, compiled, in bf16 at published sizes, against plain torch in fp32."""

import pytest
import torch

from lit_opd.functional import sample_tokens
from lit_opd.types import SamplingLaw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs a CUDA device"),
]
ROWS, HEADS, GROUPS, COLUMNS, SIZE = 64, 16, 8, 384, 128


def test_attention_of_rows_of_every_length():
    from lit_opd.kernels.decode_attention import decode_attention

    torch.manual_seed(0)
    cache = torch.randn(2, ROWS, GROUPS, COLUMNS, SIZE, device="cuda").bfloat16()
    query = torch.randn(ROWS, HEADS, SIZE, device="cuda").bfloat16()
    first, column = torch.arange(ROWS, device="cuda"), torch.tensor(300, device="cuda")
    cache[:, :, :, 301:] = torch.nan
    found = decode_attention(query, *cache, first, column, SIZE**-0.5)
    keys, values = (x[:, :, :301].float().repeat_interleave(HEADS // GROUPS, 1) for x in cache)
    scores = (query.float()[:, :, None] @ keys.transpose(-1, -2))[:, :, 0] * SIZE**-0.5
    hidden = torch.arange(301, device="cuda") < first[:, None]
    expected = (scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)[:, :, None] @ values)[:, :, 0]
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=1e-2)


def test_a_draw_over_a_whole_vocabulary_in_bf16():
    from lit_opd.kernels.token_draw import draw_tokens

    torch.manual_seed(0)
    logits = (3 * torch.randn(ROWS, 151936, device="cuda")).bfloat16()
    uniforms = torch.rand(ROWS, dtype=torch.float64, device="cuda")
    ids, logps = draw_tokens(logits, uniforms)
    expected_ids, expected = sample_tokens(logits.float(), SamplingLaw(), uniforms)
    assert (ids == expected_ids).float().mean() > 0.9  # a boundary of the running sum may lie between the roundings
    same = ids == expected_ids
    torch.testing.assert_close(logps[same], expected[same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["attention", "draw", "norm"])
def test_a_kernel_can_be_captured(name):
    """No kernel waits for the device or allocates by what it reads."""
    from lit_opd.kernels.decode_attention import decode_attention
    from lit_opd.kernels.layer import norm
    from lit_opd.kernels.token_draw import draw_tokens

    cache = torch.randn(2, 4, GROUPS, COLUMNS, SIZE, device="cuda").bfloat16()
    query, hidden = (torch.randn(4, *shape, device="cuda").bfloat16() for shape in ((HEADS, SIZE), (1024,)))
    first, column = torch.zeros(4, dtype=torch.long, device="cuda"), torch.tensor(9, device="cuda")
    logits, uniforms = torch.randn(4, 5000, device="cuda"), torch.rand(4, device="cuda").double()
    weight = torch.ones(1024, device="cuda")
    run = {
        "attention": lambda: decode_attention(query, *cache, first, column, 0.1),
        "draw": lambda: draw_tokens(logits, uniforms)[0],
        "norm": lambda: norm(hidden, weight, 1e-6, torch.bfloat16)[0],
    }[name]
    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    graph.replay()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
