"""Two ways to compute one teacher differ by rounding alone: in bf16 that reaches the student's gradient, in fp32 not.

The rows of the teacher run packed or padded, on one device. Two devices are two such ways.
"""

import pytest
import torch

from lit_opd import estimators
from lit_opd.config import PACKAGE_FOLDER, StudentConfig, TeacherConfig
from lit_opd.data.arithmetic import problems
from lit_opd.functional import token_weights
from lit_opd.models import Pair
from lit_opd.models.forward import PaddedForward
from lit_opd.objective import student_loss
from lit_opd.rollout import LocalEngine, uniforms
from lit_opd.teachers import LocalScorer, wanted_by
from lit_opd.types import PromptBatch, Prompts, SamplingLaw, ScoredRollout

CPU = torch.device("cpu")


def gradient(name, dtype, padded):
    student, teacher = f"{PACKAGE_FOLDER}/tiny/student", f"{PACKAGE_FOLDER}/tiny/teacher"
    estimator = estimators.build(name)
    pair = Pair(StudentConfig(student), TeacherConfig(path=teacher, dtype=dtype), estimator)
    model = pair.load("teacher", CPU)
    if padded:
        model.__class__ = type("Padded", (type(model),), {"forward": PaddedForward("as another device would")})
    texts = [row["prompt"] for row in problems(split="train", size=32, seed=0)]
    ids = [pair.student.tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, ids))
    ids_BP = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask_BP = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in ids])
    batch = PromptBatch(Prompts(ids_BP, mask_BP), [{}] * len(ids), 0, [*range(len(ids))])
    law, numbers_BT = SamplingLaw(), uniforms((0, 0), batch.draws, 1, 16)
    rollout = LocalEngine().sample(pair.student, batch, law, 1, numbers_BT)
    scores = LocalScorer(model, 64).score(rollout, wanted_by(estimator))
    weights_BT = token_weights(rollout.mask_BT, "token_mean", rollout.mask_BT.sum(), torch.tensor(len(ids)))
    student_loss(pair.student, ScoredRollout(rollout, {"teacher": scores}), estimator, weights_BT, 64).value.backward()
    return torch.cat([p.grad.flatten() for p in pair.student.model.parameters()]).double()


@pytest.mark.parametrize("name", ["token", "sequence", "full_vocab", "teacher_topk"])
def test_a_teacher_in_bf16_moves_the_gradient_and_one_in_fp32_does_not(name):
    gaps = {}
    for dtype in ("float32", "bfloat16"):
        packed, padded = (gradient(name, dtype, way) for way in (False, True))
        gaps[dtype] = float((packed - padded).norm() / packed.norm())
    print(f"\n{name}: {gaps['float32']:.0e} with a teacher in fp32, {gaps['bfloat16']:.0e} in bf16")
    assert gaps["float32"] < 1e-5
    assert 1e-3 < gaps["bfloat16"] < 0.5
