"""Every file in conf/recipes/ trains on the tiny pair, and says where each of its numbers is from."""

import re
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest
import yaml

from lit_opd.cli import main
from lit_opd.commands.recipes import FIELDS, all_recipes
from lit_opd.config import load_config, to_flat
from lit_opd.linter import LintWarning
from lit_opd.runs import train

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "conf" / "recipes").glob("*.yaml"))
SMALL = (
    "output_dir=run", "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1", "data.train_size=64", "data.batch_size=8", "data.validation_size=4",
    "rollout.max_new_tokens=6", "evaluation.num_examples=0", "evaluation.teacher=false",
    "diagnostics.figures=false", "diagnostics.every_n_steps=0",
    "tracking.uri=sqlite:///mlflow.db", "tracking.system_metrics=false",
)  # fmt: skip
SOURCED = re.compile(r"\[(C|D|I|P|Pa|2)\]|chosen here")
COMMON = ("student.path", "data.source", "data.path", "data.verifier", "data.train_size", "data.validation_size",
          "rollout.max_new_tokens", "trainer", "tracking.experiment")  # fmt: skip

every_recipe = pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])


@every_recipe
def test_makes_two_steps_without_a_warning_of_the_linter(file, tmp_path, monkeypatch, database):
    shutil.copy(database, tmp_path)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LintWarning)
        outcome = train(load_config([file], SMALL))
    assert outcome.steps == 2
    assert outcome.after["reverse_kl"].mean > 0


@every_recipe
def test_each_number_has_a_source_or_was_chosen_here(file):
    lines = file.read_text().splitlines()
    for node in numbers(yaml.compose(file.read_text())):
        _, _, comment = lines[node.start_mark.line].partition("#")
        assert SOURCED.search(comment), f"{node.value} in line {node.start_mark.line + 1}: {comment}"


def numbers(node):
    """The numbers of a YAML text, with their places."""
    if isinstance(node, yaml.ScalarNode):
        return [node] if node.tag.rpartition(":")[2] in ("int", "float") else []
    parts = node.value if isinstance(node, yaml.SequenceNode) else [value for _, value in node.value]
    return [number for part in parts for number in numbers(part)]


def test_a_number_without_a_source_is_found():
    (found,) = numbers(yaml.compose("optim: {lr: 1.0e-3, name: AdamW}"))
    assert found.value == "1.0e-3"
    assert not SOURCED.search("the learning rate")


@every_recipe
def test_its_head_says_what_it_is(file):
    (recipe,) = [recipe for recipe in all_recipes() if recipe.name == file.stem]
    config, text = load_config([file]), file.read_text()
    assert tuple(recipe.head) == FIELDS
    assert all(recipe.head.values())
    assert re.match(r"\w+", recipe.head["teacher"]).group() == config.teacher.kind
    assert f"--config conf/recipes/{file.name}\n" in text
    assert config.output_dir == f"outputs/recipes/{file.stem}"
    assert config.tracking.run_name == file.stem


def test_all_run_on_the_same_pair_and_prompts():
    flat = [to_flat(load_config([file])) for file in FILES]
    for key in COMMON:
        values = [{k: v for k, v in one.items() if k == key or k.startswith(f"{key}.")} for one in flat]
        assert values[0]
        assert all(value == values[0] for value in values), key


def test_off_policy_then_on_policy_is_one_run():
    """What Qwen3 did: the teacher writes every completion first, then the student does."""
    rollout = load_config([ROOT / "conf" / "recipes" / "qwen3.yaml"]).rollout
    assert 0 < rollout.student_from < 300
    assert (rollout.student_share, rollout.demonstrations) == (1, "teacher")


def test_the_pages_say_what_the_recipes_say(warm_python):
    command = [warm_python, "-m", "tools.make_recipes", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readmes_commands_are_those_of_recipes():
    (table,) = re.findall(r"<!-- recipes -->\n(.*?)<!-- /recipes -->", (ROOT / "README.md").read_text(), re.DOTALL)
    named = re.findall(r"`python -m lit_opd fit --config conf/recipes/(\w+)\.yaml` \|$", table, re.MULTILINE)
    assert len(named) == 5
    assert set(named) <= {file.stem for file in FILES}


def test_the_command_lists_every_file(capsys):
    assert main(["recipes"]) == 0
    printed = capsys.readouterr().out
    assert len(FILES) >= 24
    for recipe in all_recipes():
        assert recipe.file.name in [file.name for file in FILES]
        assert re.search(rf"^\s+{recipe.name}\s", printed, re.MULTILINE), recipe.name
    assert len(all_recipes()) == len(FILES)


def test_the_command_prints_a_file_to_begin_with(capsys):
    assert main(["recipes", "glm5"]) == 0
    assert capsys.readouterr().out == (ROOT / "conf" / "recipes" / "glm5.yaml").read_text()


def test_a_recipe_that_does_not_exist_is_told(capsys):
    assert main(["recipes", "glm"]) == 2
    error = capsys.readouterr().err
    assert error == "error: recipes: expected the name of a recipe, found glm. Did you mean 'glm5'?\n"
