import ast
import inspect
import subprocess
import sys
import textwrap
import time
from dataclasses import fields, is_dataclass, replace
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lit_opd.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    FrozenConfig,
    OptimConfig,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
    as_section,
    keys,
    load_config,
    to_flat,
    to_yaml,
)  # fmt: skip
from lit_opd.errors import UserError

PATHS = ("student.path=s", "teacher.path=t")
SERVED = ("rollout.engine=vllm", "rollout.server=http://127.0.0.1:8000")


def test_defaults_then_files_in_order_then_overrides(write):
    first = write("1.yaml", "seed: 1\noptim: {lr: 0.1, clip_norm: 2.0}\ntrainer: {max_steps: 1, devices: 1}\n")
    second = write("2.yaml", "optim: {lr: 0.2, warmup_steps: 3}\ntrainer: {max_steps: 2}\n")
    config = load_config([first, second], [*PATHS, "optim.lr=0.3", "optim.lr=0.4"])
    assert config.seed == 1
    assert (config.optim.lr, config.optim.clip_norm, config.optim.warmup_steps) == (0.4, 2.0, 3)
    assert config.trainer == {"max_steps": 2, "devices": 1}
    assert config.rollout == RolloutConfig()
    assert load_config([second, first], PATHS).optim.lr == 0.1


def test_interpolations_follow_overrides(write):
    optim = "optim: {scheduler: CosineAnnealingLR, scheduler_kwargs: {T_max: '${trainer.max_steps}'}}"
    file = write("1.yaml", f"output_dir: out/${{seed}}\ntrainer: {{max_steps: 5}}\n{optim}\n")
    config = load_config([file], [*PATHS, "trainer.max_steps=9", "seed=4"])
    assert config.optim.scheduler_kwargs == {"T_max": 9}
    assert config.output_dir == "out/4"


def test_paths_inside_the_package(write):
    config = load_config([], ["student.path=${lit_opd:tiny/student}", "teacher.path=t"])
    assert config.student.path.endswith("lit_opd/tiny/student")


def test_another_name_drops_the_keywords_of_the_one_before(write):
    file = write("1.yaml", "estimator: {name: a, kwargs: {x: 1}}\noptim: {name: SGD, kwargs: {momentum: 0.9}}\n")
    same = load_config([file], [*PATHS, "estimator.name=a", "estimator.kwargs.y=2"])
    assert same.estimator.kwargs == {"x": 1, "y": 2}
    for words in (["estimator.kwargs.y=2", "estimator.name=b"], ["estimator.name=b", "estimator.kwargs.y=2"]):
        other = load_config([file], [*PATHS, *words])
        assert other.estimator.kwargs == {"y": 2}
        assert other.optim.kwargs == {"momentum": 0.9}


@pytest.mark.parametrize(("override", "value"), [
    ("data.verifier=null", None), ("optim.clip_norm=null", None), ("optim.lr=1e-4", 1e-4), ("optim.lr=1", 1.0),
    ("evaluation.pass_at=[1]", [1]), ("trainer.devices=[0,1]", [0, 1]), ("data.system_prompt=a=b", "a=b"),
    ("data.prompt_template='Q: {prompt}'", "Q: {prompt}"), ("data.kwargs.a.b=1", {"a": {"b": 1}}),
])  # fmt: skip
def test_values_of_overrides(override, value):
    section, key = override.partition("=")[0].split(".")[:2]
    found = getattr(load_config([], [*PATHS, override]), section)
    assert (found[key] if isinstance(found, dict) else getattr(found, key)) == value


