"""The linter: every rule fires where it should and only there, tells why, and does so before any weight loads."""

import inspect
import random
import subprocess
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_opd import DistillationModule, estimators
from lit_opd.cli import main
from lit_opd.commands.quiet import quiet_libraries
from lit_opd.config import (
    PACKAGE_FOLDER,
    LintConfig,
    OptimConfig,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
    load_config,
)
from lit_opd.errors import UserError
from lit_opd.estimators.needs import read_needs
from lit_opd.linter import RULES, Facts, Finding, LintWarning, check, enforce, lint
from lit_opd.linter.rules import sampler_is_not_student, stale_updates
from lit_opd.models import LanguageModel, load_tokenizer, read_model_config, read_stop_ids
from lit_opd.types import Estimate, SamplingLaw

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "conf" / "quickstart.yaml"
STOP = 2


# What a user might write


def k1(tokens):
    log_ratio = tokens.student_logps_BT - tokens.teacher_logps_BT
    return Estimate(log_ratio, log_ratio.detach())


def k2(tokens):
    log_ratio = tokens.student_logps_BT - tokens.teacher_logps_BT
    return Estimate(log_ratio.square() / 2, log_ratio.detach())


def kl_as_reward(tokens):
    return Estimate(tokens.kl_BT * tokens.student_logps_BT, tokens.kl_BT)


def renormalised(tokens, *, k=1):
    p, q = (x.log_softmax(-1) for x in (tokens.student_support_logps_BTK, tokens.teacher_support_logps_BTK))
    return Estimate((p.exp() * (p - q)).sum(-1), tokens.student_logps_BT.detach())


def topk_as_reward(tokens, *, k=2):
    value = renormalised(tokens, k=k).loss_BT.detach()
    return Estimate(value * tokens.student_logps_BT, value)


def standardised(tokens, scale=True):
    log_ratio = (tokens.student_logps_BT - tokens.teacher_logps_BT).detach()
    credit = log_ratio - log_ratio[tokens.mask_BT].mean()
    credit = credit / log_ratio[tokens.mask_BT].std() if scale else credit
    return Estimate(credit * tokens.student_logps_BT, log_ratio)


def centred(tokens):
    return standardised(tokens, scale=False)


def careless_return(tokens):
    log_ratio = (tokens.student_logps_BT - tokens.teacher_logps_BT).detach()
    return Estimate(log_ratio.flip(1).cumsum(1).flip(1) * tokens.student_logps_BT, log_ratio)


def compared_with_other_rows(tokens):
    log_ratio = (tokens.student_logps_BT - tokens.teacher_logps_BT).detach()
    rows = log_ratio.masked_fill(~tokens.mask_BT, 0.0).sum(1, keepdim=True)
    return Estimate((log_ratio - rows.sum() + rows) * tokens.student_logps_BT, log_ratio)


def without_slope(tokens):
    return Estimate(0.0 * tokens.student_logps_BT, tokens.student_logps_BT.detach())


def summed(tokens):
    return Estimate(k2(tokens).loss_BT.sum(-1), k2(tokens).kl_BT)


def failing(tokens):
    raise RuntimeError("no such table")


def own(fn, needs="token", family="token", **kwargs):
    """A user's function that declares what it needs."""
    built = estimators.build(fn, **kwargs)
    return replace(built, spec=replace(built.spec, needs=read_needs("needs", needs), family=family))


def mix(**terms):
    return estimators.build("mix", terms=terms)


def configured(**keys):
    """A configuration from keys with `__` for the dot."""
    words = [f"{key.replace('__', '.')}={value}" for key, value in keys.items()]
    return load_config([], ["student.path=s", "teacher.path=t", *words])


def facts_of(config, estimator, masked_ids=(), stop_ids=()):
    """The facts of a configured run; `estimator` is one, or a name."""
    estimator = estimators.build(estimator) if isinstance(estimator, str) else estimator
    masked_tokens, temperature = config.estimator.masked_tokens, config.teacher.temperature
    ids = frozenset(masked_ids), frozenset(stop_ids)
    return Facts(estimator, config.rollout, config.optim, temperature, masked_tokens, *ids, config.student)


def judged(estimator, masked_ids=(), stop_ids=(), **keys):
    """The names of the rules that fire, with their severity."""
    return {f.rule: f.severity for f in lint(facts_of(configured(**keys), estimator, masked_ids, stop_ids))}


