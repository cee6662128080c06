"""The keys of several teachers: read, refused and compared where a run is resumed."""

import warnings
from dataclasses import replace

import pytest

from lit_opd.cli import main
from lit_opd.config import PACKAGE_FOLDER, load_config, to_yaml
from lit_opd.errors import UserError
from lit_opd.runs.prepare import prepare_data
from lit_opd.runs.resuming import check_changes

TINY = PACKAGE_FOLDER / "tiny"
ROUTE = "def route(row):\n    return 'a' if len(row['answer']) > 2 else {'a': 0.25, 'b': 0.75}\n"


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Overrides of a run with two teachers."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "routes.py").write_text(ROUTE)
    pairs = {
        "student.path": TINY / "student", "teachers.a.path": TINY / "teacher", "teachers.b.path": TINY / "teacher",
        "teachers.b.temperature": 0.5, "data.source": "function", "data.path": "lit_opd.data.arithmetic:problems",
        "data.train_size": 8, "data.validation_size": 4, "data.teacher_column": "routes.py:route",
        "trainer.accelerator": "cpu", "rollout.max_new_tokens": 6,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in pairs.items()]


@pytest.mark.parametrize(("more", "message"), [
    (["teacher.path=x"], "teachers: expected one teacher, or several, found both"),
    (["teachers.a.pth=x"], r"teachers\.a\.pth: expected a known key, .* Did you mean 'path'"),
    (["teachers.a.temperature=0"], r"teachers\.a\.temperature: expected a value above 0"),
    (["teachers.c.kind=served"], r"teachers\.c\.server: expected a value, found nothing"),
    (["teachers.a=x"], r"teachers\.a: expected a section with keys, found x"),
    (["teachers_combined=sum"], "teachers_combined: expected one of mixture, product"),
    (["teachers={a b: {path: x}}"], "teachers: expected names of letters, digits, - and _"),
])  # fmt: skip
def test_sections_that_cannot_be_are_refused(more, message, words):
    with pytest.raises(UserError, match=message):
        load_config([], [*words, *more])


@pytest.mark.parametrize(("more", "message"), [
    ("data.teacher_column=nothing", "data.teacher_column: expected a column of the rows (prompt, answer, completion)"),
    ("data.teacher_column=answer", "data.teacher_column: expected one of the teachers a, b"),
    ("teachers.b.path=nowhere", "teachers.b.path: expected a model folder"),
    ("teachers.b.kind=nowhere.py:f", "teachers.b.kind: expected a Python file"),
])  # fmt: skip
def test_a_run_that_cannot_be_is_refused_in_one_line_and_writes_nothing(more, message, words, capsys, tmp_path):
    more = [more] if "kind" not in more else [more, "teachers.b.path=''"]
    assert main(["fit", *words, *more, "output_dir=out"]) == 2
    (line,) = [one for one in capsys.readouterr().err.splitlines() if not one.startswith("warning")]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_every_row_has_the_weights_that_the_function_gives(words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = prepare_data(load_config([], words))
    for prompts in (data.train_prompts, data.validation_prompts):
        assert prompts.routes == [[1.0, 0.0] if len(r["answer"]) > 2 else [0.25, 0.75] for r in prompts.rows]
    batch = next(iter(data.train_dataloader()))
    assert batch.routes_BM.tolist() == [[1.0, 0.0] if len(r["answer"]) > 2 else [0.25, 0.75] for r in batch.rows]


def test_a_configuration_is_read_back_as_it_was_written(words, tmp_path):
    config = load_config([], words)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config([tmp_path / "config.yaml"]) == config


def test_a_run_is_not_resumed_with_other_teachers(words, tmp_path):
    config = load_config([], words)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "checkpoints").mkdir()
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    check_changes(config, checkpoint, own=True)
    check_changes(load_config([], [*words, "teachers.a.offload=true"]), checkpoint, own=True)
    one = {"a": config.teachers["a"]}
    for other in (
        load_config([], [*words, "teachers.b.temperature=0.25"]), replace(config, teachers=one),
        load_config([], [*words, f"teachers.c.path={TINY / 'teacher'}"]),
    ):  # fmt: skip
        with pytest.raises(UserError, match="teachers: expected .*, as the run has it"):
            check_changes(other, checkpoint, own=True)


@pytest.mark.parametrize(("command", "others"), [("measure", " (or student)"), ("audit", "")])
def test_commands_that_read_whole_distributions_refuse_a_server(command, others, words, capsys):
    one = [word for word in words if not word.startswith(("teachers.", "data.teacher"))]
    served = [*one, "teacher.kind=served", "teacher.server=http://127.0.0.1:9"]
    assert main([command, *served]) == 2
    assert f"teacher.kind: expected local for {command}{others}, which reads" in capsys.readouterr().err


def test_a_schedule_is_read_checked_and_kept_at_a_resume(words, tmp_path, capsys):
    more = ["teachers_schedule.a=[1,0.5]", "teachers_schedule.b=[0,1]"]
    config = load_config([], [*words, *more])
    assert config.teachers_schedule == {"a": [1, 0.5], "b": [0, 1]}
    with pytest.raises(UserError, match=r"teachers_schedule: expected one of the teachers a, b, found 'c'"):
        load_config([], [*words, "teachers_schedule.c=[1,0]"])
    assert main(["fit", *words, "teachers_schedule.a=[1,0]", "output_dir=out"]) == 2
    assert "teachers_schedule: expected a factor above 0 for a teacher of every row" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "checkpoints").mkdir()
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    check_changes(load_config([tmp_path / "config.yaml"]), checkpoint, own=True)
    for other in (load_config([], words), load_config([], [*words, *more, "teachers_schedule.b=[0.5,1]"])):
        with pytest.raises(UserError, match="teachers_schedule: expected .*, as the run has it"):
            check_changes(other, checkpoint, own=True)
