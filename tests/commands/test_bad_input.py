"""Every mistake a user can make: one line, exit code 2, before any weights load and before anything is written."""

import json
import logging
import pickle
import shutil

import pytest
import torch
import transformers

from lit_opd.cli import main
from lit_opd.config import PACKAGE_FOLDER

TINY = PACKAGE_FOLDER / "tiny"


class Harmful:
    def __reduce__(self):
        return (open, ("harmed", "w"))


ENGINES = """
class Takes_nothing:
    pass


class Cannot_sample:
    def __init__(self, rollout):
        pass
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """Things that are wrong with a folder or a file."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.jsonl").write_text("")
    (folder / "no_prompt.jsonl").write_text('{"question": "1+1="}\n' * 9)
    (folder / "no_answer.jsonl").write_text('{"prompt": "1+1="}\n' * 9)
    (folder / "long.jsonl").write_text("".join(json.dumps({"prompt": "1+" * 28 + f"{i}="}) + "\n" for i in range(9)))
    (folder / "malformed.yaml").write_text("student: {path: [\n")
    (folder / "list.yaml").write_text("- seed: 1\n")
    (folder / "not_a_model").mkdir()
    (folder / "file").write_text("text")
    (folder / "broken.py").write_text("def f(:\n")
    (folder / "engines.py").write_text(ENGINES)
    (folder / "other.py").write_text("def something(tokens):\n    return tokens\n")
    other_run = folder / "other_run"
    other_run.mkdir()
    (other_run / "config.yaml").write_text("seed: 0\n")
    _spoil_models(folder)
    _spoil_checkpoints(folder)
    return folder


def _spoil_models(folder):
    for name in ("permuted", "bad_config", "truncated", "no_weights", "no_tokenizer"):
        shutil.copytree(TINY / "teacher", folder / name)
    file = folder / "permuted" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    file.write_text(json.dumps(tokenizer))
    (folder / "bad_config" / "config.json").write_text("{")
    weights = folder / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folder / "no_weights" / "model.safetensors").unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "no_tokenizer" / file).unlink()


def _spoil_checkpoints(folder):
    torch.save({"state_dict": {}}, folder / "weights_only.ckpt")
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({"state_dict": {}, "x": Harmful()}, folder / "harmful.ckpt")
    whole = (folder / "list.ckpt").read_bytes()
    (folder / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "random.ckpt").write_bytes(bytes(range(256)) * 8)
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(Harmful()))
    (folder / "empty.ckpt").write_bytes(b"")


