from types import SimpleNamespace

import pytest
import torch

from lit_opd.lab.audit.prefixes import student_prefixes
from lit_opd.lab.audit.readings import Readings


def positions(entropy, nll, top):
    values = {name: torch.zeros(len(entropy)) for name in Readings.__dataclass_fields__}
    values |= {
        "entropy_N": torch.tensor(entropy),
        "teacher_logps_N": -torch.tensor(nll),
        "top_logps_N": torch.tensor(top).log(),
    }
    return Readings(**values)


OWN = positions([0.25, 0.75], [0.5, 0.5], [0.9, 0.9])


def test_a_teacher_as_sure_as_on_its_own_completions_passes():
    found = student_prefixes(
        SimpleNamespace(readings=positions([0.5, 0.75], [1.0, 3.0], [0.9, 0.7]), shown_readings=OWN)
    )
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.found == ("on the student's prefixes entropy 0.62, NLL 2.00, mass on first choices 0.80; on its own "
                           "prefixes entropy 0.50, NLL 0.50, mass on first choices 0.90")  # fmt: skip
    assert found.numbers["student_nll"] == pytest.approx(2.0)


def test_a_teacher_that_is_lost_on_the_students_prefixes_is_told():
    found = student_prefixes(
        SimpleNamespace(readings=positions([2.0, 1.0], [4.0, 4.0], [0.3, 0.3]), shown_readings=OWN)
    )
    assert found.verdict == "warn"
    assert "set rollout.student_share below 1" in found.fix


def test_more_entropy_of_a_teacher_that_is_never_sure_passes():
    unsure = positions([2.0, 2.0], [2.0, 2.0], [0.3, 0.3])
    found = student_prefixes(
        SimpleNamespace(readings=positions([3.0, 3.0], [4.0, 4.0], [0.3, 0.3]), shown_readings=unsure)
    )
    assert found.verdict == "pass"


def test_on_its_own_completions_the_nll_is_about_the_entropy(make_evidence):
    numbers = student_prefixes(make_evidence()).numbers
    assert numbers["own_nll"] == pytest.approx(numbers["own_entropy"], rel=0.15)
    assert numbers["student_nll"] > numbers["own_nll"]
