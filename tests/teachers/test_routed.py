"""Several teachers: against each of them alone, dense references and enumeration; and what they hold in memory."""

import gc
import weakref
from dataclasses import replace

import lightning as L
import pytest
import torch
from teachers.teacher_servers import TeacherStandIn

from lit_opd import DistillationModule, PromptDataModule, estimators
from lit_opd.config import TeacherConfig
from lit_opd.errors import UserError
from lit_opd.estimators import registry
from lit_opd.estimators.oracle import TabularPair, expected_gradient, laws, samples
from lit_opd.functional import merge_ids, merge_logps
from lit_opd.models import LanguageModel, pair, taught_by
from lit_opd.runs.resuming import AT_A_RESUME
from lit_opd.teachers import LocalScorer, RoutedScorer, ServedScorer, Wanted
from lit_opd.teachers.combined import check_product
from lit_opd.types import SamplingLaw

ROWS = [{"prompt": p, "teacher": t} for p, t in zip(["1+2=", "7=", "12-9+3=", "5+5=", "80-1="], "abaab", strict=True)]
HINT = "1+1=2-{prompt}"
NAMES = ["token", "teacher_topk", "full_vocab", "sequence"]
KEYS = {"teacher_topk": {"k": 5}}


@pytest.fixture(scope="module")
def models(make_model):
    return {"a": make_model(2), "b": make_model(3, hidden_size=24), "c": make_model(4)}


@pytest.fixture
def rollout(make_model, make_batch, sample):
    """Ten completions, with a hole in their mask."""
    found = sample(make_model(1), make_batch(extra_padding=2), SamplingLaw(), num_completions=2)
    return found.uncount(found.ids_BT == 7)


def routed(rollout, *routes):
    """The rollout with one route for each of its five prompts."""
    return replace(rollout, routes_BM=torch.tensor(routes)[rollout.prompt_index_B])


def gradient(module, rollout, rows=None):
    """Loss and gradient of some rows, as parts of a step over the whole rollout."""
    distiller, tokens = module.assemble(None), rollout.mask_BT.sum()
    total = 0.0
    for micro in distiller.score(rollout, rows):
        weights = distiller.weights(micro.rollout.mask_BT, tokens, torch.tensor(len(rollout)))
        loss = distiller.estimate(micro, weights).value
        loss.backward()
        total += float(loss)
    return total, {name: weight.grad for name, weight in module.model.named_parameters()}


def check_same(found, expected, bound=1e-6):
    assert sum(float(g.norm()) for g in expected.values()) > 1e-3
    for name, other in expected.items():
        assert float((found[name] - other).norm()) <= bound * float(other.norm()) + 1e-9, name