FILE = "data.source=file data.verifier=null data.max_prompt_tokens=64 data.validation_size=2"
# Words of the command line, {bad} being the folder above; the key that is named; further text of the message.
MISTAKES = [
    ("optim.lrr=1", "optim.lrr", "Did you mean 'lr'?"),
    ("sed=1", "sed", "Did you mean 'seed'?"),
    ("optim.lr=fast", "optim.lr", "'fast'"),
    ("data.batch_size=2.5", "data.batch_size", "2.5"),
    ("rollout.top_p=0", "rollout.top_p", "(0, 1]"),
    ("optim.lr", "optim.lr", "key=value"),
    ("data=3", "data", "a section"),
    ("--config {bad}/missing.yaml", "--config", "no file"),
    ("--config {bad}/malformed.yaml", "--config", "valid YAML"),
    ("--config {bad}/list.yaml", "--config", "a list"),
    ("--unknown", "command line", "'--unknown'"),
    ("estimator.name=reverse", "estimator.name", "'reverse'"),
    ("estimator.kwargs.divergense=jsd", "estimator.kwargs.divergense", "Did you mean 'divergence'?"),
    ("estimator.name={bad}/missing.py:f", "estimator.name", "no file"),
    ("estimator.name={bad}/broken.py:f", "estimator.name", "SyntaxError"),
    ("estimator.name={bad}/other.py:some_thing", "estimator.name", "Did you mean 'something'?"),
    ("estimator.name=no_such_package:f", "estimator.name", "no_such_package"),
    ("estimator.aggregation=mean", "estimator.aggregation", "token_mean"),
    ("estimator.name=teacher_topk estimator.kwargs.k=18", "estimator.kwargs.k", "17"),
    ("estimator.name=teacher_topk estimator.kwargs.k=1", "estimator.kwargs", "at least 2"),
    ("estimator.name=token rollout.temperature=0", "rollout.temperature", "token"),
    ("estimator.masked_tokens=[nonsense]", "estimator.masked_tokens", "nonsense"),
    ("student.path={bad}/missing", "student.path", "no folder"),
    ("student.path={bad}/file", "student.path", "file"),
    ("student.path={bad}/not_a_model", "student.path", "config.json"),
    ("teacher.path={bad}/not_a_model", "teacher.path", "config.json"),
    ("student.path={bad}/bad_config", "student.path", "bad_config"),
    ("teacher.path={bad}/truncated", "teacher.path", "truncated"),
    ("student.path={bad}/truncated", "student.path", "truncated"),
    ("teacher.path={bad}/no_weights", "teacher.path", "no_weights"),
    ("student.path={bad}/no_tokenizer", "student.path", "no_tokenizer"),
    ("teacher.path={bad}/permuted", "teacher.path", "'1' for the student and '2' for the teacher"),
    ("teacher.quantization=3bit", "teacher.quantization", "4bit"),
    (FILE + " data.path={bad}/missing.jsonl", "data.path", "missing.jsonl"),
    (FILE + " data.path={bad}/empty.jsonl", "data.path", "empty.jsonl"),
    (FILE + " data.path={bad}/no_prompt.jsonl", "data.prompt_column", "question"),
    (FILE + " data.path={bad}/no_answer.jsonl data.verifier=exact", "data.answer_column", "prompt"),
    (FILE + " data.path={bad}/long.jsonl", "data.max_prompt_tokens", "context"),
    ("data.batch_size=25", "data.batch_size", "24"),
    ("data.verifier=correctness", "data.verifier", "correctness"),
    ("data.verifier=lit_opd.data.arithmetic:correct", "data.verifier", "Did you mean 'is_correct'?"),
    ("output_dir={bad}/other_run", "output_dir", "another run"),
    ("output_dir={bad}/file/run", "output_dir", "is a file"),
    ("tracking.uri=http://127.0.0.1:1", "tracking.uri", "refused"),
    ("tracking.uri=http://127.0.0.1:port", "tracking.uri", "port"),
    ("tracking.uri=sqlite:///{bad}/missing/mlflow.db", "tracking.uri", "no folder"),
    ("tracking.uri=sqlite:///{bad}/file", "tracking.uri", "SQLite"),
    ("tracking.uri=mlruns", "tracking.uri", "sqlite:///"),
    ("trainer.max_step=3", "trainer.max_step", "Did you mean 'max_steps'?"),
    ("trainer.logger=true", "trainer.logger", "tracking"),
    ("trainer.gradient_clip_val=1", "trainer.gradient_clip_val", "optim.clip_norm"),
    ("trainer.fast_dev_run=true", "trainer.fast_dev_run", "max_steps=2"),
    ("trainer.precision=banana", "trainer", "banana"),
    ("trainer.precision=16-true", "trainer.precision", "bf16-mixed"),
    ("trainer.accelerator=foo", "trainer", "foo"),
    ("trainer.devices=0", "trainer", "devices"),
    ("trainer.max_steps=-5", "trainer", "-5"),
    ("trainer.max_steps=many", "trainer.max_steps", "'many'"),
    ("trainer.log_every_n_steps=often", "trainer.log_every_n_steps", "'often'"),
    ("trainer.strategy=foo", "trainer", "foo"),
    ("rollout.engine={bad}/other.py:some_thing", "rollout.engine", "Did you mean 'something'?"),
    ("rollout.engine={bad}/engines.py:Takes_nothing", "rollout.engine", "Takes_nothing to take RolloutConfig"),
    ("rollout.engine={bad}/engines.py:Cannot_sample", "rollout.engine", "a method `sample`"),
    ("evaluation.measures=[{bad}/missing.py:f]", "evaluation.measures", "no file"),
    ("evaluation.measures=[{bad}/other.py:some_thing]", "evaluation.measures", "Did you mean 'something'?"),
    ("evaluation.measures=[{bad}/other.py:something]", "evaluation.measures", "register_measure"),
    ("callbacks=3", "callbacks", "a list"),
    ("callbacks=[3]", "callbacks[0]", "{path: ..., kwargs: {...}}"),
    ("callbacks=[{{\"path\":\"a:b\",\"keywords\":{{}}}}]", "callbacks[0]", "keywords"),
    ("callbacks=[json:dumps]", "callbacks[0]", "json:dumps to take nothing"),
    ("callbacks=[{{\"path\":\"lightning:Callback\"}},json:nothing]", "callbacks[1]", "class 'nothing' in json"),
    ("callbacks=[{{\"path\":\"json:JSONEncoder\",\"kwargs\":{{\"idnt\":1}}}}]", "callbacks[0]", "idnt"),
    ("callbacks=[json:JSONEncoder]", "callbacks[0]", "which makes a JSONEncoder"),
    ("trainer.callbacks=[json:JSONEncoder]", "trainer.callbacks", "Set callbacks"),
    ("optim.name=Adamm", "optim.name", "'Adam'"),
    ("optim.name=LBFGS", "optim", "LBFGS"),
    ("optim.kwargs.weight_dcay=0.1", "optim.kwargs", "weight_dcay"),
    ("optim.kwargs.weight_decay=-1", "optim.kwargs", "weight_decay"),
    ("optim.scheduler=Cosine", "optim.scheduler", "Cosine"),
    ("optim.scheduler=ReduceLROnPlateau", "optim", "ReduceLROnPlateau"),
    ("optim.scheduler_kwargs.T_mx=3", "optim.scheduler_kwargs", "T_mx"),
    ("optim.scheduler_kwargs.T_max=${{trainer.steps}}", "optim.scheduler_kwargs.T_max", "trainer.steps"),
    ("--resume {bad}/missing.ckpt", "--resume", "no file"),
    *((f"--resume {{bad}}/{name}.ckpt", "--resume", name)
      for name in ("empty", "truncated", "random", "pickle", "harmful", "list", "weights_only")),
]  # fmt: skip


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_, **__):
        pytest.fail("weights were loaded before the mistake was told")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def one_line(err, key, text):
    (line,) = err.splitlines()
    assert line.startswith(f"error: {key}"), line
    assert "expected" in line
    assert "found" in line
    assert text in line
    assert line.endswith((".", "?"))


