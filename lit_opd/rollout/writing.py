"""Draw the next token of every row and write it down, on the device alone.

A `Sheet` is what the rows of a rollout write. A `Writer` fills one with a decoder, a token of every row at a time, and
`LocalEngine` runs it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_opd.functional.head import Head, compute_dtype
from lit_opd.models import LanguageModel
from lit_opd.rollout.decoders import Decoder
from lit_opd.rollout.products import make_product
from lit_opd.rollout.token_parts import PLAIN, TokenParts
from lit_opd.types import PromptBatch, SamplingLaw

__all__ = ["Sheet", "Writer"]

# The share of rows that must have finished before they leave the batch: moving the cache costs about as much as a step.
_FINISHED_SHARE = 0.25
# Steps between looks at finished rows on an accelerator, where each look waits for all work in its queue.
_ASK_EVERY = 16


class Sheet:
    """Tokens, log-probabilities and mask of so many rows and positions at most, written in place.

    Slot s of the decoder writes row `row_R[s]`, and all write position `t_1`. Rows that have left keep what they wrote.

    Attributes:
        ids_RT: token ids, padding where nothing was written.
        logps_RT: log-probabilities under the law, 0 where nothing was written.
        mask_RT: True where something was.
        stopped_R: True for rows that wrote a stop token.
        token_R: the last token of each slot.
    """

    def __init__(self, rows: int, length: int, policy: LanguageModel, device: torch.device) -> None:
        self.room, self._pad_id = (rows, length), policy.pad_id
        self._stop_ids = torch.tensor(policy.stop_ids, dtype=torch.long, device=device)
        # With its dtype, for Lightning's bf16-true makes bf16 torch's default.
        self._uniforms_RT = torch.zeros((rows, length), dtype=torch.float64, device=device)
        self.ids_RT = torch.zeros((rows, length), dtype=torch.long, device=device)
        self.logps_RT = torch.zeros((rows, length), dtype=torch.float32, device=device)
        self.mask_RT = torch.zeros((rows, length), dtype=torch.bool, device=device)
        self.stopped_R = torch.zeros(rows, dtype=torch.bool, device=device)
        self.token_R, self.row_R = torch.zeros((2, rows), dtype=torch.long, device=device)
        self._t_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.slots = rows

    def begin(self, uniforms_BT: Tensor) -> None:
        """Wipe the sheet, and take the random numbers of a rollout."""
        rows, length = uniforms_BT.shape
        self._uniforms_RT[:rows, :length] = uniforms_BT
        self.ids_RT.fill_(self._pad_id)
        for written in (self.logps_RT, self.mask_RT, self.stopped_R, self._t_1):
            written.zero_()
        self.row_R[:] = torch.arange(len(self.row_R), device=self.row_R.device)
        self.slots = rows

    def write(self, linear_SV: Tensor, head: Head, law: SamplingLaw, parts: TokenParts) -> None:
        """Draw a token of every slot from the linear part of its logits, and move on one position."""
        row_S, t_1 = self.row_R[: self.slots], self._t_1
        bar = (self._stop_ids, t_1 < law.min_new_tokens) if law.min_new_tokens else None
        token_S, logp_S = parts.draw(linear_SV, head, law, self._uniforms_RT[row_S, t_1], bar)
        running_S = ~self.stopped_R[row_S]
        self.ids_RT[row_S, t_1] = torch.where(running_S, token_S, self._pad_id)
        self.logps_RT[row_S, t_1] = torch.where(running_S, logp_S.float(), 0.0)
        self.mask_RT[row_S, t_1] = running_S
        self.stopped_R[row_S] = ~running_S | (token_S[:, None] == self._stop_ids).any(1)
        self.token_R[: self.slots] = token_S
        t_1.add_(1)

    def going(self) -> Tensor:
        """List the slots whose rows have not ended, which waits for the device."""
        return torch.nonzero(~self.stopped_R[self.row_R[: self.slots]]).flatten()

    def keep(self, index: Tensor) -> None:
        """Go on with the chosen slots alone."""
        self.slots = len(index)
        for held in (self.row_R, self.token_R):
            held[: self.slots] = held[index]


class Writer:
    """Writes one rollout, with any decoder.

    Attributes:
        sheet: what is written.
        look_every: steps between looks at finished rows.
    """

    def __init__(self, policy: LanguageModel, decoder: Decoder, law: SamplingLaw, uniforms_BT: Tensor) -> None:
        self._policy, self._decoder, self._law = policy, decoder, law
        rows, length = uniforms_BT.shape
        self.sheet = Sheet(rows, length, policy, uniforms_BT.device)
        self.sheet.begin(uniforms_BT)
        self.look_every = 1 if uniforms_BT.device.type == "cpu" else _ASK_EVERY

    def begin(self, batch: PromptBatch, num_completions: int) -> None:
        """Read the prompts, and write the first token of every row."""
        rows, length = self.sheet.room
        hidden_BH = self._decoder.prefill(batch, num_completions, length)
        self._head: Head = self._policy.head.to(compute_dtype(hidden_BH))  # cast once, not at every token
        self._project = make_product(self._head.weight_VH, self._head.bias_V, rows)
        self._write(hidden_BH)

    def advance(self) -> None:
        """Write one more token of every row that is left."""
        self._write(self._decoder.step(self.sheet.token_R[: self.sheet.slots]))

    def _write(self, hidden_SH: Tensor) -> None:
        linear_SV = self._project(hidden_SH.to(self._head.weight_VH.dtype))
        self.sheet.write(linear_SV, self._head, self._law, PLAIN)

    def let_leave(self, going: Tensor) -> None:
        """Go on without the rows that have ended, where enough have."""
        if len(going) <= self.sheet.slots * (1 - _FINISHED_SHARE) and self._decoder.keep(going):
            self.sheet.keep(going)