@pytest.fixture
def scorers(models, tiny_tokenizer):
    return {n: LocalScorer(LanguageModel(m, tiny_tokenizer, n), 3, f"teachers.{n}") for n, m in models.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_routed_gradient_is_the_sum_of_those_of_each_teachers_rows(name, models, make_model, make_module, rollout):
    kwargs = {"estimator_kwargs": KEYS.get(name), "optim": {"micro_batch_tokens": 40}}
    mine = routed(rollout, [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    both = {key: models[key] for key in "ab"}
    loss, found = gradient(make_module(make_model(1), None, name, teachers=both, **kwargs), mine)
    expected, total = {}, 0.0
    for number, model in enumerate(both.values()):
        rows = torch.nonzero(mine.routes_BM[:, number]).flatten()
        part, single = gradient(make_module(make_model(1), model, name, **kwargs), rollout, rows)
        expected = {key: grad + expected.get(key, 0.0) for key, grad in single.items()}
        total += part
    check_same(found, expected)
    assert loss == pytest.approx(total, rel=1e-5, abs=1e-7)


def dense(models, rollout, full_logits):
    """Log-probabilities of every teacher, [M, N, V]."""
    found = [full_logits(model, rollout).detach().double().log_softmax(-1)[rollout.mask_BT] for model in models]
    return torch.stack(found)


MIXED = [[0.25, 0.75, 0.0], [1.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.25, 0.25, 0.5], [0.0, 1.0, 0.0]]


@pytest.mark.parametrize("combined", ["mixture", "product", "geometric"])
def test_several_teachers_of_a_row_say_what_their_distributions_do(combined, models, scorers, rollout, full_logits):
    """Of rows with one, two and three teachers, in the order of the rollout."""
    mine = routed(rollout, *MIXED)
    logps_MNV = dense(models.values(), rollout, full_logits)
    weights_MN1 = mine.routes_BM[torch.nonzero(mine.mask_BT)[:, 0]].T[..., None].double()
    if combined == "mixture":
        expected_NV = (weights_MN1 * logps_MNV.exp()).sum(0).log()
    else:
        expected_NV = (weights_MN1 * logps_MNV).sum(0)
    if combined == "geometric":
        expected_NV = expected_NV.log_softmax(-1)
    scorer = RoutedScorer(scorers, combined, rows=4)
    full = scorer.score(mine, Wanted(full=True)).full
    everything = slice(0, len(full))
    for part in (everything, slice(0, 1), slice(5, 17), slice(11, len(full))):
        torch.testing.assert_close(full.logps(part).double(), expected_NV[part], rtol=0, atol=2e-5)
    chosen = torch.arange(len(full) - 1, -1, -3)
    found = full[chosen].logps(slice(0, len(chosen))).double()
    torch.testing.assert_close(found, expected_NV[chosen], rtol=0, atol=2e-5)
    if combined == "geometric":
        return
    some = scorer.score(mine, Wanted(support=4))
    taken_N = expected_NV.gather(-1, mine.ids_BT[mine.mask_BT][:, None])[:, 0]
    torch.testing.assert_close(some.logps_N.double(), taken_N, rtol=0, atol=2e-5)
    torch.testing.assert_close(some.support_logps_NK.double(), expected_NV.topk(4).values, rtol=0, atol=2e-5)
    picked = expected_NV.gather(-1, some.support_ids_NK)
    torch.testing.assert_close(picked, some.support_logps_NK.double(), rtol=0, atol=2e-5)


def test_nothing_counted_is_scored_as_nothing(scorers, rollout):
    mine = routed(rollout, *MIXED)
    mine = mine.uncount(mine.mask_BT)
    for wanted in (Wanted(), Wanted(support=2), Wanted(full=True)):
        scores = RoutedScorer(scorers).score(mine, wanted)
        assert all(len(value) == 0 for value in vars(scores).values() if value is not None)


@pytest.mark.parametrize("name", NAMES)
def test_a_route_of_weight_1_is_the_single_teacher_to_the_bit(name, models, make_model, make_module, rollout):
    mine = routed(rollout, *[[0.0, 1.0, 0.0]] * 5)
    kwargs = {"estimator_kwargs": KEYS.get(name)}
    found = gradient(make_module(make_model(1), None, name, teachers=models, **kwargs), mine)
    expected = gradient(make_module(make_model(1), models["b"], name, **kwargs), rollout)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][key], grad) for key, grad in expected[1].items())


def exact_for_products():
    for name in registry.names():
        spec = registry.get(name)
        for keywords in laws.cases(spec) if spec.kind == "estimator" else ():
            yield pytest.param(estimators.build(name, **keywords), id=f"{name}-{keywords}")


@pytest.mark.parametrize("estimator", exact_for_products())
def test_a_product_is_the_weighted_sum_of_the_kls_where_it_is_let_pass(estimator, monkeypatch):
    """By enumeration: the expected gradient with sum_m w_m log q_m is that sum of the teachers' own."""
    try:
        check_product(estimator)
    except UserError:
        return
    unnormalised = lambda view, logits_CV: logits_CV[view.contexts_BT]  # noqa: E731
    monkeypatch.setattr(samples._View, "_log_softmax", unnormalised)
    one, other = (TabularPair.random(3, 2, seed) for seed in (0, 1))
    logps = [table.teacher_logits_CV.log_softmax(-1) for table in (one, other)]
    product = replace(one, teacher_logits_CV=0.3 * logps[0] + 0.7 * logps[1])
    parts = [expected_gradient(replace(one, teacher_logits_CV=table), estimator) for table in logps]
    expected = 0.3 * parts[0] + 0.7 * parts[1]
    torch.testing.assert_close(expected_gradient(product, estimator), expected, rtol=0, atol=1e-10)
    assert float(expected.norm()) > 1e-3


def test_a_product_is_refused_for_estimators_of_which_it_makes_something_else(models, make_model, make_module):
    keys = {"teachers": models, "teachers_combined": "product"}
    make_module(make_model(1), None, "token", **keys)
    for name in ("teacher_topk", "k3_loss", "entropy_weighted"):
        with pytest.raises(UserError, match=r"teachers_combined: expected an unbiased estimator of the reverse KL"):
            make_module(make_model(1), None, name, **keys)