MASKED = {"estimator__masked_tokens": "[7]"}
FIRES = [
    ("k1_as_loss", "refuse", own(k1), {}),
    ("k1_as_loss", "refuse", own(lambda tokens: Estimate(3 * tokens.student_logps_BT, tokens.teacher_logps_BT)), {}),
    ("k1_as_loss", "refuse", estimators.build("fixed_advantage", where="all"), {}),
    ("action_independent_advantage", "refuse", own(kl_as_reward, "token+kl"), {}),
    ("action_independent_advantage", "refuse", own(topk_as_reward, "support"), {}),
    ("renormalised_over_one_token", "refuse", own(renormalised, "support"), {}),
    ("whitened_advantage", "refuse", own(standardised), {}),
    ("whitened_advantage", "refuse", own(standardised, family="sequence"), {}),
    ("sampler_is_not_student", "refuse", "token", {"rollout__temperature": 0.7}),
    ("sampler_is_not_student", "refuse", own(k2), {"rollout__temperature": 1.2}),
    ("sampler_is_not_student", "refuse", "sequence", {"rollout__top_p": 0.9}),
    ("sampler_is_not_student", "refuse", "token", {"rollout__top_k": 20}),
    ("sampler_is_not_student", "refuse", mix(full_vocab=1.0, token=0.1), {"rollout__min_p": 0.1}),
    ("sampler_is_not_student", "refuse", "iw_opd", {"rollout__temperature": 0.7}),
    ("sampler_is_not_student", "warn", "importance_reverse_kl", {"rollout__top_p": 0.9, "rollout__temperature": 0.7}),
    ("sampler_is_not_student", "warn", "token", {"rollout__min_new_tokens": 3}),
    ("teacher_temperature", "warn", "full_vocab", {"teacher__temperature": 2.0}),
    ("dropout_in_training", "refuse", "token", {"student__dropout": "keep"}),
    ("dropout_in_training", "refuse", "full_vocab", {"student__dropout": "keep"}),
    ("dropout_in_training", "refuse", mix(ppo_reverse_kl=1.0, hybrid=0.5), {"student__dropout": "keep"}),
    ("dropout_in_training", "warn", "teacher_topk", {"student__dropout": "keep"}),
    ("dropout_in_training", "warn", "token", {"student__lora": "{r: 2, lora_dropout: 0.1}"}),
    ("stale_updates", "refuse", "token", {"optim__updates_per_rollout": 2}),
    ("stale_updates", "refuse", mix(importance_reverse_kl=1.0, hybrid=0.5), {"optim__updates_per_rollout": 2}),
    ("no_stop_signal", "refuse", "full_vocab", {"masked_ids": (7, STOP), "stop_ids": (STOP,), **MASKED}),
    ("credit_across_masked_tokens", "warn", "sequence", MASKED),
    ("credit_across_masked_tokens", "warn", "hybrid", MASKED),
    ("credit_across_masked_tokens", "refuse", own(careless_return, family="sequence"), MASKED),
    ("one_completion", "refuse", "leave_one_out", {}),
    ("no_demonstrations", "refuse", mix(token=1.0, supervised=0.5), {}),
    ("no_gradient", "warn", own(without_slope), {}),
    ("unprobed", "warn", own(failing), {}),
]  # fmt: skip
PASSES = [
    ("k1_as_loss", own(k2), {}),
    ("k1_as_loss", own(kl_as_reward, "token+kl"), {}),
    ("action_independent_advantage", own(k1), {}),
    ("action_independent_advantage", "vopd", {}),
    ("renormalised_over_one_token", own(renormalised, "support", k=2), {}),
    ("renormalised_over_one_token", own(renormalised, "support", k=500), {}),
    ("renormalised_over_one_token", estimators.build("topk_generalised_reverse_kl", k=1), {}),
    ("whitened_advantage", own(centred), {}),
    ("whitened_advantage", own(standardised, "token+rewards", "sequence"), {}),
    ("sampler_is_not_student", "full_vocab", {"rollout__temperature": 0.7, "rollout__top_p": 0.5,
                                              "rollout__min_new_tokens": 3}),
    ("sampler_is_not_student", "importance_reverse_kl", {"rollout__temperature": 0.7}),
    ("sampler_is_not_student", "token", {"rollout__temperature": 0, "rollout__top_p": 0.9}),
    ("dropout_in_training", "token", {}),
    ("dropout_in_training", "token", {"student__lora": "{r: 2, lora_dropout: 0.0}"}),
    ("teacher_temperature", "full_vocab", {"rollout__temperature": 2.0}),
    ("stale_updates", "token", {}),
    ("stale_updates", "teacher_topk", {"optim__updates_per_rollout": 2}),
    ("stale_updates", "ppo_reverse_kl", {"optim__updates_per_rollout": 2}),
    ("stale_updates", estimators.build("iw_opd", base="importance_reverse_kl"), {"optim__updates_per_rollout": 2}),
    ("no_stop_signal", "full_vocab", {"masked_ids": (7, STOP), "stop_ids": (STOP, 3), **MASKED}),
    ("no_stop_signal", "full_vocab", {"masked_ids": (7,), "stop_ids": (), **MASKED}),
    ("credit_across_masked_tokens", estimators.build("hybrid", gamma=0.0), MASKED),
    ("credit_across_masked_tokens", "token", MASKED),
    ("credit_across_masked_tokens", "iw_opd", MASKED),
    ("credit_across_masked_tokens", own(compared_with_other_rows, family="sequence"), MASKED),
    ("credit_across_masked_tokens", "sequence", {}),
    ("credit_across_masked_tokens", own(careless_return, family="sequence"), {}),
    ("one_completion", "leave_one_out", {"rollout__num_completions": 2}),
    ("one_completion", "token", {}),
    ("no_demonstrations", mix(token=1.0, supervised=0.5), {"rollout__student_share": 0.8}),
    ("no_demonstrations", mix(token=1.0, supervised=0.5), {"rollout__student_from": 5}),
    ("no_demonstrations", "token", {}),
    ("no_gradient", own(k1), {}),
    ("unprobed", own(k1), {}),
]  # fmt: skip