@pytest.mark.parametrize(("words", "said"), [
    (["student.pth=1"],
     "student.pth: expected a known key, found an unknown one (override 'student.pth=1'). Did you mean 'path'?"),
    (["nothing=1"], "nothing: expected a known key"),
    (["optim.lr=abc"], "optim.lr: expected a value of type float, found 'abc' (override 'optim.lr=abc')."),
    (["data.train_size=many"], "data.train_size: expected a value of type int or null, found 'many'"),
    (["trainer=3"], "trainer: expected"),
    (["evaluation.pass_at=1"], "evaluation.pass_at: expected a list"),
    (["optim=[1]"], "optim: expected a section with keys"),
    (["optim.lr"], "optim.lr: expected an override of the form key=value, found no '='. Write e.g. optim.lr=1e-4."),
    (["=3"], "=3: expected an override"),
    (["teacher.path=${nowhere.key}"], "teacher.path: expected a resolvable value"),
    (["teacher.path=${oops"], "teacher.path"),
    (["optim.lr=[1"], "optim.lr"),
    (["optim.lr=0"], "optim.lr: expected a value above 0, found 0.0. Set optim.lr to a value above 0."),
    (["rollout.top_p=1.5"], "rollout.top_p: expected a value in (0, 1], found 1.5."),
    (["rollout.top_p=nan"], "rollout.top_p: expected a value in (0, 1]"),
    (["optim.lr=nan"], "optim.lr: expected a value above 0"),
    (["teacher.temperature=0"], "teacher.temperature: expected a value above 0, found 0.0. Set teacher.temperature to"),
    (["teacher.offload=true", "teacher.quantization=8bit"],
     "teacher.offload: expected false for a quantised model, whose weights stay where they were loaded, found True. "
     "Drop it, or teacher.quantization."),
    (["reference.quantization=3bit"], "reference.quantization: expected one of none, 8bit, 4bit, found '3bit'."),
    (["reference.dtype=int8"], "reference.dtype: expected one of float32"),
    (["reference.temperature=2"], "reference.temperature: expected a known key"),
    (["student.dtype=int8"], "student.dtype: expected one of float32, bfloat16, float16, float64, found 'int8'."),
    (["rollout.engine=vlm"], "rollout.engine: expected one of local, vllm, or package.module:name or file.py:name, "
     "found 'vlm'. Did you mean 'vllm'?"),
    (["rollout.engine=vllm"], "rollout.server: expected the address of a vLLM server with rollout.engine=vllm, found "
     "nothing. Set rollout.server=http://127.0.0.1:8000;"),
    ([*SERVED, "rollout.server=localhost:8000"], "rollout.server: expected the address of a vLLM server with "
     "rollout.engine=vllm, found 'localhost:8000'."),
    ([*SERVED, "rollout.temperature=2.5"], "rollout.temperature: expected 0, or from 0.01 to 2, with "
     "rollout.engine=vllm, found 2.5. Set rollout.temperature=1, or rollout.engine=local."),
    ([*SERVED, "rollout.temperature=0.001"], "rollout.temperature: expected 0, or from 0.01 to 2, with"),
    ([*SERVED, "rollout.min_p=0.1", "rollout.top_p=0.9"], "rollout.min_p: expected 0 where rollout.top_p cuts, with "
     "rollout.engine=vllm, found 0.1. Set one of the two, or rollout.engine=local."),
    (["evaluation.max_new_tokens=0"], "evaluation.max_new_tokens: expected a value at least 1, or null for "
     "rollout.max_new_tokens, found 0."),
    (["evaluation.num_examples=-1"], "evaluation.num_examples: expected a value at least 0, found -1."),
    (["optim.clip_norm=0"], "optim.clip_norm: expected a value above 0, or null for no clipping, found 0.0."),
    (["teacher.kind=server"], "teacher.kind: expected one of local, served, student, or package.module:name or file"),
    (["rollout.min_new_tokens=99"], "rollout.min_new_tokens: expected at most rollout.max_new_tokens (64), found 99."),
    (["evaluation.pass_at=[1,2]"],
     "evaluation.pass_at: expected values from 1 to evaluation.num_completions (1), found 2."),
    (["optim.updates_per_rollout=9"],
     "optim.updates_per_rollout: expected at most data.batch_size x rollout.num_completions (8), found 9."),
])  # fmt: skip
def test_messages(words, said):
    with pytest.raises(UserError) as caught:
        load_config([], [*PATHS, *words])
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [
    SERVED, [*SERVED, "rollout.temperature=0"], [*SERVED, "rollout.temperature=2"], [*SERVED, "rollout.top_p=0.9"],
    [*SERVED, "rollout.min_p=0.1", "rollout.top_k=5"],
    ["rollout.temperature=3", "rollout.min_p=0.1", "rollout.top_p=0.9"],
])  # fmt: skip
def test_laws_that_an_engine_has(words):
    load_config([], [*PATHS, *words])


def test_what_has_to_be_set():
    with pytest.raises(UserError, match=r"^student.path: expected a value, found nothing. Set student.path in a"):
        load_config()
    with pytest.raises(UserError, match=r"^teacher.path"):
        load_config([], ["student.path=s"])