KINDS = ["served", "student", "routed local", "routed served", "routed student"]


@pytest.mark.parametrize("name", ["token", "teacher_topk", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_scorer_gives_the_gradient_of_the_same_local_teacher(
    kind, name, models, make_model, make_module, fit, make_data, tiny_tokenizer
):
    """Each reads a hint that the student does not get; the model is the student before training."""

    def trained(teacher, key, **keys):
        rows = [row | {"teacher": "a"} for row in ROWS] if keys else ROWS
        data = make_data(rows, shown={key: {"prompt_template": HINT}}, teacher_column="teacher" if keys else None)
        module = make_module(
            make_model(1, initializer_range=0.2), teacher, name, estimator_kwargs=KEYS.get(name), **keys
        )
        record = fit(module, data=data)
        return float(record.metrics[0]["train/loss"]), record.gradients[0]

    expected = trained(make_model(1, initializer_range=0.2), "teacher")
    with TeacherStandIn(make_model(1, initializer_range=0.2), tiny_tokenizer).listening() as address:
        served = TeacherConfig(kind="served", server=address, prompt=HINT, patience_s=5.0)
        itself = TeacherConfig(kind="student", prompt=HINT)
        one = {"served": served, "student": itself, "local": make_model(1, initializer_range=0.2)}[kind.split()[-1]]
        several = {"teachers": {"b": models["b"], "a": one}}
        found = trained(None, "teachers.a", **several) if "routed" in kind else trained(one, "teacher")
    vectors = [torch.cat([one[name].flatten() for name in expected[1]]) for one in (found[1], expected[1])]
    assert float((vectors[0] - vectors[1]).norm()) <= 1e-6 * float(vectors[1].norm())
    assert found[0] == pytest.approx(expected[0], rel=1e-6, abs=1e-8)


def test_a_mixture_with_a_server_has_no_support(scorers, rollout, make_model, tiny_tokenizer):
    with TeacherStandIn(make_model(3), tiny_tokenizer).listening() as address:
        served = ServedScorer(TeacherConfig(kind="served", server=address, patience_s=5.0), tiny_tokenizer)
        scorer = RoutedScorer({"a": scorers["a"], "b": served})
        assert scorer.gives == {"token", "support"}
        assert scorer.longest == served.longest == served.meeting.context - 1
        scorer.score(routed(rollout, *[[0.5, 0.5]] * 5), Wanted())
        scorer.score(routed(rollout, *[[1.0, 0.0], [0.0, 1.0]] * 2, [1.0, 0.0]), Wanted(support=3))
        with pytest.raises(UserError, match=r"estimator\.name: expected one that compares no support"):
            scorer.score(routed(rollout, *[[0.5, 0.5]] * 5), Wanted(support=3))


ENDS = [[2, 5, 9]]


def test_merged_endings_of_a_mixture_have_the_probability_of_all_in_the_mixture(models, scorers, rollout, full_logits):
    mine = routed(rollout, *MIXED)
    weights_MN1 = mine.routes_BM[torch.nonzero(mine.mask_BT)[:, 0]].T[..., None].double()
    merged_NV = merge_logps((weights_MN1 * dense(models.values(), rollout, full_logits).exp()).sum(0).log(), ENDS)
    ids_N, merged = mine.ids_BT[mine.mask_BT], tuple(map(tuple, ENDS))
    assert torch.isin(ids_N, torch.tensor(ENDS[0][1:])).any()
    taken_N = merged_NV.gather(-1, merge_ids(ids_N, ENDS)[:, None])[:, 0]
    for wanted in (Wanted(merged=merged), Wanted(support=4, merged=merged)):
        scores = RoutedScorer(scorers).score(mine, wanted)
        torch.testing.assert_close(scores.logps_N.double(), taken_N, rtol=0, atol=2e-5)
    torch.testing.assert_close(scores.support_logps_NK.double(), merged_NV.topk(4).values, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_merged_endings_of_one_of_several_teachers_are_those_of_the_single_teacher(
    name, models, make_model, make_module, rollout
):
    mine, kwargs = routed(rollout, *[[0.0, 1.0, 0.0]] * 5), {"estimator_kwargs": KEYS.get(name), "merged_stops": ENDS}
    found = gradient(make_module(make_model(1), None, name, teachers=models, **kwargs), mine)
    expected = gradient(make_module(make_model(1), models["b"], name, **kwargs), rollout)
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][key], grad) for key, grad in expected[1].items())
    plain = gradient(make_module(make_model(1), models["b"], name, estimator_kwargs=KEYS.get(name)), rollout)
    assert found[0] != plain[0]