def row(case):
    subject = case[-2]
    name = subject if isinstance(subject, str) else subject.spec.name
    return f"{case[0]}-{name}-{'-'.join(f'{k}={v}' for k, v in case[-1].items())}".replace("estimator__", "")


@pytest.mark.parametrize(("rule", "severity", "estimator", "keys"), FIRES, ids=map(row, FIRES))
def test_a_rule_fires_where_it_should(rule, severity, estimator, keys):
    assert judged(estimator, **keys).get(rule) == severity


@pytest.mark.parametrize("family", ["token", "sequence"])
def test_what_is_no_estimate_is_refused(family):
    with pytest.raises(UserError, match=r"^estimator.name: expected summed to return a loss_BT of shape \[4, 5\]"):
        judged(own(summed, family=family))


@pytest.mark.parametrize(("rule", "estimator", "keys"), PASSES, ids=map(row, PASSES))
def test_a_rule_is_silent_where_it_should_be(rule, estimator, keys):
    assert rule not in judged(estimator, **keys)


def test_every_rule_is_tried_both_ways():
    rules = {rule.__name__ for rule in RULES}
    assert len(rules) == len(RULES)
    assert {case[0] for case in FIRES} == {case[0] for case in PASSES} == rules


def defaults(name):
    """An estimator with its defaults, or its first variant's keywords where one has none."""
    parameters = inspect.signature(estimators.get(name).fn).parameters.values()
    required = any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)
    return estimators.build(name, **(estimators.get(name).variants[0].keywords if required else {}))


@pytest.mark.parametrize("name", estimators.names())
def test_there_is_nothing_against_a_registered_estimator_as_it_comes(name):
    share = 0.5 if name == "supervised" else 1.0
    assert judged(defaults(name), rollout__num_completions=2, rollout__student_share=share) == {}


@pytest.mark.parametrize("file", sorted((ROOT / "conf").glob("*.yaml")), ids=lambda path: path.name)
def test_no_shipped_configuration_has_a_finding(file):
    config = load_config([file], [] if "student" in file.read_text() else ["student.path=s", "teacher.path=t"])
    assert lint(facts_of(config, estimators.build(config.estimator.name, **config.estimator.kwargs))) == []


LAWS = st.builds(
    SamplingLaw, st.sampled_from([0.0, 0.5, 1.0, 2.0]), top_p=st.sampled_from([0.5, 1.0]),
    top_k=st.sampled_from([0, 5]), min_p=st.sampled_from([0.0, 0.1]), min_new_tokens=st.sampled_from([0, 2]),
)  # fmt: skip


