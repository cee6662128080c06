"""Sample completions in this process, by a decode loop over the model at hand.

This is the default engine. It needs no server, samples exactly under the recorded law, and takes the fastest decoder
that the model allows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lit_opd.errors import UserError
from lit_opd.fast_paths import Verdict, prove
from lit_opd.functional.precision import upcast
from lit_opd.kernels import why_not
from lit_opd.models import LanguageModel
from lit_opd.models.context import check_length
from lit_opd.models.forward import FAILURES, distance
from lit_opd.models.llama import has_hooks
from lit_opd.rollout.captured import CapturedWriter, CaptureProbe
from lit_opd.rollout.decoders import CacheDecoder, Decoder, probe, reads_together
from lit_opd.rollout.fused import FusedDecoder, why_not_fused
from lit_opd.rollout.graphs import CudaRecorder, Recorder, question
from lit_opd.rollout.kernel_parts import by_kernels, why_not_kernels
from lit_opd.rollout.steady import SteadyDecoder, why_not_steady
from lit_opd.rollout.token_parts import PLAIN
from lit_opd.rollout.writing import Sheet, Writer
from lit_opd.types import PromptBatch, Rollout, SamplingLaw

__all__ = ["LocalEngine"]

_log = logging.getLogger(__name__)

_CAPTURED, _KERNELS = "captured decoding", "kernels of decoding"
# Both run the same kernels on the same shapes, and differ where a library chooses otherwise while it is captured.
_BOUND = 1e-2
# Kernels round to 16 bits at other places, which many layers amplify. A wrong column is off by about the norm itself.
_ROUNDED = 5e-2


class LocalEngine:
    """The engine that samples in this process.

    Args:
        capture: `auto` lets models that `prove` accepts replay captured steps, `off` lets none.
        recorder: the class that captures.
        kernels: captured steps may use kernels.
    """

    def __init__(self, capture: str = "auto", recorder: type[Recorder] = CudaRecorder, kernels: bool = True) -> None:
        self._capture, self._recorder, self._kernels = capture, recorder, kernels
        self._disagreements: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
        self._unsteady: WeakKeyDictionary[nn.Module, str | None] = WeakKeyDictionary()
        self._together: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        self._captured: WeakKeyDictionary[nn.Module, CapturedWriter] = WeakKeyDictionary()

    @torch.no_grad()
    def sample(
        self, policy: LanguageModel, batch: PromptBatch, law: SamplingLaw, num_completions: int, uniforms_BT: Tensor
    ) -> Rollout:
        """Complete every prompt, as `RolloutEngine.sample` says, reading each once for all its completions."""
        rows, length = uniforms_BT.shape
        check_length(policy, batch.prompts.ids_BP.shape[1] + length)
        told: set[int] = set()
        # Without dropout, for the recorded log-probabilities are those of the whole model.
        with policy.evaluating(), policy.precision(cache_casts=True):
            sheet = self._write_captured(policy, batch, law, num_completions, uniforms_BT, told)
            if sheet is None:
                writer = Writer(policy, self.decoder(policy, rows), law, uniforms_BT)
                _write(writer, batch, num_completions, length, told)
                sheet = writer.sheet
        steps = int(sheet.mask_RT.sum(1).amax())
        # Copies, for captured steps write the same sheet in the next rollout.
        ids_BT, mask_BT, logps_BT = (x[:rows, :steps].clone() for x in (sheet.ids_RT, sheet.mask_RT, sheet.logps_RT))
        stopped_B = sheet.stopped_R[:rows].clone()
        return Rollout.completed(batch, num_completions, ids_BT, mask_BT, logps_BT, stopped_B, law)

    # Lightning evaluates in inference mode, which nobody outside of it may write to the tensors of.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _write_captured(
        self,
        policy: LanguageModel,
        batch: PromptBatch,
        law: SamplingLaw,
        num_completions: int,
        uniforms_BT: Tensor,
        told: set[int],
    ) -> Sheet | None:
        """Write a rollout by captured steps, None where the model has none or they fail before anybody saw a row."""
        if policy.model not in self._captured or self._why_not_captured(policy):
            return None
        try:
            writer = self._captured[policy.model]
            if not writer.fits(policy):
                parts = self._captured.pop(policy.model).parts
                writer = self._captured[policy.model] = self._make_captured(policy, len(uniforms_BT))
                writer.parts = parts
            with torch.autocast(policy.device.type, enabled=False):  # all is cast already
                writer.start(policy, law, uniforms_BT)
                _write(writer, batch, num_completions, uniforms_BT.shape[1], told)
            return writer.sheet
        except Exception as error:  # of a capture or a replay, which fail in classes of their own
            if told:
                raise
            self._captured.pop(policy.model, None)
            why = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            _log.warning("The %s is sampled without captured steps from here on: %s.", policy.key, why)
            return None

    def _make_captured(self, policy: LanguageModel, rows: int) -> CapturedWriter:
        fused = self._why_not_fused(policy) is None
        decoder = FusedDecoder(policy, rows, lasting=True) if fused else SteadyDecoder(policy, self._reads(policy))
        return CapturedWriter(policy, decoder, self._recorder(policy.device))

    @torch.inference_mode(False)
    @torch.no_grad()
    def prove(self, policy: LanguageModel, rows: int, width: int, choice: str = "auto") -> list[Verdict]:
        """Let captured steps of a model, and kernels in them, prove themselves, and take them in later rollouts.

        Args:
            policy: the model, which is not sampled captured before.
            rows: the most rows of a rollout.
            width: the most columns, of prompt and completion.
            choice: see `lit_opd.fast_paths.prove`.
        """
        device = policy.device
        self._captured.pop(policy.model, None)
        if self._capture == "off":
            return [Verdict(_CAPTURED, False, "rollout.capture=off")]
        with policy.evaluating(), policy.precision():
            unfit = self._recorder.why_not(device) or self._why_not_captured(policy)
            if unfit or choice == "plain":
                return [prove(_CAPTURED, list, list, 0.0, device, choice, unfit)]
            try:
                writer = self._make_captured(policy, rows)  # in the precision of the run
            except torch.OutOfMemoryError:
                return [Verdict(_CAPTURED, False, "there is no memory for a copy of the weights", failed=True)]
            with torch.autocast(device.type, enabled=False):
                verdicts = _judge(CaptureProbe(policy, writer, rows, width), writer, device, choice, self._kernels)
        if verdicts[0].taken:
            self._captured[policy.model] = writer
        return verdicts

    def decoder(self, policy: LanguageModel, rows: int) -> Decoder:
        """Make the fastest decoder of `rows` rows that the model allows.

        Raises:
            UserError: no decoder continues this model's rows exactly.
        """
        if self._why_not_fused(policy) is None:
            return FusedDecoder(policy, rows)
        return CacheDecoder(policy, self._reads(policy))

    def _reads(self, policy: LanguageModel) -> bool:
        if policy.model not in self._together:
            self._together[policy.model] = reads_together(policy)
        return self._together[policy.model]

    def _why_not_fused(self, policy: LanguageModel) -> str | None:
        reason = why_not_fused(policy)
        if reason is None and policy.model not in self._disagreements:
            self._disagreements[policy.model] = reason = _disagreement(policy, partial(FusedDecoder, policy, 4))
            if reason:
                _log.warning("The %s decodes without the fused path: %s.", policy.key, reason)
        return reason or self._disagreements[policy.model]

    def _why_not_captured(self, policy: LanguageModel) -> str | None:
        """Say why no step of a model can be captured, built like Llama or by its own code."""
        if self._why_not_fused(policy) is None:
            return None
        if has_hooks(policy.body.modules()):  # which run once, when a graph is captured
            return "it has hooks"
        if policy.model not in self._unsteady:
            try:
                reason = why_not_steady(policy) or _unlike_cached(policy, self._reads(policy))
            except UserError as error:  # which a run that samples nothing from the model shall not end with
                reason = str(error.found)
            self._unsteady[policy.model] = reason
        return self._unsteady[policy.model]


def _judge(
    probe: CaptureProbe, writer: CapturedWriter, device: torch.device, choice: str, kernels: bool
) -> list[Verdict]:
    """Compare captured steps with the same uncaptured, then kernels in them with plain parts, and choose parts."""
    captured = partial(probe.run, True, PLAIN)
    verdicts = [prove(_CAPTURED, partial(probe.run, False, PLAIN), captured, _BOUND, device, choice)]
    if verdicts[0].taken and kernels:
        unfit = why_not(device) or why_not_kernels(writer.dtype)
        by_kernel = partial(probe.run, True, by_kernels()) if unfit is None else captured
        verdicts.append(prove(_KERNELS, captured, by_kernel, _ROUNDED, device, choice, unfit))
    writer.parts = by_kernels() if verdicts[-1].taken and len(verdicts) > 1 else PLAIN
    return verdicts


def _unlike_cached(policy: LanguageModel, together: bool) -> str | None:
    """Say why a model's own code cannot be captured over states that stay where they are, None where it can."""
    ids_B = probe(policy)[1][:, 1]
    with torch.autocast(policy.device.type, enabled=False):
        try:
            decoder = SteadyDecoder(policy, together)
            if reason := _disagreement(policy, lambda: decoder, together):
                return reason
            asked = question(lambda: decoder.run(ids_B, decoder.column + 1, decoder.places.column_1))
        except FAILURES as error:
            return f"its own code fails over states that stay ({type(error).__name__}: {error})"
    return asked and f"its step asks the host ({asked})"