def test_endings_that_are_found_have_to_be_those_of_all_teachers(models, make_model, make_module):
    def merged(*ends, **keys):
        several = {name: make_model(3) for name in "ab"}
        for model, end in zip(several.values(), ends, strict=True):
            model.generation_config.eos_token_id = model.config.eos_token_id = end
        return make_module(make_model(1), None, "token", teachers=several, merged_stops="auto", **keys).merged

    assert merged(5, 5) == [[2, 5]]
    with pytest.raises(UserError, match=r"expected groups .* auto with teachers\.a .*5\], teachers\.b .*7\]"):
        merged(5, 7)
    with pytest.raises(UserError, match=r"expected null: a product of merged tokens .* take teachers_comb"):
        merged(5, 5, teachers_combined="product")


class Held:
    """Parameters of teachers that are in memory, and the most there ever were."""

    def __init__(self):
        self.now, self.most, self.loads = 0, 0, 0

    def count(self, weights):
        for weight in weights:
            self.now += weight.numel()
            weakref.finalize(weight, self._gone, weight.numel())
        self.most, self.loads = max(self.most, self.now), self.loads + 1

    def _gone(self, size):
        self.now -= size


def count_loaded(monkeypatch):
    """Count the parameters of every model that is loaded from here on."""
    held, load = Held(), pair.load_frozen

    def counted(*arguments):
        loaded = load(*arguments)
        held.count(loaded.model.parameters())
        return loaded

    monkeypatch.setattr(pair, "load_frozen", counted)
    return held


@pytest.mark.parametrize("offload", [False, True])
def test_three_teachers_take_the_memory_of_one(
    offload, monkeypatch, make_model, save_model, student_path, make_trainer, make_data, tiny_tokenizer
):
    """The largest number of their parameters at once is that of one; with offload, which keeps them, of three."""
    one = make_model(2)
    size = sum(p.numel() for p in one.parameters())
    held = count_loaded(monkeypatch)
    sections = {n: {"path": save_model(make_model(i)), "offload": offload} for i, n in enumerate("xyz")}
    module = DistillationModule(student_path, None, "token", teachers=sections, rollout={"max_new_tokens": 6})
    module.pair.read()
    rows = [row | {"teacher": teacher} for row, teacher in zip(ROWS, "xyzxy", strict=True)]
    trainer = make_trainer(1)
    gc.collect()
    trainer.fit(module, make_data(rows, teacher_column="teacher"))
    assert held.most == (3 * size if offload else size)
    assert held.loads == 3 if offload else held.loads == 6
    logged = {key: float(value) for key, value in trainer.callback_metrics.items()}
    tokens = [logged[f"teacher/{name}/tokens"] for name in "xyz"]
    assert sum(tokens) == sum(int(r.own_mask_BT.sum()) for r, _ in module.seen)
    kls = [logged[f"teacher/{name}/reverse_kl"] for name in "xyz"]
    total = sum(t * kl for t, kl in zip(tokens, kls, strict=True))
    assert total / sum(tokens) == pytest.approx(logged["train/reverse_kl"], rel=1e-4)
    assert sum(logged[f"teacher/{name}/kl_share"] for name in "xyz") == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("itself", [False, True])
def test_a_teacher_that_is_let_go_is_gone_at_once(itself, monkeypatch, make_model, save_model, student_path):
    """Also one whose code makes a circle, for which alone all objects of the process are searched: that takes longer
    than reading it."""
    load, searches, models = pair.load_frozen, [], []

    def held(*arguments):
        loaded = load(*arguments)
        if itself:
            vars(loaded.model)["circle"] = loaded.model
        models.append(weakref.ref(loaded.model))
        return loaded

    search = gc.collect
    monkeypatch.setattr(pair, "load_frozen", held)
    monkeypatch.setattr(pair.gc, "collect", lambda: searches.append(search()))
    sections = {n: TeacherConfig(path=save_model(make_model(i))) for i, n in enumerate("ab")}
    two = pair.Pair(student_path, sections, estimators.build("token"))
    for name in "aba":
        two.lend(f"teachers.{name}", torch.device("cpu"))
    assert [model() is None for model in models] == [True, True, False]
    assert len(searches) == (2 if itself else 0)