@given(LAWS, st.sampled_from(["token", "sequence", "importance_reverse_kl", "full_vocab", "teacher_topk"]))
def test_the_sampler_is_the_students_or_something_is_said(law, name):
    facts = Facts(estimators.build(name), RolloutConfig(**vars(law)), OptimConfig())
    finding = sampler_is_not_student(facts)
    truncated = (law.top_p, law.top_k, law.min_p) != (1.0, 0, 0.0)
    if name in ("full_vocab", "teacher_topk") or law.temperature == 0 or law.is_student:
        assert finding is None
    elif name == "importance_reverse_kl":
        assert (finding is not None) == (truncated or law.min_new_tokens > 0)
        assert finding is None or finding.severity == "warn"
    else:
        assert finding is not None
        assert (finding.severity == "refuse") == (truncated or law.temperature != 1)


def test_a_term_of_a_mix_is_tried_by_itself(tmp_path):
    """Beside a live term the sum has a gradient, and its dead part is still only noise."""
    file = tmp_path / "mine.py"
    file.write_text("from lit_opd.types import Estimate\n\n" + inspect.getsource(k1))
    (finding,) = lint(facts_of(configured(), mix(token=1.0, **{f"{file}:k1": 0.5})))
    assert (finding.rule, finding.key) == ("k1_as_loss", "estimator.kwargs")
    assert f"{file}:k1" in finding.found


# How it is told

CORRECTED = ", or use an estimator that weighs by student over sampler ("
REFUSALS = {
    "k1_as_loss": ("estimator.name", "whose gradient does not depend on the teacher", "identity I1", "half its square"),
    "action_independent_advantage": ("estimator.name", "'kl_as_reward'", "identity I6", "'full_vocab'"),
    "renormalised_over_one_token": ("estimator.kwargs.k", "1.", "identity I14", "Set estimator.kwargs.k=16"),
    "whitened_advantage": ("estimator.name", "'standardised'", "unit variance over a batch", "standard deviation"),
    "sampler_is_not_student": ("rollout.temperature", "0.7", "1 for 'token'", f"rollout.temperature=1{CORRECTED}"),
    "dropout_in_training": ("student.dropout", "keep", "none for 'token'", "Set student.dropout=none"),
    "stale_updates": ("optim.updates_per_rollout", "2", "arXiv:2606.24143", f"optim.updates_per_rollout=1{CORRECTED}"),
    "no_stop_signal": ("estimator.masked_tokens", "all of them, [2]", "arXiv:2603.25562", "Take the stop token out"),
    "credit_across_masked_tokens": ("estimator.masked_tokens", "[7]", "none for 'careless_return'", "as 'hybrid'"),
    "no_demonstrations": ("rollout.student_share", "1", "below 1 for 'supervised'", "student_share=0.8"),
    "one_completion": ("rollout.num_completions", "1", "at least 2 for 'leave_one_out'", "num_completions=4"),
}


@pytest.mark.parametrize("rule", REFUSALS)
def test_a_refusal_is_one_line_with_key_reason_finding_and_remedy(rule):
    _, _, estimator, keys = next(case for case in FIRES if case[:2] == (rule, "refuse"))
    given_ids = {name: keys[name] for name in ("masked_ids", "stop_ids") if name in keys}
    config = configured(**{key: value for key, value in keys.items() if key not in given_ids})
    (finding,) = (f for f in lint(facts_of(config, estimator, **given_ids)) if f.rule == rule)
    with pytest.raises(UserError) as caught:
        enforce([finding])
    message = str(caught.value)
    key, found, reason, remedy = REFUSALS[rule]
    assert message.startswith(f"{key}: expected ")
    assert message.endswith(f" lint.allow=[{rule}] lets it pass knowingly.")
    assert "\n" not in message
    assert found in message.split(", found ")[-1]
    assert reason in message.split(", found ")[0]
    assert remedy in message
    assert "importance_reverse_kl, ppo_reverse_kl" in message or CORRECTED not in remedy


def test_every_refusal_has_its_text_tested():
    assert REFUSALS.keys() == {case[0] for case in FIRES if case[1] == "refuse"}


REFUSE = Finding("stale_updates", "refuse", "optim.updates_per_rollout", "2", "1", "Lower it.")
WARN = Finding("teacher_temperature", "warn", "teacher.temperature", "2", "1", "Lower it.")


def test_the_first_refusal_that_is_not_allowed_is_raised_and_nothing_is_warned_of():
    other = REFUSE._replace(rule="k1_as_loss")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=r"^optim\.updates.*lint\.allow=\[k1_as_loss\] lets it pass knowingly\.$"):
            enforce([WARN, REFUSE, other], allow=["stale_updates"])


