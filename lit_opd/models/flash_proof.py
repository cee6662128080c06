"""Decide whether a model's packed rows attend by flash attention, on a probe of the run's own shapes.

The queries, keys and values are those of the model for random tokens, from the last layer of each kind. Attention
alone is compared and timed, for the rest of the pass is the same in both ways.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lit_opd.fast_paths import Verdict, prove
from lit_opd.models.flash import DTYPES, attend_flash
from lit_opd.models.forward import PackedForward
from lit_opd.models.language_model import LanguageModel
from lit_opd.models.packed_attention import Attend, attend
from lit_opd.models.packing import Layout, pack

__all__ = ["probe_rows", "prove_attention"]

NAME = "flash attention"
# Two kernels in bf16, whose numbers have eight bits, are off by 0.003 to 0.01 of the norm. One that lets a token see
# the wrong keys is off by about the norm itself.
BOUND = 0.03
# A dense mask grows with the square of the longest row. A probe need not.
_LONGEST = 16384


@dataclass(frozen=True)
class _Call:
    """The arguments of one call of `attend` but for the layout."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    window: int | None
    dropped: float


def probe_rows(vocabulary: int, prompt: int, completion: int, count: int, tokens: int) -> list[list[int]]:
    """Make rows of random tokens in the shapes of a micro-batch.

    Args:
        vocabulary: how many tokens there are.
        prompt: length of a prompt. Rows too long for a probe are cut, in proportion.
        completion: length of a completion.
        count: completions of a prompt.
        tokens: budget of a micro-batch, which holds at least one row.

    >>> [len(row) for row in probe_rows(vocabulary=100, prompt=3, completion=2, count=2, tokens=15)]
    [5, 5, 5]
    """
    share = min(1.0, _LONGEST / (prompt + completion))
    prompt, completion = max(1, int(share * prompt)), max(1, int(share * completion))
    draw = random.Random(0)
    rows: list[list[int]] = []
    for number in range(max(1, tokens // (prompt + completion))):
        beginning = rows[-1][:prompt] if number % count else draw.choices(range(vocabulary), k=prompt)
        rows.append(beginning + draw.choices(range(vocabulary), k=completion))
    return rows


def prove_attention(model: LanguageModel, rows: Sequence[list[int]], choice: str = "auto") -> Verdict:
    """Prove flash attention on rows of token ids, and let the model attend by it where it is taken.

    Call it under the autocast, and with the mode and the gradient checkpointing, in which the model will run.

    Raises:
        UserError: the choice is `fast`, and flash attention is unfit, fails or differs.
    """
    forward, device = model.forward, model.head.weight_VH.device
    if not isinstance(forward, PackedForward):
        return prove(NAME, list, list, BOUND, device, choice, "its rows run padded")
    unfit = _no_kernel(device)
    layout, _ = pack(rows, device)
    calls = _calls(model, forward, layout) if unfit is None and choice != "plain" else []
    unfit = unfit or next((reason for call in calls if (reason := _beyond(call))), None)
    plain, fast = (partial(_outputs, way, layout, calls) for way in (attend, attend_flash))
    verdict = prove(NAME, plain, fast, BOUND, device, choice, unfit)
    forward.attend = attend_flash if verdict.taken else attend
    return verdict


def _no_kernel(device: torch.device) -> str | None:
    name, key = "aten::_flash_attention_forward", device.type.upper()
    known = torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    return None if known else f"PyTorch has no kernel for it on {device.type}"


def _beyond(call: _Call) -> str | None:
    """Say why the kernel cannot compute a call, None where it can."""
    size, width = call.query.shape[-1], call.value.shape[-1]
    if call.query.dtype not in DTYPES:
        return f"attention runs in {str(call.query.dtype).removeprefix('torch.')}"
    if call.dropped:
        return "attention has dropout"
    if size != width:
        return f"its values are {width} wide and its keys {size}"
    return None if size % 8 == 0 and size <= 256 else f"its heads are {size} wide, no multiple of 8 up to 256"


@torch.no_grad()
def _calls(model: LanguageModel, forward: PackedForward, layout: Layout) -> list[_Call]:
    """Run the model and return the calls of attention, the last of each kind."""
    found: dict[object, _Call] = {}

    def record(
        query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, dropped: float
    ) -> Tensor:
        call = _Call(query.detach(), key.detach(), value.detach(), scale, window, dropped)
        found[query.shape, key.shape, value.shape, query.dtype, window, dropped > 0] = call
        return attend(query, key, value, layout, scale, window, dropped)

    cuda = [layout.ids_N.device] if layout.ids_N.is_cuda else []
    with model.present(), torch.random.fork_rng(cuda):  # dropout that is kept draws
        replace(forward, attend=record).packed(model, layout)
    return list(found.values())


def _outputs(way: Attend, layout: Layout, calls: list[_Call]) -> list[Tensor]:
    """Compute outputs and gradients of calls, at tokens that are no filler."""
    outputs: list[Tensor] = []
    for call in calls:
        query, key, value = (x.detach().requires_grad_() for x in (call.query, call.key, call.value))
        with torch.enable_grad():
            out = way(query, key, value, layout, call.scale, call.window, call.dropped)[: layout.count]
        generator = torch.Generator(out.device).manual_seed(0)
        upstream = torch.randn(out.shape, generator=generator, device=out.device).to(out.dtype)
        outputs += [out, *torch.autograd.grad(out, (query, key, value), upstream)]
    return outputs
