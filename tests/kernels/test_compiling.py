"""The kernels compile for a GPU, where there is none."""

import pytest
from compiling import compiled

pytest.importorskip("triton", reason="it needs triton")

FLOATS = ("scale", "softcap", "cool", "teacher_scale", "teacher_softcap", "teacher_cool", "weight")
POINTERS = ("found", "normalisers", "by_logps", "by_all", "mean", "by_divergence")
TYPES = dict.fromkeys(FLOATS, "fp32") | dict.fromkeys(POINTERS, "*fp32") | {"ids": "*i64"}


def head(student, teacher, capped, **constants):
    constants |= {"STUDENT_CAPPED": capped, "TEACHER_CAPPED": capped, "BLOCK": 4096}
    return {"TEACHER": True} | constants, TYPES | {"student": f"*{student}", "teacher": f"*{teacher}"}


@pytest.mark.slow
def test_the_head():
    spilt = compiled(
        "head",
        _read=[head("bf16", "bf16", False, ENTROPIES=False)],
        _sum=[head("bf16", "bf16", False, DIVERGENCE="skew_reverse_kl")],
        _write=[head("bf16", "bf16", False, DIVERGENCE="reverse_kl"), head("fp32", "bf16", True, DIVERGENCE="jsd")],
    )
    assert spilt == [0] * 4
