"""The audit tells which fast paths a run would take, and warns of those that compute something else."""

from dataclasses import replace

import pytest
from lab.audit.test_audit import configured

from lit_opd.fast_paths import Verdict
from lit_opd.lab.audit import paths_here as room
from lit_opd.lab.audit.evidence import gather
from lit_opd.lab.audit.paths_here import fast_paths
from lit_opd.models import proofs
from lit_opd.models.packed_attention import attend

TAKEN = Verdict("flash attention", True, "1 ms against 2 ms, off by 0.001", 0.001, 1e-3, 2e-3)
LEFT = {
    "slower": (Verdict("flash attention", False, "2 ms against 1 ms, off by 0.001", 0.001, 2e-3, 1e-3), "pass"),
    "off": (Verdict("flash attention", False, "off by 0.3, where rounding explains 0.03", 0.3), "warn"),
    "fails": (Verdict("flash attention", False, "on a probe, RuntimeError: no kernel", failed=True), "warn"),
    "unfit": (Verdict("flash attention", False, "attention has dropout"), "pass"),
}


@pytest.fixture(scope="module")
def evidence():
    return gather(configured("data.batch_size=4"))


def test_on_a_cpu_and_by_the_plain_paths_nothing_is_tried(evidence):
    assert (fast_paths(evidence).verdict, fast_paths(evidence).found) == ("pass", "none is tried on a CPU")
    plain = replace(evidence.config, optim=replace(evidence.config.optim, paths="plain"))
    assert fast_paths(replace(evidence, config=plain)).found == "optim.paths=plain"


@pytest.mark.parametrize(("verdict", "expected"), [(TAKEN, "pass"), *LEFT.values()], ids=["taken", *LEFT])
def test_a_path_that_differs_or_fails_is_warned_of(verdict, expected, evidence, monkeypatch):
    def takes(model, rows, choice):
        model.forward.attend = "another"
        return verdict

    monkeypatch.setattr(proofs, "prove_attention", takes)
    monkeypatch.setattr(proofs, "prove_parts", lambda *_: Verdict("fused layers", True, "faster"))
    distiller, student = evidence.distiller, evidence.student
    monkeypatch.setattr(room, "_why_none", lambda *_: None)
    monkeypatch.setattr(room.LocalEngine, "prove", lambda *_: [Verdict("captured decoding", True, "faster")])
    monkeypatch.setattr(type(distiller), "prove_head", lambda *_: Verdict("fused head", False, "unfit"))
    monkeypatch.setattr(type(distiller), "score", lambda *_: [None])
    found = fast_paths(evidence)
    assert found.verdict == expected
    assert str(replace(verdict, name="flash attention of the student")) in found.found
    assert found.found.startswith("captured decoding: the fast path (faster); flash attention of the student: ")
    assert student.forward.attend is attend  # what else is audited is the plain path
