"""W3, the two heads alone: the reverse KL from hidden states, and its gradient, by three ways of computing it.

`ours` is the training objective as it runs in a step, `trl` the tiled kernel of TRL's DistillationTrainer, both under
bf16 autocast; `dense` forms all logits at once in fp32 and leaves the rest to autograd. Each case has a process of its
own. Working memory is the peak of the first run above what the process held before it, without the gradients that the
run leaves behind: so it is what comes on top of hidden states, weights and their gradients.

Shapes: N positions, V vocabulary, H width of the student's hidden states, G of the teacher's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_opd import estimators
from lit_opd.config import OptimConfig
from lit_opd.functional import Head, HiddenDistributions, chunk_rows
from lit_opd.models import LanguageModel
from lit_opd.models.forward import PaddedForward
from lit_opd.objective import student_loss
from lit_opd.types import PromptBatch, Prompts, Rollout, SamplingLaw, ScoredRollout, Scores
from tools.benchmark.processes import answer, peak_mb, reset_peak, resident_mb

MIB_OF_MB = 1e6 / 2**20
CPU = torch.device("cpu")


class Inputs(NamedTuple):
    """The student's are fp32 leaves with grad, the teacher's frozen."""

    hidden_NH: Tensor
    weight_VH: Tensor
    teacher_hidden_NG: Tensor
    teacher_weight_VG: Tensor


def make_inputs(positions: int, vocabulary: int, width: int, teacher_width: int, device: torch.device = CPU) -> Inputs:
    """Hidden states and heads that give logits of standard deviation about 2; the teacher's are in bf16."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, std: float, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(0.0, std, generator=generator)

    return Inputs(
        normal(positions, width, 1.0, torch.float32).requires_grad_(),
        normal(vocabulary, width, 2 * width**-0.5, torch.float32).requires_grad_(),
        normal(positions, teacher_width, 1.0, torch.bfloat16),
        normal(vocabulary, teacher_width, 2 * teacher_width**-0.5, torch.bfloat16),
    )


class GivenStates(nn.Module):
    """The body of a language model that says the given hidden states [N, H], whatever it reads."""

    def __init__(self, hidden_NH: Tensor) -> None:
        super().__init__()
        self.hidden_NH = hidden_NH

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        """As bodies of Transformers do."""
        return SimpleNamespace(last_hidden_state=self.hidden_NH.unsqueeze(0))


class GivenStudent(LanguageModel):
    """A student whose body reads nothing, so that no way to run it could be tried out."""

    forward = PaddedForward("its hidden states are given")  # type: ignore[assignment]


def ours(inputs: Inputs, fused: bool = False) -> Tensor:
    """The objective of a step over one completion of N tokens, by a student whose body gives these hidden states."""
    positions, (vocabulary, _) = len(inputs.hidden_NH), inputs.weight_VH.shape
    output_layer = SimpleNamespace(weight=inputs.weight_VH)
    model = SimpleNamespace(
        base_model=GivenStates(inputs.hidden_NH), config=SimpleNamespace(), get_output_embeddings=lambda: output_layer
    )
    student = GivenStudent(model, None, "student")
    device = inputs.hidden_NH.device
    ids_BT = torch.zeros(1, positions, dtype=torch.long, device=device)
    counted_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    batch = PromptBatch(Prompts(ids_BT[:, :1], counted_BT[:, :1]), rows=[{}], batch=0, places=[0])
    ended, logps_BT = torch.tensor([False], device=device), torch.zeros(1, positions, device=device)
    rollout = Rollout.completed(batch, 1, ids_BT, counted_BT, logps_BT, ended, SamplingLaw())
    rows = chunk_rows(vocabulary, OptimConfig().head_chunk_mib, device)
    scores = Scores(full=HiddenDistributions(inputs.teacher_hidden_NG, Head(inputs.teacher_weight_VG), rows))
    estimator = estimators.build("full_vocab", divergence="reverse_kl")
    weights_BT = torch.full((1, positions), 1 / positions, device=device)
    micro = ScoredRollout(rollout, {"teacher": scores})
    return student_loss(student, micro, estimator, weights_BT, rows, fused).value


def trl(inputs: Inputs) -> Tensor:
    """TRL's kernel."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    student, teacher = inputs[:2], inputs[2:]
    per_token_N, _ = ChunkedDivergenceFunction.apply(*student, None, *teacher, None, 1.0)
    return per_token_N.mean()


def dense(inputs: Inputs) -> Tensor:
    """All logits at once."""
    student_NV = (inputs.hidden_NH @ inputs.weight_VH.T).log_softmax(-1)
    teacher_NV = (inputs.teacher_hidden_NG @ inputs.teacher_weight_VG.T).log_softmax(-1)
    return (student_NV.exp() * (student_NV - teacher_NV)).sum(-1).mean()


IMPLEMENTATIONS: dict[str, Callable[[Inputs], Tensor]] = {"ours": ours, "dense": dense, "trl": trl}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One case.

    Args:
        job: `implementation`, `positions`, `vocabulary`, `width`, `teacher_width`, and how many `runs` are timed.

    Returns:
        The median of `seconds`, forward and backward; `working_mib`; the `loss`, for comparison.
    """
    implementation, sizes = job["implementation"], (job["width"], job["teacher_width"])
    compute = IMPLEMENTATIONS[implementation]
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=implementation != "dense")
    inputs, small = (make_inputs(n, v, *sizes) for n, v in ((job["positions"], job["vocabulary"]), (8, 64)))
    if implementation == "dense":
        inputs, small = (x._replace(teacher_hidden_NG=x[2].float(), teacher_weight_VG=x[3].float())
                         for x in (inputs, small))  # fmt: skip
    with autocast:
        compute(small).backward()  # so that what the first call loads of the libraries is there already
        before_mb, seconds = resident_mb(), []
        reset_peak()
        for number in range(1 + job["runs"]):
            inputs.hidden_NH.grad = inputs.weight_VH.grad = None
            start = time.perf_counter()
            loss = compute(inputs)
            loss.backward()
            seconds.append(time.perf_counter() - start)
            if number == 0:
                gradients_mb = sum(x.nbytes for x in inputs[:2]) / 1e6
                working_mib = (peak_mb() - before_mb - gradients_mb) * MIB_OF_MB
    return {"seconds": statistics.median(seconds[1:]), "working_mib": working_mib, "loss": loss.item(),
            "threads": torch.get_num_threads()}  # fmt: skip


if __name__ == "__main__":
    answer(measure)