def test_every_held_out_row_is_measured_against_its_own_teacher(
    models, make_model, make_module, make_trainer, make_data
):
    def measured(teacher, column=None, **keys):
        module = make_module(make_model(1), teacher, "token", **keys)
        make_trainer(limit_val_batches=1).validate(module, make_data(ROWS, teacher_column=column), verbose=False)
        return module.evaluation.per_prompt.sums

    both = {key: models[key] for key in "ab"}
    found, alone = measured(None, "teacher", teachers=both), {key: measured(m) for key, m in both.items()}
    for metric in ("reverse_kl", "teacher_nll"):
        expected = [alone[row["teacher"]][metric][i] for i, row in enumerate(ROWS)]
        assert found[metric] == pytest.approx(expected, rel=1e-5, abs=1e-6)
        assert found[metric] != pytest.approx(alone["a"][metric], rel=1e-3)


def test_each_teacher_answers_the_held_out_prompts_that_are_its_own(
    models, make_model, make_module, make_trainer, make_data
):
    """As it does alone, with its own prompts; that of two teachers by the one with the larger weight."""
    rows = [*ROWS[:4], ROWS[4] | {"teacher": {"a": 0.75, "b": 0.25}}]

    def answered(teacher, shown, column=None, **keys):
        module = make_module(make_model(1), teacher, "token", **keys)
        data = make_data(rows, teacher_column=column, shown=dict.fromkeys(shown, {"prompt_template": HINT}))
        trainer = make_trainer(limit_val_batches=1)
        with module.judging_teacher():
            trainer.validate(module, data, verbose=False)
        return module.evaluation.per_prompt

    both = {key: models[key] for key in "ab"}
    found = answered(None, ["teachers.a"], "teacher", teachers=both)
    alone = {"a": answered(models["a"], ["teacher"]), "b": answered(models["b"], [])}
    assert found.numbers == [0, 1, 2, 3, 4]
    for metric in ("length", "student_entropy"):
        expected = [alone[name].sums[metric][i] for i, name in enumerate("abaaa")]
        assert found.sums[metric] == pytest.approx(expected, rel=1e-5)


def test_teachers_that_answer_are_in_memory_one_at_a_time(
    monkeypatch, make_model, save_model, student_path, make_trainer, make_data
):
    held = count_loaded(monkeypatch)
    sections = {n: {"path": save_model(make_model(i))} for i, n in enumerate("ab")}
    module = DistillationModule(student_path, None, "token", teachers=sections, rollout={"max_new_tokens": 6})
    with module.judging_teacher():
        make_trainer(limit_val_batches=1).validate(module, make_data(ROWS, teacher_column="teacher"), verbose=False)
    assert held.most == sum(p.numel() for p in make_model(0).parameters())
    assert held.loads == 2  # each answers its prompts, and scores what it wrote before the next comes


def test_other_teachers_than_those_of_a_checkpoint_are_refused(
    models, make_model, make_module, make_trainer, make_data, tmp_path
):
    def module(names, **keys):
        teachers = {"teachers": {n: models[n] for n in names}} if names else {"teacher": models["a"]}
        return make_module(make_model(1), teachers.pop("teacher", None), "token", **teachers, **keys)

    def data(column="teacher"):
        return make_data(ROWS, teacher_column=column)

    first = make_trainer(1)
    first.fit(module("ab"), data())
    first.save_checkpoint(tmp_path / "one.ckpt")
    make_trainer(2).fit(module("ab"), data(), ckpt_path=tmp_path / "one.ckpt")
    for other in (module("abc"), module("ab", teachers_combined="product")):
        with pytest.raises(
            UserError, match=r"teachers: expected the teachers of the checkpoint: a \(given in Python\)"
        ):
            make_trainer(2).fit(other, data(), ckpt_path=tmp_path / "one.ckpt")
    with pytest.raises(UserError, match=r"found one\. Set them back"):
        make_trainer(2).fit(module(""), data(None), ckpt_path=tmp_path / "one.ckpt")


def test_what_may_not_change_at_a_resume_is_in_the_manifest_of_teachers():
    kept = taught_by({"a": TeacherConfig(path="x")}, "mixture", {})["teachers"]["a"]
    assert set(kept) == {key.removeprefix("teacher.") for key in AT_A_RESUME["refused"] if key.startswith("teacher.")}


