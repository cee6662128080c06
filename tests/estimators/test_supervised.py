"""Cross-entropy of demonstrations, by exact enumeration."""

from dataclasses import replace

import pytest
import torch

from lit_opd import estimators
from lit_opd.estimators.oracle import TabularPair, exact_gradient, expected_gradient, second_moment
from lit_opd.estimators.supervised import supervised


@pytest.mark.parametrize("stop", [False, True])
def test_where_the_teacher_writes_it_is_the_forward_kl_at_its_prefixes(stop):
    pair = TabularPair.random(4, 3, seed=1, stop=stop)
    taught = replace(pair, sampler_logits_CV=pair.teacher_logits_CV)

    def demonstrated(tokens):
        return supervised(replace(tokens, student_wrote_BT=torch.zeros_like(tokens.mask_BT)))

    found = expected_gradient(taught, estimators.build(demonstrated))
    torch.testing.assert_close(found, exact_gradient(taught, "forward_kl"), rtol=0, atol=1e-14)
    assert (found - exact_gradient(pair, "forward_kl")).norm() > 1e-2


def test_what_the_student_wrote_is_not_imitated():
    assert second_moment(TabularPair.random(4, 3, seed=1), estimators.build("supervised")) == 0
