"""What registering an estimator refuses."""

import pytest

from lit_opd import estimators
from lit_opd.errors import UserError
from lit_opd.estimators.oracle.batches import example_batch, loss_and_gradients


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"family": "tokens"}, r"register_estimator\('mine'\)\.family: expected one of token, sequence, hybrid"),
        (
            {"needs": "logits"},
            r"\('mine'\)\.needs: expected one of token, support, full, found 'logits'",
        ),
        ({"needs": "token+klx"}, r"register_estimator\('mine'\)\.needs: .* Did you mean 'kl'\?"),
        ({"at_equal": "always"}, r"register_estimator\('mine'\)\.at_equal: expected one of sample, expectation, never"),
        ({"family": "sequence", "needs": "full"}, r"expected family 'token' where needs is 'support' or 'full'"),
        ({"needs": "token+rewards"}, r"slices of positions have no rows, found family 'token'\. Choose another"),
        ({"needs": "token+groups"}, r"slices of positions have no rows, found family 'token'\. Choose another"),
    ],
    ids=str,
)
def test_a_declaration_that_cannot_hold_is_refused(declared, message):
    with pytest.raises(UserError, match=message):
        estimators.register_estimator("mine", **declared)
    assert "mine" not in estimators.names()


def test_a_name_belongs_to_one_file():
    with pytest.raises(UserError, match=r"register_estimator\('token'\): expected a new name, found a registered one"):
        estimators.register_estimator("token")(lambda tokens: None)


@pytest.mark.parametrize("name", sorted(set(estimators.names()) - {"mix"}))
def test_a_name_alone_is_an_estimator(name):
    """All but a sum whose terms are the user's; what a limit is by default, small models need not meet."""
    estimator, spec = estimators.build(name), estimators.get(name)
    loss, gradients = loss_and_gradients(estimator, example_batch(estimator))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.any() for gradient in gradients.values())  # a step with it moves the student
    assert all(spec.defaults[key] != value for key, value in spec.small.items())


def test_a_sum_has_no_terms_of_its_own():
    with pytest.raises(UserError, match="missing a required argument: 'terms'"):
        estimators.build("mix")