def test_warnings_and_allowed_refusals_are_warned_of():
    with pytest.warns(LintWarning) as record:
        enforce([WARN, REFUSE], allow=["stale_updates"])
    assert [str(warning.message) for warning in record] == [
        "teacher.temperature: expected 1, found 2. Lower it.",
        "optim.updates_per_rollout: expected 1, found 2. Lower it. Let pass by lint.allow=[stale_updates].",
    ]


@pytest.mark.parametrize(
    ("name", "remedy"), [("stale_update", "Did you mean 'stale_updates'?"), ("x", "Known: action")]
)
def test_an_unknown_rule_in_allow_is_refused(name, remedy):
    with pytest.raises(UserError) as caught:
        enforce([], allow=[name])
    assert str(caught.value).startswith(f"lint.allow: expected names of rules, found {name!r}. {remedy}")


# Trying a function leaves no trace


def test_randomness_of_the_caller_is_not_used_up():
    def noisy(tokens):
        noise = torch.rand_like(tokens.student_logps_BT) + random.random() * 0
        return Estimate(noise * tokens.student_logps_BT, noise)

    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    judged(own(noisy))
    assert torch.equal(torch.rand(3), expected)


def test_it_works_where_gradients_are_off():
    with torch.no_grad():
        assert judged(own(k1)) == {"k1_as_loss": "refuse"}
        assert judged("token") == {}


def test_a_large_support_is_tried_as_a_small_one():
    seen = []

    def watching(tokens, *, k=5000):
        seen.append(tokens.student_support_logps_BTK.shape[-1])
        return renormalised(tokens)

    assert judged(own(watching, "support")) == {}
    assert set(seen) == {32}


def test_it_takes_well_under_a_second():
    def seconds(name):
        start = time.perf_counter()
        judged(defaults(name))
        return time.perf_counter() - start

    for name in ("full_vocab", "token", "sequence", "leave_one_out", "union_topk"):
        assert min(seconds(name) for _ in range(3)) < 0.5, name


# Where it stands in a run


@pytest.fixture
def unreadable(tmp_path):
    """A student whose tokenizer and configuration are in order, and whose weights are garbage."""
    folder = tmp_path / "student"
    folder.mkdir()
    for file in (PACKAGE_FOLDER / "tiny" / "student").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors").write_bytes(b"garbage")
    return str(folder)


