"""Endings that mean the same are merged in a run: which, what it sees of them, and what is refused."""

import pytest
import torch

from lit_opd import DistillationModule
from lit_opd.config import EstimatorConfig
from lit_opd.errors import LintWarning, UserError
from lit_opd.teachers import SUPPORT, TOKEN, Scorer

SECTION = {"max_new_tokens": 6, "num_completions": 4}


@pytest.fixture
def ends(make_model, make_module):
    """Makes a module whose models end with the given tokens."""

    def make(student=(2,), teacher=(5,), estimator="token", **keywords):
        models = make_model(1), make_model(2)
        for model, stops in zip(models, (student, teacher), strict=True):
            model.generation_config.eos_token_id = [2, *stops]
        keywords = {"rollout": SECTION, "evaluation": {"num_completions": 1}} | keywords
        return make_module(*models, estimator, **keywords)

    return make


def test_auto_is_the_union_of_both_models_stop_tokens_the_students_first(ends):
    assert ends((9, 2), (5,), merged_stops="auto").merged == [[2, 9, 5]]
    with pytest.warns(LintWarning, match=r"merged_stops: auto merges nothing.*the same stop tokens, \[2\]"):
        assert ends((2,), (2,), merged_stops="auto").merged == []


def test_stop_tokens_of_a_folder_are_known_before_its_weights_load(make_model, save_model, student_path, monkeypatch):
    teacher = make_model(2)
    teacher.generation_config.eos_token_id = [2, 7]
    folder = save_model(teacher)
    monkeypatch.setattr("lit_opd.models.pair.load_frozen", lambda *_: pytest.fail("loaded"))
    assert DistillationModule(student_path, folder, merged_stops="auto").merged == [[2, 7]]
    itself = DistillationModule(student_path, {"kind": "student", "prompt": "{prompt}"}, merged_stops=[[2, "7"]])
    assert itself.merged == [[2, 11]]


@pytest.mark.parametrize("estimator", ["full_vocab", "token", "sequence", "teacher_topk", "importance_reverse_kl"])
def test_a_run_sees_groups_in_training_and_tokens_in_evaluations(estimator, ends, fit, make_trainer, make_data):
    """The teacher is the student with two tokens exchanged: in groups they are one law, in evaluations they are not."""
    exchanged, found = [2, 5], {}
    for merged in (None, [exchanged]):
        kwargs = {"k": 9} if "topk" in estimator else {}
        module = ends(estimator=estimator, estimator_kwargs=kwargs, merged_stops=merged)
        teacher = module.pair._frozen["teacher"][0]
        teacher.load_state_dict(module.model.state_dict())
        with torch.no_grad():
            weight = teacher.get_output_embeddings().weight
            weight[exchanged] = weight[exchanged[::-1]].clone()
        fit(module)
        metrics = module.trainer.callback_metrics
        found[merged is None] = metrics["train/grad_norm"]
        assert module.proved
        assert metrics["rollout/sampler_gap"].abs() < 1e-5
        make_trainer(limit_val_batches=1).validate(module, make_data(), verbose=False)
        assert module.results["val"]["reverse_kl"].mean > 1e-3
    assert found[False] < 1e-4 < 1e-2 < found[True]


class TokensAlone(Scorer):
    """A scorer that knows single tokens."""

    name, gives = "teacher", frozenset({TOKEN, SUPPORT})


REFUSED = [
    ({"merged_stops": [[2, 99]]}, r"estimator\.merged_stops: expected single tokens.*found 99"),
    ({"merged_stops": [[2, "nonsense"]]}, r"estimator\.merged_stops: expected single tokens.*found 'nonsense'"),
    ({"merged_stops": [[2, 5], [5, 7]]}, r"estimator\.merged_stops: expected every token in one group.*\[5\] twice"),
    ({"merged_stops": [[2, "<eos>"]]}, r"estimator\.merged_stops: expected every token in one group.*\[2\] twice"),
    ({"merged_stops": [[2, 5]], "masked_tokens": [5]}, r"estimator\.merged_stops: expected no masked token.*\[5\]"),
    ({"merged_stops": "auto", "masked_tokens": [5]}, r"estimator\.merged_stops: expected no masked token.*\[5\]"),
    *(({"merged_stops": value}, r"estimator\.merged_stops: expected null, auto, or a list of groups")
      for value in ("all", [2, 5], [[2]], [[]], 3, {"a": [2, 5]})),
    ({"merged_stops": [[2, 1.5]]}, r"estimator\.merged_stops\[0\]\[1\]"),
]  # fmt: skip


@pytest.mark.parametrize(("keywords", "message"), REFUSED)
def test_what_cannot_be_merged_is_refused_in_one_line(keywords, message, ends):
    with pytest.raises(UserError, match=message) as caught:
        ends(**keywords)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("merged", ["auto", [[2, 5]]])
def test_a_teacher_that_scores_single_tokens_is_refused(merged, student_path):
    with pytest.raises(UserError, match=r"estimator\.merged_stops: expected null: this teacher does not tell"):
        DistillationModule(student_path, TokensAlone(), "token", merged_stops=merged)


@pytest.mark.filterwarnings("ignore::lit_opd.errors.LintWarning")
def test_a_teacher_whose_stops_are_unknown_needs_named_groups(student_path):
    """One that merges may do so, but nobody here knows what ends its completions."""

    class Merging(TokensAlone):
        gives = frozenset({TOKEN, SUPPORT, "merged"})

    assert DistillationModule(student_path, Merging(), "token", merged_stops=[[2, 5]]).merged == [[2, 5]]
    with pytest.raises(UserError, match=r"estimator\.merged_stops: expected groups of tokens.*Name them"):
        DistillationModule(student_path, Merging(), "token", merged_stops="auto")


def test_the_default_merges_nothing():
    assert EstimatorConfig().merged_stops is None
