"""What an estimator may ask for: declared in words, and filled by one table wherever a batch is made."""

from dataclasses import fields
from enum import StrEnum

import pytest
import torch

from lit_opd import estimators
from lit_opd.errors import UserError
from lit_opd.estimators.asking import ask
from lit_opd.estimators.needs import FILLERS, Filler, Seen, fillings, read_needs, write_needs
from lit_opd.estimators.oracle import verify
from lit_opd.estimators.oracle.batches import example_batch
from lit_opd.estimators.oracle.laws import broken_laws
from lit_opd.functional import Head, HiddenDistributions
from lit_opd.functional.divergences import forward_kl
from lit_opd.objective import CountedPositions
from lit_opd.types import Estimate, Need, Scores, TokenBatch

OF_THE_SAMPLES = {"completion_ids_BT", "student_wrote_BT"}


def seen(vocabulary=5, k=2):
    logits = torch.randn(2, 3, vocabulary, generator=torch.Generator().manual_seed(0))
    student, teacher = logits.log_softmax(-1)
    one = torch.zeros(3)
    return Seen(student, teacher, k=k, reference_logps=one, rewards_B=one, groups_B=one.long())


def test_every_need_fills_fields_of_its_own_and_every_field_has_its_need():
    assert list(FILLERS) == list(Need)
    filled = [name for need in Need for name in fillings([need], seen())]
    optional = {f.name for f in fields(TokenBatch) if f.default is None} - OF_THE_SAMPLES
    assert sorted(filled) == sorted(optional)
    assert {need: set(fillings([need], seen())) for need in Need} == {n: set(f.fields) for n, f in FILLERS.items()}


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        ("token", {Need.TOKEN}),
        ("support+entropy", {Need.SUPPORT, Need.ENTROPY}),
        ("token+entropy+kl+rewards+groups+reference", set(Need) - {Need.SUPPORT, Need.FULL}),
    ],
)
def test_needs_are_written_as_they_were_read(words, needs):
    assert read_needs("needs", words) == needs
    assert write_needs(read_needs("needs", words)) == words


def test_a_sum_needs_what_its_terms_do():
    minillm = estimators.build("minillm")
    assert write_needs(minillm.spec.needs) == "terms"
    assert minillm.needs == {Need.TOKEN, Need.FULL}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("kl", r"needs: expected one of token, support, full, found 'kl'"),
        ("token+full", r"needs: expected one of entropy, kl, rewards, groups, reference, found 'full'"),
        ("token+entropie", r"found 'entropie'\. Did you mean 'entropy'\?"),
    ],
)
def test_words_that_are_no_needs_are_refused(words, message):
    with pytest.raises(UserError, match=message):
        read_needs("needs", words)


def test_a_support_fits_into_the_vocabulary():
    with pytest.raises(ValueError, match="a support of 6 tokens does not fit into a vocabulary of 5"):
        fillings([Need.SUPPORT], seen(vocabulary=5, k=6))


def reads_the_kl(tokens):
    """Reads what it does not ask for."""
    return Estimate(tokens.student_logps_BT * tokens.kl_BT, tokens.teacher_logps_BT)


def is_wrong_by_itself(tokens):
    """Reads a field that is empty and need not be filled, and fails for another reason."""
    assert tokens.support_ids_BTK is None
    return Estimate(tokens.student_logps_BT @ torch.zeros(1), tokens.teacher_logps_BT)


@pytest.mark.parametrize(("function", "remedy"), [
    (reads_the_kl, r"kl_BT is empty, for it was not asked for: register_estimator\(\.\.\., needs='token\+kl'\)\.$"),
    (is_wrong_by_itself, r"line \d+\)\. Correct it\.$"),
])  # fmt: skip
def test_training_names_the_need_of_an_empty_field(function, remedy):
    estimator = estimators.build(function)
    with pytest.raises(UserError, match=remedy):
        ask(estimator, example_batch(estimator))


class Toy(StrEnum):
    """A need that is not there."""

    FORWARD = "forward"


def weighed_by_forward_kl(tokens):
    """Reads what the toy fills."""
    weight = tokens.kl_BT.float() if tokens.kl_BT.dtype == torch.bfloat16 else tokens.kl_BT
    p, q = (x.to(weight.dtype) for x in (tokens.student_logps_BT, tokens.teacher_logps_BT))
    d = (p - q).detach()
    return Estimate(torch.where(tokens.mask_BT, weight * d, 0.0) * p, d)


def test_a_new_need_is_a_member_and_a_row_of_the_table(monkeypatch):
    """Then estimators may declare it, and training, the oracle and the laws fill it; the toy borrows a field."""

    def forward(seen):
        return {"kl_BT": forward_kl(seen.student_logps_V.detach(), seen.teacher_logps_V)}

    monkeypatch.setitem(FILLERS, Toy.FORWARD, Filler("position", forward))
    estimators.register_estimator("toy", needs="token+forward")(weighed_by_forward_kl)
    estimator = estimators.build("toy")
    assert write_needs(estimator.needs) == "token+forward"
    assert broken_laws(estimator) == {}
    assert not verify(estimator).dead
    assert example_batch(estimator).kl_BT is not None
    hidden_NH, weight_VH = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    scores = Scores(full=HiddenDistributions(hidden_NH, Head(weight_VH), rows=3))
    positions = CountedPositions(torch.tensor([0, 1, 2]), torch.zeros(3), scores)
    chunk = positions.chunk(torch.zeros(3, 3), slice(0, 3))
    p, q = torch.zeros(3, 3).log_softmax(-1), (hidden_NH @ weight_VH.T).log_softmax(-1)
    expected = (q.exp() * (q - p)).sum(-1)
    torch.testing.assert_close(chunk.tokens(estimator).kl_BT, expected)
    torch.testing.assert_close(chunk.summaries(estimator.needs)["kl_BT"], expected)