def _disagreement(policy: LanguageModel, make: Callable[[], Decoder], together: bool = True) -> str | None:
    """Say how a decoder differs from the model's own cache on a few tokens, None where only by rounding."""
    batch, next_B2 = probe(policy)
    with torch.autocast(policy.device.type, enabled=False):
        decoder, cached = make(), CacheDecoder(policy, together)
        pairs = [(decoder.prefill(batch, 2, 2), cached.prefill(batch, 2, 2))]
        pairs.append((decoder.step(next_B2[:, 0]), cached.step(next_B2[:, 0])))
    found, expected = (upcast(torch.cat(parts)) for parts in zip(*pairs, strict=True))
    off = distance(found, expected, exact=policy.head.weight_VH.dtype == expected.dtype)
    return None if off is None else f"its hidden states would be off by {off:.2g}"


def _write(
    writer: Writer | CapturedWriter, batch: PromptBatch, num_completions: int, length: int, told: set[int]
) -> None:
    """Write all rows of a rollout to their ends, and tell of each that ends before the others."""
    sheet = writer.sheet
    writer.begin(batch, num_completions)
    for t in range(length - 1):
        if t % writer.look_every == 0:
            _tell(batch, num_completions, told, sheet.stopped_R, sheet)
            going = sheet.going()
            if not len(going):
                break
            writer.let_leave(going)
        writer.advance()
    _tell(batch, num_completions, told, sheet.mask_RT[:, 0], sheet)


def _tell(batch: PromptBatch, count: int, told: set[int], ended_R: Tensor, sheet: Sheet) -> None:
    """Tell whoever waits for single completions of each row that has ended, once."""
    if batch.ended is None:
        return
    for row in set(torch.nonzero(ended_R).flatten().tolist()) - told:
        told.add(row)
        batch.ended(batch, row // count, sheet.ids_RT[row][sheet.mask_RT[row]].tolist())