@pytest.mark.parametrize(("text", "said"), [
    ("a: [", "valid YAML"), ("- 1", "a list"), ("3", "expected"), ("\x00", "valid YAML"),
    ("optim: 3", "a section with keys"), ("optim:\n", "a section with keys"),
    ("seed: x", "a value of type int"), ("Seed: 1", "Did you mean 'seed'?"),
])  # fmt: skip
def test_messages_about_files(write, text, said):
    with pytest.raises(UserError) as caught:
        load_config([write("bad.yaml", text)], PATHS)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_file_changes_nothing(write):
    assert load_config([write("empty.yaml", "")], PATHS) == load_config([], PATHS)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"--config: expected a YAML file, found no file"):
        load_config([tmp_path / "missing.yaml"])


def test_the_reference_has_the_keys_of_the_teacher_and_need_not_be_named():
    config = load_config([], PATHS)
    assert config.reference == FrozenConfig()
    assert config.reference.path is None
    shared, own = ({f.name: f.default for f in fields(c)} for c in (FrozenConfig, TeacherConfig))
    by_position = [*shared, "temperature", "kind"]  # TeacherConfig(path, dtype, ...)
    assert list(own)[: len(by_position)] == by_position
    assert {k: v for k, v in own.items() if k in shared and k != "path"} == {
        k: v for k, v in shared.items() if k != "path"
    }
    assert load_config([], [*PATHS, "reference.path=r", "reference.dtype=float32"]).reference.path == "r"
    assert load_config([], [*PATHS, "reference.path=null"]).reference.path is None


def test_as_section():
    assert as_section(OptimConfig, None, "optim") == OptimConfig()
    section = OptimConfig(lr=3.0)
    assert as_section(OptimConfig, section, "optim") is section
    assert as_section(OptimConfig, {"lr": 2, "kwargs": {"a": 1}}, "optim") == OptimConfig(lr=2.0, kwargs={"a": 1})
    with pytest.raises(UserError, match=r"optim.lrr.*Did you mean 'lr'"):
        as_section(OptimConfig, {"lrr": 2}, "optim")


def test_a_section_checks_itself_under_its_name():
    with pytest.raises(UserError, match=r"^data.overlong: expected one of drop, truncate, error"):
        DataConfig(overlong="skip").check("data")
    with pytest.raises(UserError, match=r"^judge.dtype: expected one of float32"):
        FrozenConfig(dtype="int8").check("judge")
    with pytest.raises(UserError, match=r"^optim.lr: expected a value above 0"):
        as_section(OptimConfig, OptimConfig(lr=0.0), "optim")


SECTIONS_OF = [Config, *(hint for hint in get_type_hints(Config).values() if is_dataclass(hint))]


@pytest.mark.parametrize("schema", SECTIONS_OF, ids=lambda schema: schema.__name__)
def test_every_field_says_what_it_means(schema):
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(schema))).body
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
            assert told, f"{schema.__name__}.{field.target.id} has no line of meaning under it"
            assert "\n" not in told
            assert told.endswith(".")


def test_a_section_from_python_tells_what_cannot_be_resolved():
    steps = {"scheduler_kwargs": {"T_max": "${trainer.max_steps}"}}
    with pytest.raises(
        UserError, match=r"^optim\.scheduler_kwargs\.T_max: expected a resolvable value, found Interpol"
    ):
        as_section(OptimConfig, steps, "optim")


def test_a_renamed_key_is_refused_with_its_new_name(monkeypatch, write):
    monkeypatch.setattr(keys, "RENAMED", {"optim.rate": "optim.lr", "sampler": "rollout"})
    message = r"^optim\.rate: expected its new name optim\.lr, found the old one \(override 'optim\.rate=1'\)\. Write "
    with pytest.raises(UserError, match=message + r"optim\.lr\.$"):
        load_config([], [*PATHS, "optim.rate=1"])
    with pytest.raises(UserError, match=r"^sampler: expected its new name rollout, found the old one \(.*old\.yaml\)"):
        load_config([write("old.yaml", "sampler: {top_p: 1.0}\n")], PATHS)


