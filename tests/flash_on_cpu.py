"""PyTorch's flash attention for varying lengths, emulated on the CPU under its own names.

The schemas of the operators, and thus the order and the types of arguments, are PyTorch's. What `check` asks is what
its `flash_api.cpp` asks or needs, but for half precision: float64 is computed in float64, half precision in fp32.
"""

import contextlib

import torch

from lit_opd.functional.precision import upcast
from lit_opd.models import flash


def allowed(queries, keys, causal, left, right):
    """True where a query may look at a key, with the last query at the last key."""
    place = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if causal or right == 0:
        seen &= key <= place
    return seen if left is None or left < 0 else seen & (key >= place - left)


def check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k):
    for ends, rows, longest in ((cum_seq_q, len(query), max_q), (cum_seq_k, len(key), max_k)):
        assert ends.dtype == torch.int32
        assert ends.is_contiguous()
        assert ends[0] == 0
        assert ends[-1] == rows, "rows that no chain holds are not written"
        assert (ends.diff() > 0).all(), "a chain without keys has a log-sum-exp of plus infinity"
        assert ends.diff().max() <= longest
    assert len(cum_seq_q) == len(cum_seq_k)
    assert max_q > 1, "the order of the log-sum-exp would be another"
    assert all(x.stride(-1) == 1 and x.dtype == query.dtype for x in (query, key, value))
    assert key.shape == value.shape
    assert query.shape[1] % key.shape[1] == 0
    assert query.shape[2] == key.shape[2] <= 256
    assert query.shape[2] % 8 == 0


def chains(query, key, value, cum_seq_q, cum_seq_k, is_causal, scale, left, right):
    """Each chain's rows, its scores [H, Q, K] with what is not seen at minus infinity, and its keys and values."""
    repeats = query.shape[1] // key.shape[1]
    query, key, value = (upcast(x) for x in (query, key, value))
    for n in range(len(cum_seq_q) - 1):
        own, seen = slice(*cum_seq_q[n : n + 2].tolist()), slice(*cum_seq_k[n : n + 2].tolist())
        keys, values = (x[seen].repeat_interleave(repeats, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[own], keys) * scale
        mask = allowed(len(query[own]), len(keys), is_causal, left, right)
        yield own, seen, scores.masked_fill(~mask, -torch.inf), keys, values


def forward(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
            scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
            block_table=None, num_splits=None):  # fmt: skip
    check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert dropout_p == 0
    out = torch.full_like(query, torch.nan)
    lse = torch.full((query.shape[1], len(query)), torch.nan, dtype=upcast(query).dtype)
    found = chains(query, key, value, cum_seq_q, cum_seq_k, is_causal, scale, window_size_left, window_size_right)
    for own, _, scores, _, values in found:
        lse[:, own] = scores.logsumexp(-1)
        out[own] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse, query.new_empty(2), query.new_empty(0), query.new_empty(0)


def backward(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal,
             rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
    """Written out as the kernel computes it, from the output and the log-sum-exp that it is given."""
    check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert grad_out.shape == out.shape == query.shape
    assert logsumexp.shape == (query.shape[1], len(query))
    assert logsumexp.dtype == upcast(query).dtype
    to_query, to_key, to_value = (torch.full_like(x, torch.nan) for x in (query, key, value))
    groups, grad_out, query, out = key.shape[1], upcast(grad_out), upcast(query), upcast(out)
    found = chains(query, key, value, cum_seq_q, cum_seq_k, is_causal, scale, window_size_left, window_size_right)
    for own, seen, scores, keys, values in found:
        weights = (scores - logsumexp[:, own, None]).exp()
        to_weights = torch.einsum("qhd,khd->hqk", grad_out[own], values)
        delta = (grad_out[own] * out[own]).sum(-1).T[:, :, None]
        to_scores = weights * (to_weights - delta) * scale
        to_query[own] = torch.einsum("hqk,khd->qhd", to_scores, keys)
        for to, one, other in ((to_key, to_scores, query[own]), (to_value, weights, grad_out[own])):
            each = torch.einsum("hqk,qhd->khd", one, other)
            to[seen] = each.unflatten(1, (groups, -1)).sum(2)
    return to_query, to_key, to_value


@contextlib.contextmanager
def emulated(monkeypatch):
    """Give the operators a kernel on the CPU, and let `attend_flash` take float64, while the context is open."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        monkeypatch.setattr(flash, "DTYPES", (torch.float64, torch.float32, torch.bfloat16))
        yield
