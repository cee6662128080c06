"""Composition: the list `estimator.terms`, and today's names as short forms of it."""

import pytest
import torch

from lit_opd import estimators
from lit_opd.config import EstimatorConfig, as_section, load_config
from lit_opd.errors import UserError
from lit_opd.estimators import build, build_from
from lit_opd.estimators.oracle.batches import example_batch
from lit_opd.estimators.oracle.laws import broken_laws
from lit_opd.linter.probes import probe

FORWARD = {"name": "full_vocab", "weight": 0.5, "kwargs": {"divergence": "forward_kl"}}
DECAYED = {"name": "sequence", "weight": 2, "weighting": {"name": "position_decay", "kwargs": {"half_life": 2.0}}}
LISTED = [FORWARD, DECAYED, {"name": "teacher_topk", "weight": 1.0, "kwargs": {"k": 2}}]
SHORT = {
    "full_vocab": {"weight": 0.5, "divergence": "forward_kl"},
    "position_decay": {"weight": 2, "base": "sequence", "half_life": 2.0},
    "teacher_topk": {"weight": 1.0, "k": 2},
}
PATHS = ("student.path=student", "teacher.path=teacher")


def of(terms, **section):
    return build_from(as_section(EstimatorConfig, {"terms": terms, **section}, "estimator"))


def described(estimator):
    return [(t.weight, t.estimator.spec.name, t.estimator.kwargs, t.weighting is not None, t.needs)
            for t in estimator.terms]  # fmt: skip


def test_terms_are_the_mix_that_the_short_form_says():
    listed, short = of(LISTED), build("mix", terms=SHORT)
    assert described(listed) == described(short)
    assert [term.weight for term in listed.terms] == [0.5, 2, 1.0]
    found, expected = (estimator(example_batch(estimator)) for estimator in (listed, short))
    assert torch.equal(found.loss_BT, expected.loss_BT)
    assert torch.equal(found.kl_BT, expected.kl_BT)
    assert listed.needs == short.needs
    assert listed.contract == short.contract
    assert broken_laws(listed) == {}
    assert [probe(term) for term in listed.terms] == [probe(term) for term in short.terms]


def test_a_weighting_of_a_term_is_that_weighting_with_it_as_base():
    named, tokens = build("position_decay", half_life=2.0, base="sequence"), example_batch(build("sequence"))
    listed = of([{**DECAYED, "weight": 1.0}])
    assert torch.equal(listed(tokens).loss_BT, named(tokens).loss_BT)
    plain = of([{"name": "position_decay", "weight": 1.0, "kwargs": {"half_life": 2.0, "base": "sequence"}}])
    assert described(plain) == described(listed)


def test_an_estimator_may_stand_twice():
    listed = of([{"name": "full_vocab", "weight": 1.0}, FORWARD])
    assert [term.estimator.keywords["divergence"] for term in listed.terms] == ["reverse_kl", "forward_kl"]


def test_a_configuration_lists_terms(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("estimator:\n  terms:\n    - {name: token, weight: 0.5}\n    - {name: supervised, weight: 1}\n")
    config = load_config([file], PATHS)
    assert config.estimator.name == "mix"
    assert described(build_from(config.estimator)) == described(build("mix", terms={"token": 0.5, "supervised": 1}))
    assert build_from(load_config([], PATHS).estimator).spec.name == "full_vocab"


@pytest.mark.parametrize(
    "section", [{"name": "token"}, {"name": "full_vocab"}, {"name": "mix", "kwargs": {"terms": {"token": 1.0}}}]
)
def test_terms_and_a_name_are_two_answers(section):
    with pytest.raises(UserError, match=r"estimator\.terms: expected neither estimator\.name nor estimator\.kwargs"):
        of(LISTED, **section)


@pytest.mark.parametrize("word", ["estimator.name=token", "estimator.name=full_vocab"])
def test_a_name_beside_a_file_of_terms_is_refused_until_it_is_mix(tmp_path, word):
    file = tmp_path / "run.yaml"
    file.write_text("estimator: {terms: [{name: token, weight: 1}]}\n")
    for arguments in [([file], (*PATHS, word)), ([], (*PATHS, "estimator.terms=[{name: token, weight: 1}]", word))]:
        with pytest.raises(UserError, match=r"estimator\.terms: .*Drop one, or set estimator\.name=mix\.$"):
            build_from(load_config(*arguments).estimator)
    assert build_from(load_config([file], (*PATHS, "estimator.name=mix")).estimator).terms


def test_keywords_of_the_unnamed_estimator_are_those_of_full_vocab(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("estimator: {kwargs: {divergence: jsd}}\n")
    assert load_config([file], PATHS).estimator.name == "full_vocab"
    assert load_config([file], (*PATHS, "estimator.name=full_vocab")).estimator.kwargs == {"divergence": "jsd"}
    assert load_config([file], (*PATHS, "estimator.name=token")).estimator.kwargs == {}


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (["token"], r"estimator\.terms\[0\]: expected a mapping with the key name"),
        ([{"weight": 1.0}], r"estimator\.terms\[0\]: expected a mapping with the key name"),
        ([FORWARD, {"name": "token", "wait": 1.0}], r"estimator\.terms\[1\]\.wait: .* Did you mean 'weight'\?"),
        ([FORWARD, {"name": "tokens", "weight": 1.0}], r"estimator\.terms\[1\]\.name: .* Did you mean 'token'\?"),
        ([{**FORWARD, "kwargs": {"skw": 1}}], r"estimator\.terms\[0\]\.kwargs\.skw: .* Did you mean 'skew'\?"),
        ([{**FORWARD, "kwargs": {"skew": 1}}], r"estimator\.terms\[0\]\.kwargs: .* skew must lie in \[0, 1\)"),
        ([{**DECAYED, "weighting": {"name": "token"}}], r"estimator\.terms\[0\]\.weighting\.name: .* found 'token'"),
        ([{**DECAYED, "weighting": {"name": "tip", "kwargs": {"share": 0.0}}}],
         r"estimator\.terms\[0\]\.weighting\.kwargs: .* share must lie in"),
        ([{**DECAYED, "weighting": "tip"}], r"estimator\.terms\[0\]\.weighting: expected a mapping with the key name"),
        ([{**DECAYED, "name": "tip"}], r"estimator\.terms\[0\]\.weighting: expected none, found one beside .*'tip'"),
        ([FORWARD, {"name": "minillm", "weight": 1.0}], "a mix cannot hold a mix, found 'minillm'"),
        ([FORWARD, {"name": "token", "weight": -0.5}], r"estimator\.terms: .* must have a positive sum"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_no_term_is_refused_in_one_line(terms, message):
    with pytest.raises(UserError, match=message) as caught:
        of(terms)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("weight", [{}, {"weight": None}, {"weight": "1"}, {"weight": True}], ids=str)
def test_a_term_without_a_weight_is_refused(weight):
    with pytest.raises(UserError, match="term 'token' needs a number as its weight, found"):
        of([FORWARD, {"name": "token", **weight}])
    with pytest.raises(UserError, match="term 'token' needs a number as its weight, found"):
        build("mix", terms={"full_vocab": 1.0, "token": weight})


def test_registered_functions_stay_as_they_were_written():
    """No signature is made up: what a configuration may set is read from the function, and `base` of its kind."""
    assert estimators.get("position_decay").defaults == {"half_life": 256.0, "base": "token"}
    assert estimators.get("minillm").defaults == {"single_step_weight": 1.0}
    with pytest.raises(UserError, match="estimator.kwargs.base: expected a keyword of minillm"):
        build("minillm", base="token")
