"""Write rollouts by replaying one captured graph a token, where starting kernels takes longer than running them.

The decoder, the sheet and the head stay where they are from rollout to rollout, and weights are copied in place. So a
graph is captured once for each number of rows and width of the cache, and never again. `LocalEngine` keeps one
`CapturedWriter` for each model that proved itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from lit_opd.functional.head import compute_dtype
from lit_opd.models import LanguageModel
from lit_opd.rollout.fused import FusedDecoder
from lit_opd.rollout.graphs import Recorder
from lit_opd.rollout.products import overwrite
from lit_opd.rollout.steady import SteadyDecoder
from lit_opd.rollout.token_parts import TokenParts
from lit_opd.rollout.writing import Sheet
from lit_opd.types import PromptBatch, Prompts, SamplingLaw

__all__ = ["CaptureProbe", "CapturedWriter", "width_bucket"]

# Rows leave where half or fewer go on, down to so many: each number of rows has graphs of its own, and fewer rows take
# hardly less time.
_FEWEST_ROWS = 8
_NARROWEST = 128
# Tokens between looks at finished rows, each of which waits for all work in the queue.
_LOOK_EVERY = 16
# Tokens of a probe: one that is captured, and a few that are replayed.
_PROBED = 8


def width_bucket(columns: int) -> int:
    """Round a number of columns up to 2^n or 1.5 x 2^n, at least 128, so that there are few graphs.

    >>> [width_bucket(columns) for columns in (5, 129, 200, 385)]
    [128, 192, 256, 512]
    """
    width = _NARROWEST
    while width < columns:
        width = width * 3 // 2 if width & (width - 1) == 0 else width * 4 // 3
    return width


class CapturedWriter:
    """Writes the rollouts of one model, with the methods of `Writer`.

    Args:
        policy: the model.
        decoder: of the model, with tensors that last.
        recorder: captures.
    """

    def __init__(self, policy: LanguageModel, decoder: FusedDecoder | SteadyDecoder, recorder: Recorder) -> None:
        self._recorder, self._decoder = recorder, decoder
        self._head = policy.head.detach().to(decoder.dtype)
        self._known = _circumstances(policy)
        self._graphs: dict[Any, tuple[Callable[[], None], Tensor]] = {}
        self._law = SamplingLaw()
        self.sheet = Sheet(0, 0, policy, policy.device)
        self.look_every, self.captures = _LOOK_EVERY, 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products."""
        return self._decoder.dtype

    @property
    def parts(self) -> TokenParts:
        """The functions that compute a token. Each choice of them has graphs of its own."""
        return self._decoder.parts

    @parts.setter
    def parts(self, parts: TokenParts) -> None:
        self._decoder.parts = parts

    def fits(self, policy: LanguageModel) -> bool:
        """Tell whether the model is still as it was captured: its weights in their places, its precision, its ends."""
        return self._known == _circumstances(policy)

    def start(self, policy: LanguageModel, law: SamplingLaw, uniforms_BT: Tensor) -> None:
        """Take the weights, the law and the random numbers of a rollout."""
        self._decoder.refresh()
        own, head = self._head, policy.head.detach()
        overwrite(own.weight_VH, head.weight_VH)
        if own.bias_V is not None and head.bias_V is not None:
            overwrite(own.bias_V, head.bias_V)
        self._head = replace(head, weight_VH=own.weight_VH, bias_V=own.bias_V)
        self._law = law
        rows, length = uniforms_BT.shape
        self._make_sheet(policy, rows, length)
        self.sheet.begin(uniforms_BT)
        self._length = length

    def reserve(self, policy: LanguageModel, rows: int, width: int) -> None:
        """Make room for rollouts of so many rows and columns, prompt and completion. Wider ones are captured anew."""
        self._make_sheet(policy, rows, width)
        unit = _NARROWEST // 2
        self._make_cache(rows, -(-width // unit) * unit)

    def begin(self, batch: PromptBatch, num_completions: int) -> None:
        """Read the prompts, and write the first token of every row."""
        rows, columns = len(batch.prompts.ids_BP) * num_completions, batch.prompts.ids_BP.shape[1] + self._length
        # Beyond what was reserved by more than is needed: a cache that grew a little every time is captured as often.
        self._make_cache(rows, columns if columns <= self._decoder.room[1] else width_bucket(columns))
        self._write(self._decoder.prefill(batch, num_completions, self._length))

    def _make_sheet(self, policy: LanguageModel, rows: int, length: int) -> None:
        room = max(rows, self.sheet.room[0]), max(length, self.sheet.room[1])
        if room != self.sheet.room:
            self._graphs.clear()
            self.sheet = Sheet(*room, policy, policy.device)

    def _make_cache(self, rows: int, columns: int) -> None:
        most_rows, widest = self._decoder.room
        if rows > most_rows or columns > widest:
            self._graphs.clear()
            self._decoder.reserve(rows, columns)

    def advance(self, captured: bool = True) -> Tensor:
        """Write one more token of every row that is left, and return the hidden states [S, H] that it was drawn from.

        The first token of each number of rows and width is computed uncaptured, and warms up what is captured then.
        """
        slots, width = self.sheet.slots, min(width_bucket(self._decoder.column + 1), self._decoder.room[1])

        def run() -> Tensor:
            hidden_SH = self._decoder.run(self.sheet.token_R[:slots], width, self._decoder.places.column_1)
            return self._write(hidden_SH)

        key = slots, width, self._law, self._head.temperature, self.parts
        if not captured:
            hidden_SH = run()
        elif key in self._graphs:
            replay, hidden_SH = self._graphs[key]
            replay()
        else:
            hidden_SH = self._recorder.warm_up(run)
            self._graphs[key] = self._recorder.capture(run)
            self.captures += 1
        self._decoder.column += 1
        return hidden_SH

    def _write(self, hidden_SH: Tensor) -> Tensor:
        head = self._head
        linear_SV = linear(hidden_SH.to(head.weight_VH.dtype), head.weight_VH, head.bias_V)
        self.sheet.write(linear_SV, head, self._law, self.parts)
        return hidden_SH

    def let_leave(self, going: Tensor) -> None:
        """Go on with half the rows, or a quarter and so on, where no more than these have not ended."""
        size, slots = _FEWEST_ROWS, self.sheet.slots
        while size < len(going):
            size *= 2
        if size < slots:
            ended = torch.ones(slots, dtype=torch.bool, device=going.device).index_fill_(0, going, False)
            # Some that have ended stay, so that there are few numbers of rows. They write padding.
            index = torch.cat([going, torch.nonzero(ended).flatten()[: size - len(going)]])
            self._decoder.keep(index)
            self.sheet.keep(index)


def _circumstances(policy: LanguageModel) -> tuple[Any, ...]:
    """List what graphs hold on to besides the tensors that are copied in place."""
    head, body = policy.head, policy.body
    dtype, table = compute_dtype(head.weight_VH[:0]), body.get_input_embeddings().weight
    norms = [module.weight for module in body.modules() if hasattr(module, "variance_epsilon")]
    read = [head.weight_VH, head.bias_V, table, *norms, *policy.model.parameters()]
    places = [(tensor.data_ptr(), tensor.dtype) for tensor in read if tensor is not None]
    adapters = [
        (tuple(module.active_adapters), module.disable_adapters, tuple(module.merged_adapters))
        for module in body.modules()
        if hasattr(module, "merged_adapters")
    ]
    return dtype, places, adapters, head.weight_VH.shape, head.scale, head.softcap, policy.stop_ids, policy.pad_id


class CaptureProbe:
    """A few tokens of one prompt, written by captured steps or the same steps uncaptured, by one or by other parts.

    The tokens that are read are given, so that rounding cannot send one of the two another way.

    Args:
        policy: the model.
        writer: to probe.
        rows: of the rollouts to come.
        width: of the rollouts to come, prompt and completion.
    """

    def __init__(self, policy: LanguageModel, writer: CapturedWriter, rows: int, width: int) -> None:
        self._policy, self._writer, self._rows, self._width = policy, writer, rows, width
        device, length = policy.device, max(width - _PROBED - 1, 1)
        ids_BP = torch.arange(length, device=device)[None] % policy.vocabulary
        self._batch = PromptBatch(Prompts(ids_BP, torch.ones_like(ids_BP, dtype=torch.bool)), [{}], 0, [0])
        self._tokens_TR = torch.arange(_PROBED * rows, device=device).view(_PROBED, rows) % policy.vocabulary

    def run(self, captured: bool, parts: TokenParts) -> list[Tensor]:
        """Write, and return the hidden states of every token and their log-probabilities."""
        writer, rows = self._writer, self._rows
        writer.parts = parts
        # Numbers of 0 draw the first token of the vocabulary whatever the rounding.
        uniforms_RT = torch.zeros(rows, _PROBED + 1, dtype=torch.float64, device=self._tokens_TR.device)
        writer.reserve(self._policy, rows, self._width)
        writer.start(self._policy, SamplingLaw(), uniforms_RT)
        writer.begin(self._batch, rows)
        hidden = []
        for tokens_R in self._tokens_TR:
            writer.sheet.token_R[:rows] = tokens_R
            hidden.append(writer.advance(captured).clone())
        return [torch.stack(hidden), writer.sheet.logps_RT[:rows, : _PROBED + 1].clone()]
