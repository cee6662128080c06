"""What a layer does outside of its products compiles for Hopper, in published sizes, and stays in registers."""

import pytest

compiled = pytest.importorskip("compiling").compiled

LOW, WIDE = "*bf16", "*fp32"
SIZES = {"HEADS": 32, "BOTH": 40, "SIZE": 128, "TALL": 64, "WIDE": 128}
TURN = {"cos": WIDE, "sin": WIDE, "q_norm": WIDE, "k_norm": WIDE, "scale": WIDE}
NORM = {"x": WIDE, "weight": WIDE, "scale": WIDE}


@pytest.mark.slow
def test_kernels_of_a_layer_compile_and_spill_nothing():
    turned = TURN | {"qk": LOW, "out": LOW, "epsilon": "fp32"}
    turned_back = TURN | {"upstream": LOW, "qk": LOW, "to_qk": LOW, "sums": WIDE}
    silu_back = dict.fromkeys(("upstream", "gate", "up", "to_gate", "to_up"), LOW)
    spilt = compiled(
        "layer",
        _norm=[({"WIDE": 4096}, NORM | {"normed": LOW, "epsilon": "fp32"})],
        _norm_backward=[({"WIDE": 4096}, NORM | {"upstream": LOW, "to_x": WIDE, "sums": WIDE})],
        _turned=[(SIZES | {"NORMS": norms}, turned) for norms in (True, False)],
        _turned_backward=[(SIZES | {"NORMS": norms}, turned_back) for norms in (True, False)],
        _gated_silu=[({"BLOCK": 1024}, {"gate": LOW, "up": LOW, "inner": LOW})],
        _gated_silu_backward=[({"BLOCK": 1024}, silu_back)],
    )
    assert spilt == [0] * 8
