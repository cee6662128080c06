"""Count what a forward pass keeps for the backward pass, and what a layer needs while it runs.

Read off the layers of `models.llama`, whose norms, gated activation and attention keep only their inputs. Tests compare
the counts with what autograd saves. Other bodies run code of their own, for which these counts are a lower bound.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_opd.lab.plan.sizes import GROUPS, ModelSizes

__all__ = ["FLASH", "MASKED", "PLAIN", "Pass", "kept", "passing"]

# How attention is computed: by a kernel without a mask, by PyTorch's with one, by plain products on a CPU.
FLASH, MASKED, PLAIN = "flash attention", "masked attention", "plain products"
_FP32, _INDEX = 4, 8
_SHARED = 16  # the fewest tokens of a beginning that rows share, as `models.packing` has it


@dataclass(frozen=True)
class Pass:
    """Rows that a model reads together, all as long as they may get, and the precision that it reads them in.

    Attributes:
        rows: completions.
        prompt: tokens of a prompt.
        length: tokens of a completion.
        completions: rows that continue each prompt, and share it.
        residual: bytes of a number of the residual stream, which has the dtype of the embedding.
        compute: bytes of a number in matrix products.
        attention: `FLASH`, `MASKED` or `PLAIN`.
        repeats: masked attention repeats keys for the heads of a group, as it does on an accelerator.
        lean: outputs of norms, rotation and activation are computed again, as the kernels of layers have it.
    """

    rows: int
    prompt: int
    length: int
    completions: int
    residual: int
    compute: int
    attention: str
    repeats: bool = True
    lean: bool = False

    @property
    def casts(self) -> bool:
        """True where products are in another dtype than weights, as under bf16-mixed, so that weights are cast."""
        return self.residual != self.compute

    @property
    def prompts(self) -> int:
        """Prompts that the rows continue."""
        return -(-self.rows // self.completions)

    @property
    def counted(self) -> int:
        """Tokens that the loss counts."""
        return self.rows * self.length

    @property
    def tokens(self) -> int:
        """Tokens of the packed layout: every prompt once, and no last token, which predicts nothing."""
        return self.prompts * self.prompt + self.rows * (self.length - 1)

    @property
    def segments(self) -> tuple[int, int, int]:
        """Chains that attention sees, and the queries and keys that each is padded to."""
        longest = self.prompt + self.length - 1
        if self.rows > self.prompts and self.prompt >= _SHARED:
            return self.prompts + self.rows, max(self.prompt, self.length - 1), longest
        return self.rows, longest, longest


def kept(sizes: ModelSizes, work: Pass, recomputed: bool, adapter: int = 4) -> int:
    """Count the bytes that all layers keep until the backward pass.

    Args:
        sizes: the model.
        work: what it reads.
        recomputed: layers keep their inputs only, and run again in the backward pass, one at a time.
        adapter: bytes of a weight of an adapter, where the model has some.
    """
    layer, stream = _of_layer(sizes, work, adapter), work.tokens * sizes.hidden * work.residual
    ends = stream + work.tokens * (_FP32 + 2 * work.residual * sizes.head_dim) + _INDEX * work.counted
    if work.attention != FLASH:  # the mask as truth values and as numbers, once for all layers
        segments, queries, seen = work.segments
        ends += (1 + work.compute) * segments * queries * seen
    if recomputed:
        return sizes.layers * stream + layer + ends
    # Autocast casts the frozen weight beside an adapter at every pass, and keeps the copy for the input's gradient.
    casts = sizes.adapted * work.compute if work.casts else 0
    return sizes.layers * layer + casts + ends


def _of_layer(sizes: ModelSizes, work: Pass, adapter: int) -> int:
    residual, compute, hidden = work.residual, work.compute, sizes.hidden
    norms = 2 * (residual * hidden + _FP32)
    if sizes.normed:
        norms += compute * (sizes.mixed + sizes.keys) + _FP32 * (sizes.heads + sizes.groups)
    activation = 2 * compute * sizes.inner
    return work.tokens * (norms + activation + _inputs(sizes, work, adapter)) + _attention(sizes, work)


def _inputs(sizes: ModelSizes, work: Pass, adapter: int) -> int:
    """Count the bytes a token of what linear layers keep: their inputs, where a weight behind them trains."""
    widths = {"qkv": sizes.hidden, "gate_up": sizes.hidden, "down": sizes.inner, "out": sizes.mixed}
    if not sizes.rank:
        # Flash attention keeps its output, which is the input of the layer behind it.
        others = {"out"} if work.attention == FLASH else set()
        others |= {"qkv", "gate_up", "down"} if work.lean else set()
        return work.compute * sum(width for name, width in widths.items() if name not in others)
    own, total = work.compute if work.casts else adapter, 0
    for name, width in widths.items():
        adapters = sizes.adapters[name]
        # peft casts the input for every adapter, unless it has the adapter's dtype.
        again = work.lean and name != "out"
        copies = adapters if work.casts or own != work.compute else 0 if again else min(1, adapters)
        # A layer that casts its weight keeps its input, though the weight is frozen.
        plain = work.casts and adapters < len(GROUPS[name]) and not again
        total += own * (copies * width + adapters * sizes.rank) + (work.compute * width if plain else 0)
    return total


def _attention(sizes: ModelSizes, work: Pass) -> int:
    mixed, keys, compute = sizes.mixed, sizes.keys, work.compute
    logsumexp = _FP32 * sizes.heads
    if work.attention == FLASH:
        turned = 0 if work.lean and sizes.normed else mixed + keys
        return work.tokens * (compute * (turned + keys + mixed) + logsumexp)
    segments, queries, seen = work.segments
    padded = compute * segments * queries * mixed
    if work.attention == PLAIN:
        return padded + 2 * compute * segments * seen * keys
    width = mixed if work.repeats else keys
    # The kernel takes the mask as numbers, and keeps those of each layer.
    mask = compute * segments * queries * seen if work.repeats else 0
    return 2 * padded + 2 * compute * segments * seen * width + segments * queries * logsumexp + mask


def passing(sizes: ModelSizes, work: Pass) -> int:
    """Count the bytes that a layer needs while it runs without gradients, the residual stream included."""
    compute, tokens = work.compute, work.tokens
    mlp = compute * (sizes.hidden + 4 * sizes.inner)
    heads = compute * (2 * sizes.mixed + 2 * sizes.keys)
    most = tokens * max(mlp, heads + _FP32 * 2 * (sizes.mixed + sizes.keys)) + _attention(sizes, work)
    return most + 2 * tokens * sizes.hidden * work.residual
