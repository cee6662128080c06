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
        "head_rows",
        _read=[head("bf16", "bf16", False, ENTROPIES=False)],
        _sum=[head("bf16", "bf16", False, DIVERGENCE="skew_reverse_kl")],
        _write=[head("bf16", "bf16", False, DIVERGENCE="reverse_kl"), head("fp32", "bf16", True, DIVERGENCE="jsd")],
    )
    assert spilt == [0] * 4


@pytest.mark.slow
def test_decoding():
    names = "query", "key", "value", "mixed", "cache", "qk"
    bf16 = dict.fromkeys(names, "*bf16")
    fp32 = dict.fromkeys(("partial", "peak", "total", "cos", "sin", "q_norm", "k_norm", "weight"), "*fp32")
    types = bf16 | fp32 | {"first": "*i64", "column": "*i64", "scale": "fp32", "epsilon": "fp32"}
    size = {"SIZE": 128, "WIDE": 128}
    attention = compiled(
        "decode_attention",
        _attend=[({"SHARES": 2, "PADDED": 16, "BLOCK": 64} | size, types)],
        _merge=[({"PARTS": 2} | size, types)],
    )
    layer = compiled(
        "decode_layer",
        _rotate_and_store=[({"HEADS": 16, "GROUPS": 8, "NORMS": norms} | size, types) for norms in (True, False)],
    )
    numbers = dict.fromkeys(("scale", "factor", "softcap"), "fp32") | {"uniforms": "*fp64", "ids": "*i64"}
    numbers |= {"logits": "*bf16", "peak": "*fp32", "total": "*fp32", "logps": "*fp32"}
    drawing = compiled(
        "token_draw",
        _block_sums=[({"CAPS": True, "BLOCK": 2048}, numbers)],
        _invert=[({"CAPS": False, "BLOCK": 2048, "BLOCKS": 128}, numbers)],
    )
    assert attention + layer + drawing == [0] * 6