def test_a_key_that_is_gone_is_refused_with_what_to_set_instead():
    message = r"^estimator\.adapt_gamma_every: expected no such key any more, found it \(override .*Set that instead\.$"
    with pytest.raises(UserError, match=message):
        load_config([], [*PATHS, "estimator.adapt_gamma_every=20"])


def test_a_configuration_that_an_earlier_version_saved_still_loads(write):
    saved = write("config.yaml", "estimator: {name: hybrid, kwargs: {gamma: 0.5}, adapt_gamma_every: null}\n")
    words = ["estimator.name=hybrid", "estimator.kwargs.gamma=0.5"]
    assert load_config([saved], PATHS) == load_config([], [*PATHS, *words])


def test_renamed_keys_are_no_keys_and_their_new_names_are():
    def known(schema, key):
        first, _, rest = key.partition(".")
        hint = get_type_hints(schema).get(first)
        return hint is not None and (not rest or not is_dataclass(hint) or known(hint, rest))

    for old, new in keys.RENAMED.items():
        assert not known(Config, old)
        assert known(Config, new)


def test_flat_names_are_those_of_overrides():
    config = load_config([], [*PATHS, "trainer.max_steps=3", "optim.kwargs.betas=[0.9,0.99]", "estimator.kwargs.a.b=1"])
    flat = to_flat(config)
    assert flat["trainer.max_steps"] == 3
    assert flat["optim.kwargs.betas"] == [0.9, 0.99]
    assert flat["estimator.kwargs.a.b"] == 1
    assert flat["data.kwargs"] == {}
    assert flat["seed"] == 0
    known = {f"{f.name}." for f in fields(Config)} | {"seed", "output_dir", "callbacks", "teachers"}
    assert all(any(name.startswith(k) for k in known) for name in flat)


WORDS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12)
KEYS = st.from_regex("[a-z_]{1,8}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
SECTIONS = {
    "student": st.builds(StudentConfig, path=WORDS),
    "teacher": st.builds(TeacherConfig, path=WORDS.filter(bool),
                         quantization=st.sampled_from(["none", "8bit", "4bit"])),
    "reference": st.builds(FrozenConfig, path=st.none() | WORDS),
    "data": st.builds(DataConfig, prompt_template=WORDS.map("{{prompt}}{}".format),
                      train_size=st.none() | st.integers(1, 9),
                      examples=st.lists(st.fixed_dictionaries({"user": WORDS, "assistant": WORDS}), max_size=2)),
    "optim": st.builds(OptimConfig, lr=st.floats(1e-30, 1e30), clip_norm=st.none() | st.floats(1e-9, 1e9),
                       kwargs=st.dictionaries(KEYS, VALUES, max_size=3)),
    "evaluation": st.builds(EvaluationConfig, num_completions=st.integers(4, 9), pass_at=st.lists(st.integers(1, 4))),
}  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.fixed_dictionaries(SECTIONS), st.integers(0, 2**32 - 1), WORDS)
def test_yaml_round_trip(tmp_path_factory, sections, seed, output_dir):
    config = replace(Config(**sections), seed=seed, output_dir=output_dir)
    file = tmp_path_factory.mktemp("round") / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config([file]) == config


def test_yaml_keeps_what_looks_like_an_interpolation(write):
    config = load_config([], PATHS)
    for text in ("costs ${price}", "\\${a}", "${", "a $ {b}", "\\\\${x}"):
        config.data.prompt_template = text
        assert load_config([write("c.yaml", to_yaml(config))]).data.prompt_template == text


def test_configuration_imports_no_torch():
    code = "import sys, lit_opd.config, lit_opd.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "lightning", "mlflow", "transformers"} & set(done.stdout.split())


@pytest.mark.parametrize(("words", "code", "seconds"), [(["--help"], 0, 0.5), (["fit", "optim.lrr=1", *PATHS], 2, 1.0)])
def test_answers_at_once(words, code, seconds):
    times = []
    for _ in range(3):  # the machine may be busy with something else
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-m", "lit_opd", *words], capture_output=True, text=True)
        times.append(time.monotonic() - start)
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == (1 if code else 0)
    assert min(times) < seconds


def test_resolver_does_not_leak_into_other_keys():
    config = load_config([], [*PATHS, "output_dir=${student.path}-${teacher.path}"])
    assert config.output_dir == "s-t"
    assert OmegaConf.has_resolver("lit_opd")
