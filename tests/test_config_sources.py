"""Where the values of a configuration come from, what is written beside them, and the files that the package brings."""

import subprocess
import sys

import pytest
import yaml

from lit_opd.cli import main
from lit_opd.config import Config, load_config, to_yaml
from lit_opd.config.comments import all_meanings, places, with_comments
from lit_opd.config.origins import explained
from lit_opd.errors import UserError

MINE = """\
student: {path: a, lora: {r: 2}}
teacher:
  path: b
  reads: &more {system_prompt: x}
data:
  kwargs: {token: verysecret}
  system_prompt: |
    two
    lines
estimator: {name: "token"}
optim:
  scheduler: CosineAnnealingLR
  scheduler_kwargs: {T_max: "${trainer.max_steps}"}
trainer:
  max_steps: 7
"""
WORDS = ("optim.kwargs={betas: [0.1, 0.2]}", "evaluation.pass_at=[1]", "tracking.tags.a=it: is", "output_dir=new")


@pytest.fixture
def mine(write):
    return str(write("mine.yaml", MINE))


def test_every_value_is_told_where_it_came_from(mine):
    config, found = explained(["lit_opd:quickstart.yaml", mine], WORDS)
    assert config == load_config(["lit_opd:quickstart.yaml", mine], WORDS)
    line = {name.split(":", 1)[0]: number for number, name in enumerate(MINE.splitlines(), start=1)}
    assert {key: found[key] for key in ("student.path", "student.lora.r", "teacher.path", "output_dir",
                                        "optim.kwargs.betas", "evaluation.pass_at", "tracking.tags.a", "rollout.top_p",
                                        "optim.kwargs.fused", "trainer.accelerator", "trainer.max_steps",
                                        "optim.scheduler_kwargs.T_max", "estimator.name", "estimator.kwargs",
                                        "data.system_prompt")} == {
        "student.path": f"{mine}:1", "student.lora.r": f"{mine}:1", "teacher.path": f"{mine}:3",
        "output_dir": "override", "optim.kwargs.betas": "override", "evaluation.pass_at": "override",
        "tracking.tags.a": "override", "rollout.top_p": "default",
        "optim.kwargs.fused": "lit_opd:quickstart.yaml:39", "trainer.accelerator": "lit_opd:quickstart.yaml:47",
        "trainer.max_steps": f"{mine}:{line['  max_steps']}",
        "optim.scheduler_kwargs.T_max": f"{mine}:{line['  scheduler_kwargs']}, ${{trainer.max_steps}}",
        "estimator.name": f"{mine}:{line['estimator']}",
        "estimator.kwargs": "default",  # those of the quickstart were another estimator's
        "data.system_prompt": f"{mine}:{line['  system_prompt']}",
    }  # fmt: skip


def test_the_same_name_again_keeps_the_keywords_and_terms_name_the_estimator(write):
    again = str(write("again.yaml", "estimator: {name: 'full_vocab'}\nstudent: {path: a}\nteacher: {path: b}\n"))
    _, found = explained(["lit_opd:quickstart.yaml", again], [])
    assert found["estimator.kwargs.divergence"] == "lit_opd:quickstart.yaml:33"
    _, found = explained([again], ["estimator.terms=[{name: token, weight: 1}]"])
    assert found["estimator.name"] == f"{again}:1"
    _, found = explained([], ["student.path=a", "teacher.path=b", "estimator.terms=[{name: token, weight: 1}]"])
    assert found["estimator.name"] == "estimator.terms"


def test_what_config_prints_is_a_file_for_config(mine, tmp_path, capsys):
    assert main(["config", "--config", mine, *WORDS]) == 0
    out = capsys.readouterr().out
    assert "verysecret" not in out
    (tmp_path / "printed.yaml").write_text(out.replace("***", "verysecret"))
    assert load_config([tmp_path / "printed.yaml"]) == load_config([mine], WORDS)
    assert "  max_steps: 7  " in out
    assert f"# {mine}:15\n" in out
    assert main(["config", "--config", mine, "optim.lrr=1"]) == 2
    assert "optim.lrr: expected a known key" in capsys.readouterr().err


def test_comments_change_no_value():
    text = to_yaml(load_config([], ["student.path=a", "teacher.path=b", "tracking.tags={x: 'a # b', y: 'c\n\nd'}"]))
    commented = with_comments(text, dict.fromkeys(places(text), "said"))
    assert yaml.safe_load(commented) == yaml.safe_load(text)
    assert commented.count("# said\n") == len(places(text))


def test_every_key_of_the_configuration_has_a_meaning():
    said = all_meanings(Config)
    assert {key for key in places(to_yaml(Config())) if not said.get(key)} == set()
    assert said["optim.lr"] == "The learning rate after warm-up."


def test_files_of_the_package_need_no_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert load_config("lit_opd:quickstart.yaml").output_dir == "outputs/quickstart"
    assert load_config("lit_opd:recipes/qwen3.yaml").estimator.name == "full_vocab"
    with pytest.raises(UserError, match=r"found 'lit_opd:quikstart.yaml'\. Did you mean 'lit_opd:quickstart.yaml'\?"):
        load_config("lit_opd:quikstart.yaml")
    assert main(["config", "--config", "nothing.yaml"]) == 2
    assert "found no file 'nothing.yaml'. Check the path, or take lit_opd:quickstart.yaml" in capsys.readouterr().err


def test_both_ways_to_call_tell_the_same_version():
    from importlib.metadata import version

    command = [sys.executable, "-c", "from lit_opd.cli import main; import sys; sys.exit(main())", "--version"]
    for words in (command, [sys.executable, "-m", "lit_opd", "--version"]):
        done = subprocess.run(words, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, f"lit_opd {version('lit_opd')}\n")