@pytest.mark.parametrize(("words", "key", "text"), MISTAKES, ids=[m[0].replace("{bad}/", "") for m in MISTAKES])
def test_mistake_is_told_in_one_line_before_anything_happens(
    workspace, bad, no_weights, capsys, monkeypatch, words, key, text
):
    before = contents(workspace.folder) | contents(bad)
    if "://127" not in words:
        monkeypatch.setattr("mlflow.tracking.MlflowClient.__init__", lambda *_: pytest.fail("MLflow was asked"))
    assert main(workspace.arguments("fit", *(word.format(bad=bad) for word in words.split()))) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    one_line(printed.err, key, text)
    assert contents(workspace.folder) | contents(bad) == before
    assert not workspace.output.exists()


@pytest.mark.parametrize("command", ["validate", "test", "export"])
@pytest.mark.parametrize("name", ["missing", "truncated", "random", "pickle", "list"])
def test_damaged_checkpoint_is_told_before_weights_load(workspace, bad, no_weights, capsys, command, name):
    assert main(workspace.arguments(command, "--checkpoint", f"{bad}/{name}.ckpt")) == 2
    one_line(capsys.readouterr().err, "--checkpoint", name)
    assert not workspace.output.exists()


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluations_check_the_same(workspace, bad, no_weights, capsys, command):
    assert main(workspace.arguments(command, "--untrained", "trainer.precision=banana")) == 2
    one_line(capsys.readouterr().err, "trainer", "banana")
    assert main(workspace.arguments(command, "--untrained", f"teacher.path={bad}/permuted")) == 2
    one_line(capsys.readouterr().err, "teacher.path", "'1' for the student")