def test_a_checkpoint_brings_its_teachers_back(teacher_path, student_path, make_trainer, make_data, tmp_path):
    several = {"a": TeacherConfig(path=teacher_path, prompt=HINT), "b": {"path": student_path}}
    keys = {"teachers_combined": "product", "rollout": {"max_new_tokens": 6}}
    module, trainer = DistillationModule(student_path, None, "token", teachers=several, **keys), make_trainer(1)
    trainer.fit(module, make_data(ROWS, teacher_column="teacher"))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    again = DistillationModule.load_from_checkpoint(tmp_path / "one.ckpt")
    assert again.taught_by == module.taught_by
    assert again.taught_by["teachers"]["a"]["path"] == teacher_path
    assert (again.teachers, again.shown) == (["a", "b"], {"teachers.a": {"prompt_template": HINT}})


def test_one_teacher_and_several_at_once_are_refused(models, make_model, make_module):
    for teacher, several, message in (
        (models["a"], models, "teachers: expected one teacher, or several, found both"),
        (None, [models["a"]], "teachers: expected a mapping of names to teachers"),
        (None, {"a b": models["a"]}, "teachers: expected names of letters"),
        (
            None,
            {n: TeacherConfig(kind="student", prompt=HINT) for n in "ab"},
            r"teachers\.b\.kind: expected one teacher",
        ),
        (None, {"a": TeacherConfig(path="/nowhere/a")}, r"teachers\.a\.path: expected a model folder"),
        (None, {"a": TeacherConfig(kind="nowhere:f")}, r"teachers\.a\.kind: expected an importable module"),
    ):
        with pytest.raises(UserError, match=message):
            make_module(make_model(1), teacher, "token", teachers=several)


def test_rows_without_a_route_are_refused(models, make_model, make_module, rollout):
    with pytest.raises(UserError, match="data: expected batches that say which teacher a prompt is for"):
        gradient(make_module(make_model(1), None, "token", teachers=models), rollout)


def test_a_module_tells_its_data_the_names_of_its_teachers(models, make_model, make_module, make_trainer):
    data = PromptDataModule(train_rows=ROWS, batch_size=5)
    with pytest.raises(UserError, match=r"data\.teacher_column: expected a column or a function that names .* a, b, c"):
        make_trainer().fit(make_module(make_model(1), None, "token", teachers=models), data)


class SavedAfter(L.Callback):
    """Keeps a checkpoint after a step."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_schedule_moves_the_weights_and_a_resumed_run_has_the_same(
    models, make_model, make_module, make_data, fit, tmp_path
):
    """Four steps: the second teacher comes in as the first goes out. Evaluations have the weights of the end."""
    rows = [{"prompt": row["prompt"], "t": {"a": 0.5, "b": 0.5}} for row in ROWS]

    def module(schedule):
        both = {key: models[key] for key in "ab"}
        return make_module(make_model(1), None, "token", teachers=both, teachers_schedule=schedule)

    def data():
        return make_data(rows, teacher_column="t")

    moving, path = {"a": [1, 0], "b": [0, 1]}, tmp_path / "two.ckpt"
    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            seen.append([r.routes_BM.unique(dim=0).tolist() for r, _ in module.seen])

    whole = fit(module(moving), 4, data(), callbacks=[SavedAfter(2, path), Watch()])
    assert [step[0] for step in seen] == [[[1.0, 0.0]], [[0.75, 0.25]], [[0.5, 0.5]], [[0.25, 0.75]]]
    rest = fit(module(moving), 4, data(), ckpt_path=path, callbacks=[Watch()])
    assert seen[4:] == seen[2:4]
    for name, weight in whole.weights[-1].items():
        assert torch.equal(rest.weights[-1][name], weight)
    with pytest.raises(UserError, match="teachers: expected the teachers of the checkpoint"):
        fit(module({}), 4, data(), ckpt_path=path)


def test_evaluations_compare_with_the_weights_at_the_end(models, make_model, make_module, make_trainer, make_data):
    def measured(weights, **keys):
        both = {key: models[key] for key in "ab"}
        module = make_module(make_model(1), None, "token", teachers=both, **keys)
        data = make_data([{"prompt": row["prompt"], "t": weights} for row in ROWS], teacher_column="t")
        make_trainer(limit_val_batches=1).validate(module, data, verbose=False)
        return module.evaluation.per_prompt.sums["reverse_kl"]

    found = measured({"a": 0.5, "b": 0.5}, teachers_schedule={"a": [1, 0.25], "b": [0, 0.75]})
    assert found == pytest.approx(measured({"a": 0.25, "b": 0.75}), rel=1e-6)