TEACHER = str(PACKAGE_FOLDER / "tiny" / "teacher")
STALE = {"estimator": "token", "optim": {"updates_per_rollout": 2}}


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        (STALE, r"optim\.updates_per_rollout: expected 1 for 'token'"),
        ({"estimator": k1}, r"estimator\.name: expected a loss"),
        ({"masked_tokens": ["<eos>"]}, r"estimator\.masked_tokens: expected at least one token that ends"),
        ({"rollout": {"top_p": 0.0}}, r"rollout\.top_p: expected a value in \(0, 1\]"),
        ({"lint": {"allow": ["stale"]}}, r"lint\.allow: expected names of rules"),
        ({"lint": {"allows": []}}, r"lint\.allows: expected a known key"),
        ({"estimator": "token", "rollout": {"temperature": 0}}, r"^rollout\.temperature: expected above 0 for 'token'"),
    ],
)
def test_a_module_refuses_before_it_reads_weights(unreadable, keywords, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error", LintWarning)
        with pytest.raises(UserError, match=message):
            DistillationModule(unreadable, TEACHER, **keywords)


def test_the_garbage_above_is_what_stops_a_module_without_findings(unreadable):
    with pytest.raises(UserError, match=r"student\.path: expected readable weights, found .* deserializing"):
        DistillationModule(unreadable, TEACHER, **STALE | {"optim": {}})


@pytest.mark.parametrize("allow", [{"allow": ["stale_updates"]}, LintConfig(["stale_updates"])])
def test_a_module_lets_pass_what_is_allowed_and_warns_once_at_the_line_that_made_it(allow, student_path, teacher_path):
    with pytest.warns(LintWarning, match=r"Let pass by lint\.allow=\[stale_updates\]\.$") as record:
        DistillationModule(student_path, teacher_path, **STALE, lint=allow)
    (warning,) = (w for w in record if w.category is LintWarning)
    assert warning.filename == __file__


def test_a_module_warns_of_its_teachers_temperature(student_path, teacher_path):
    with pytest.warns(LintWarning, match=r"^teacher\.temperature: expected 1, .* found 2\.0\. Set"):
        DistillationModule(student_path, TeacherConfig(teacher_path, temperature=2.0))


def test_a_model_in_memory_is_asked_for_its_stop_tokens(make_model, tiny_tokenizer):
    student, teacher = make_model(1), make_model(2)
    with pytest.raises(UserError, match=r"found all of them, \[2\]"):
        DistillationModule(student, teacher, tokenizer=tiny_tokenizer, masked_tokens=["7", "<eos>"])
    student.generation_config.eos_token_id = [2, 5]
    DistillationModule(student, teacher, tokenizer=tiny_tokenizer, masked_tokens=["7", "<eos>"])


@pytest.mark.parametrize("named", [2, [2, 5], [2, 400], None])
def test_stop_tokens_are_known_before_the_weights(named, make_model, save_model, tiny_tokenizer):
    model = make_model(1)
    model.generation_config.eos_token_id = named
    folder = StudentConfig(save_model(model))
    expected = LanguageModel(model, tiny_tokenizer, "student").stop_ids
    own = load_tokenizer(folder, "student"), read_model_config(folder, "student")
    assert read_stop_ids(folder, *own) == expected


def test_a_folder_needs_no_generation_config(make_model, save_model, tiny_tokenizer):
    folder = StudentConfig(save_model(make_model(1)))
    (Path(folder.path) / "generation_config.json").unlink()
    assert read_stop_ids(folder, tiny_tokenizer, read_model_config(folder, "student")) == [STOP]


def test_nothing_is_read_where_nothing_is_masked():
    pair = StudentConfig("no/such/folder"), TeacherConfig("none")
    check(estimators.build("token"), RolloutConfig(), OptimConfig(), *pair)
    with pytest.raises(UserError, match=r"student\.path"):
        check(estimators.build("token"), RolloutConfig(), OptimConfig(), *pair, masked_tokens=[7])


COMMAND = ["--config", str(QUICKSTART), "output_dir=run", "data.train_size=8", "data.validation_size=4",
           "data.batch_size=4", "evaluation.num_examples=2", "rollout.max_new_tokens=6"]  # fmt: skip


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_command_refuses_before_weights_and_writes_nothing(command, unreadable, tmp_path, monkeypatch, capsys):
    workplace = tmp_path / "workplace"
    workplace.mkdir()
    monkeypatch.chdir(workplace)
    words = ["estimator.name=token", "rollout.temperature=0.7", f"student.path={unreadable}"]
    untrained = ["--untrained"] if command == "validate" else []
    assert main([command, *untrained, *COMMAND, *words]) == 2
    printed = capsys.readouterr()
    line, weights = printed.err.splitlines()
    assert line.startswith("error: rollout.temperature: expected 1 for 'token'")
    assert weights.startswith("error: student.path: expected readable weights")
    assert line.endswith("lint.allow=[sampler_is_not_student] lets it pass knowingly.")
    assert printed.out == ""
    assert list(workplace.iterdir()) == []


@pytest.mark.slow
def test_a_command_shows_each_warning_once_on_stderr(tmp_path, warm_python):
    words = ["estimator.name=sequence", "rollout.min_new_tokens=1", "optim.updates_per_rollout=2",
             "lint.allow=[stale_updates]", "tracking.uri=sqlite:///mlflow.db"]  # fmt: skip
    command = [warm_python, "-m", "lit_opd", "validate", "--untrained", *COMMAND, *words]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if "expected" in line]
    assert [line.split(" expected")[0] for line in told] == [
        "warning: rollout.min_new_tokens:", "warning: optim.updates_per_rollout:",
    ]  # fmt: skip
    assert "LintWarning" not in done.stderr
    assert "warning" not in done.stdout


def test_other_warnings_go_where_they_went(capsys):
    with warnings.catch_warnings(record=True) as record:
        quiet_libraries()
        warnings.simplefilter("always", UserWarning)
        for _ in range(2):
            warnings.warn("a finding", LintWarning, stacklevel=1)
            warnings.warn("something else", UserWarning, stacklevel=1)
    assert [warning.category for warning in record] == [UserWarning, UserWarning]
    assert capsys.readouterr().err == "warning: a finding\n"


def test_rules_of_the_configuration_need_no_probe():
    facts = Facts(estimators.build("token"), RolloutConfig(), OptimConfig(updates_per_rollout=2))
    assert stale_updates(facts).severity == "refuse"