def test_checkpoint_of_another_student_is_refused(workspace, capsys):
    weights = {"model.lm_head.weight": torch.zeros(17, 8)}
    torch.save({"state_dict": weights}, "other.ckpt")
    assert main(workspace.arguments("validate", "--checkpoint", "other.ckpt")) == 2
    one_line(capsys.readouterr().err, "--checkpoint", "other.ckpt")
    state = dict.fromkeys(("global_step", "loops", "optimizer_states", "torch_rng_state", "pytorch-lightning_version"))
    torch.save({"state_dict": weights, **state}, "other.ckpt")
    assert main(workspace.arguments("fit", "--resume", "other.ckpt")) == 2
    one_line(capsys.readouterr().err, "--resume", "other.ckpt")
    assert not workspace.output.exists()


def test_export_without_a_run_says_how_to_name_one(workspace, no_weights, capsys):
    assert main(workspace.arguments("export")) == 2
    err = capsys.readouterr().err
    one_line(err, "output_dir", "last.ckpt")
    assert "Set output_dir to a run's folder, or give --checkpoint." in err
    assert not workspace.output.exists()


@pytest.mark.parametrize("command", ["validate", "test"])
def test_evaluations_say_which_student_is_measured(workspace, command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "default: the newest of output_dir" in " ".join(capsys.readouterr().out.split())
    assert main(workspace.arguments(command)) == 2
    err = capsys.readouterr().err
    one_line(err, "output_dir", "last.ckpt")
    assert "Set output_dir to a run's folder, or give --checkpoint or --untrained." in err
    assert main(workspace.arguments(command, "--untrained", "--checkpoint", "some.ckpt")) == 2
    one_line(capsys.readouterr().err, "--untrained", "'some.ckpt'")


def test_a_hub_that_does_not_answer_is_told_once(workspace, capsys, monkeypatch):
    read = transformers.AutoConfig.from_pretrained

    def attempt(path, **keywords):
        if path != "some/student":
            return read(path, **keywords)
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("no such name in the cached files.\nA second line.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", attempt)
    assert main(workspace.arguments("fit", "student.path=some/student")) == 2
    err = capsys.readouterr().err
    told = "'some/student', no folder here and not to be had from the hub: no such name in the cached files. Check"
    one_line(err, "student.path", told)


def test_export_to_where_nothing_can_be_written(workspace, bad, no_weights, capsys):
    torch.save({"state_dict": {}}, "some.ckpt")
    assert main(workspace.arguments("export", "--checkpoint", "some.ckpt", "--out", f"{bad}/file/x")) == 2
    one_line(capsys.readouterr().err, "--out", "is a file")


def test_no_command_is_a_mistake(capsys):
    assert main([]) == 2
    one_line(capsys.readouterr().err, "command line", "COMMAND")


@pytest.mark.parametrize("words", ["optim.lrr=1", "trainer.precision=banana"])
def test_mistake_in_a_real_process(workspace, words):
    done = workspace.run(*workspace.arguments("fit", words))
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, words.partition(".")[0], words.partition("=")[2] if "banana" in words else "'lr'")
    assert not workspace.output.exists()
