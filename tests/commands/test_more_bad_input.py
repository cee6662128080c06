"""Two hundred more mistakes: exit code 2, one line, nothing written, and the same line from Python as a UserError."""

import json
import re
import shutil

import pytest
import transformers

from lit_opd import config, runs
from lit_opd.cli import main
from lit_opd.config import PACKAGE_FOLDER
from lit_opd.errors import UserError

# A key, and values that it refuses.
VALUES = {
    "seed": "1.0 one true 4294967296 [1]", "student": "x", "student.path": "[x]", "student.dtype": "fp32 no",
    "student.trust_remote_code": "perhaps", "student.gradient_checkpointing": "maybe", "student.lora": "yes [1]",
    "teacher.temperature": "-1 .inf", "teacher.extra_tokens": "drop", "teacher.kind": "remote",
    "teacher.quantization": "fp8",
    "teacher.offload": "maybe", "reference.dtype": "half", "data.source": "web", "data.kwargs": "3",
    "data.train_size": "0 -3 .5", "data.validation_size": "0", "data.validation_seed": "-1",
    "data.max_prompt_tokens": "0", "data.overlong": "skip", "data.batch_size": "0 1e3",
    "data.verifier": "sometimes json", "data.chat": "true 2.0", "data.system_prompt": "hi",
    "rollout.num_completions": "0", "rollout.max_new_tokens": "0 9999999999", "rollout.min_new_tokens": "-1",
    "rollout.temperature": "-0.1 .nan", "rollout.top_p": "-1 .inf", "rollout.top_k": "-1 1.5", "rollout.min_p": "1",
    "rollout.student_share": "1.1 .nan", "rollout.demonstrations": "web", "estimator.kwargs": "[1]",
    "estimator.terms": "3", "estimator.masked_tokens": "3", "estimator.merged_stops": "all [2] [[2]]",
    "estimator.aggregation": "sum",
    "optim.name": "adamw json:dumps torch.nn:Linear", "optim.lr": "0 -1e-3 .inf 1e400 [1",
    "optim.scheduler": "cosine json:dumps", "optim.warmup_steps": "-1 1.5", "optim.clip_norm": "0 .inf",
    "optim.micro_batch_tokens": "0", "optim.head_chunk_mib": "-1", "trainer": "x", "trainer.max_steps": "0 1.5",
    "trainer.max_epochs": "0", "trainer.max_time": "0", "trainer.limit_train_batches": "0 0.0001",
    "trainer.limit_val_batches": "0 -1", "trainer.precision": "16-mixed 16 8",
    "trainer.strategy": "ddp_spawn ddp_fork ddp_notebook 3", "trainer.devices": "99",
    "trainer.num_sanity_val_steps": "2", "trainer.log_every_n_steps": "0", "trainer.plugins": "x",
    "trainer.default_root_dir": "x", "callbacks": "x", "evaluation.every_n_steps": "0",
    "evaluation.num_completions": "0", "evaluation.max_new_tokens": "-1", "evaluation.batch_size": "0",
    "evaluation.seed": "-1 x", "evaluation.num_examples": "-1", "evaluation.teacher": "perhaps",
    "evaluation.measures": "x", "measure.units": "0", "measure.sketch": "0", "measure.estimators": "x",
    "diagnostics.every_n_steps": "-1", "diagnostics.support_size": "0", "diagnostics.figures": "perhaps",
    "collapse.action": "quit", "collapse.window": "0", "collapse.min_entropy": "-1", "collapse.max_repetition": "0",
    "collapse.max_truncated": "2", "collapse.min_support_mass": "1", "tracking.uri": "ftp://x", "tracking.tags": "x",
    "tracking.system_metrics": "perhaps", "lint.allow": "x",
}  # fmt: skip
# Words of the command line, {bad} being the folder below; the key that is named; text of what was found.
OTHERS = [
    ("output_dir=", "output_dir", "None"), ("student.path=", "student.path", "None"),
    ("teacher.kind={bad}/parts.py:Scorer", "teacher.kind", "SystemExit: 3"),
    ("teacher.kind=json:dumps", "teacher.kind", "too many positional arguments"),
    ("data.path={bad}/parts.py:rows", "data.path", "KeyError: 'column'"),
    ("data.path={bad}/parts.py:no_rows", "data.path", "TypeError: 'NoneType' object is not"),
    ("data.path={bad}/parts.py:number_rows", "data.path", "TypeError: 'int' object is not"),
    ("data.path={bad}/parts.py:few", "data.path", "parts.py:few"),
    ("data.path={bad}/parts.py:leaves", "data.path", "SystemExit"),
    ("data.path={bad}/parts.py:value", "data.path", "none"),
    ("data.path={bad}/leaves.py:f", "data.path", "SystemExit: 0"),
    ("data.path={bad}/binary.py:f", "data.path", "SyntaxError: source code string"),
    ("data.kwargs.nope=1", "data.path", "TypeError: problems() got an"),
    ("data.validation_path={bad}/rows.jsonl", "data.validation_path", "rows.jsonl"),
    ("data.max_prompt_tokens=2", "data.max_prompt_tokens", "the longest with 7"),
    ("data.verifier={bad}/raises.py:f", "data.verifier", "SystemExit"),
    ("data.examples={{}}", "data.examples", "{}"),
    ("data.prompt_template={{nothing}}", "data.prompt_template", "'{nothing}' (KeyError: 'nothing')"),
    ("data.prompt_column=question", "data.prompt_column", "row 0 of"),
    ("data.source=file data.path={bad}/rows.txt", "data.path", "'.txt'"),
    ("data.source=file data.path={bad}", "data.path", "no file"),
    ("data.source=file data.path=null", "data.path", "nothing"), ("rollout.engine=vllm", "rollout.server", "nothing"),
    ("rollout.engine=vllm rollout.server=127.0.0.1:8000", "rollout.server", "'127.0.0.1:8000'"),
    ("rollout.demonstrations=data rollout.student_share=0 estimator.name=supervised data.answer_column=null",
     "rollout.demonstrations", "none in None"),
    ("rollout.engine={bad}/parts.py:Engine", "rollout.engine", "RuntimeError: no server"),
    ("estimator.name=", "estimator.name", "None"),
    ("estimator.name={bad}/parts.py:summed", "estimator.name", "shape []"),
    ("estimator.name={bad}/parts.py:number", "estimator.name", "float"),
    ("estimator.name={bad}/parts.py:nothing", "estimator.name", "NoneType"),
    ("estimator.name={bad}/parts.py:detached", "estimator.name", "one without a gradient"),
    ("estimator.name={bad}/parts.py:integers", "estimator.name", "torch.int64"),
    ("estimator.name={bad}/parts.py:half", "estimator.name", "torch.float16"),
    ("estimator.name={bad}/leaves.py:f", "estimator.name", "SystemExit: 0"),
    ("estimator.name=teacher_topk estimator.kwargs.k=-1", "estimator.kwargs", "k must be a whole number of at"),
    ("estimator.name=teacher_topk estimator.kwargs.k=many", "estimator.kwargs", "k must be a whole number of at"),
    ("estimator.name=hybrid estimator.kwargs.gamma=2", "estimator.kwargs", "gamma must lie in [0, 1], found 2"),
    ("estimator.name=hybrid estimator.kwargs.gamma=fast", "estimator.kwargs", "'<=' not supported between"),
    ("estimator.name=mix", "estimator.kwargs", "missing a required argument: 'terms'"),
    ("estimator.masked_tokens=[99999]", "estimator.masked_tokens", "99999"),
    ("estimator.masked_tokens=[-1]", "estimator.masked_tokens", "-1"),
    ("estimator.merged_stops=[[2,99999]]", "estimator.merged_stops", "99999"),
    ("optim.name={bad}/leaves.py:f", "optim.name", "SystemExit: 0"),
    ("optim.kwargs.betas=[2,3]", "optim.kwargs", "Invalid beta parameter at index 0: 2"),
    ("optim.kwargs.betas=x", "optim.kwargs", "'<=' not supported between"),
    ("optim.kwargs.lr=1", "optim.kwargs", "torch.optim.adamw.AdamW() got"),
    ("optim.scheduler_kwargs.T_max=0", "optim", "ZeroDivisionError: integer modulo"),
    ("optim.scheduler_kwargs.T_max=x", "optim", "TypeError: unsupported operand"),
    ("trainer.limit_train_batches=2.5", "trainer", "You have passed invalid value 2.5"),
    ("trainer.strategy=fsdp", "trainer.strategy", "of auto or ddp: each process has whole models"),
    ("trainer.accelerator=quantum", "trainer", "You selected an invalid accelerator"),
    ("trainer.devices=x", "trainer", "`devices` selected with"),
    ("trainer.num_nodes=0", "trainer", "`num_nodes` must be a positive"),
    ("trainer.profiler=pytorch", "trainer.profiler", "`fit --profile` is PyTorch's"),
    ("trainer.strategy=deepspeed", "trainer.strategy", "of auto or ddp"),
    ("callbacks=[x]", "callbacks[0]", "'x'"),
    ("callbacks=[{bad}/parts.py:NoCallback]", "callbacks[0]", "parts.py:NoCallback, which makes a"),
    ("callbacks=[{bad}/parts.py:Boom]", "callbacks[0]", "OSError: no disk"),
    ("callbacks=[{bad}/parts.py:Leaves]", "callbacks[0]", "SystemExit: 0"),
    ("callbacks=[{bad}/leaves.py:f]", "callbacks[0]", "SystemExit: 0"),
    ("callbacks={{}}", "callbacks", "{}"), ("evaluation.measures=[x]", "evaluation.measures", "'x'"),
    ("evaluation.measures=[json:dumps]", "evaluation.measures", "'json:dumps', which is not"),
    ("tracking.uri=", "tracking.uri", "None"), ("tracking.experiment=", "tracking.experiment", "None"),
    ("lint.allow=[x]", "lint.allow", "'x'"),
    ("--config {bad}/latin.yaml", "--config", "latin.yaml: 'utf-8' codec can't"),
    ("--config {bad}/two.yaml", "--config", "two.yaml: but found another document"),
    ("--config {bad}/dup.yaml", "--config", "dup.yaml: found duplicate key seed"),
    ("--config {bad}/loop.yaml", "--config", "loop.yaml: YAML recursive aliases"),
    ("--config {bad}/nul.yaml", "--config", "nul.yaml: unacceptable character"),
    ("--config {bad}/tag.yaml", "--config", "tag.yaml: could not determine a"),
    ("--config {bad}", "--config", "no file"),
    ("--config", "command line", "argument --config: expected one"),
    ("config.yaml", "config.yaml", "no '='"), ("=1", "=1", "the key ''"), (".=1", ".=1", "the key '.'"),
    ("a.b.c=1", "a", "an unknown one"), ("optim..lr=1", "optim..lr=1", "the key 'optim..lr'"),
    ("optim[0]=1", "optim.0", "an unknown one"), ("optim.lr[0]=1", "optim.lr", "{'0': 1}"),
    ("optim.kwargs={{", "optim.kwargs", "'{': while parsing a flow node"),
    ("output_dir=${{nowhere}}", "output_dir", "Interpolation key 'nowhere' not"),
    ("output_dir=${{output_dir}}", "output_dir", "Recursive interpolation detected"),
    ("--resume", "command line", "argument --resume: expected one"),
    ("--resume nowhere", "--resume", "no file 'nowhere'"),
    ("--nope", "command line", "unknown argument '--nope'. python"),
    ("-x", "command line", "unknown argument '-x'. python -m"),
    ("student.path={bad}/config_list", "student.path", "config.json holds no JSON object"),
    ("teacher.path={bad}/empty_weights", "teacher.path", "empty_weights/model.safetensors:"),
    ("teacher.path={bad}/garbage_bin", "teacher.path", "garbage_bin/pytorch_model.bin: UnpicklingError"),
]  # fmt: skip

PARTS = """
import sys
import lightning as L
from lit_opd.types import Estimate


class NoCallback:
    pass


class Boom(L.Callback):
    def __init__(self):
        raise OSError("no disk")

    def on_train_start(self, *_):
        raise OSError("no disk")


class Late(L.Callback):
    def on_train_batch_end(self, *_):
        raise OSError("no disk")


class Leaves(L.Callback):
    def __init__(self):
        sys.exit(0)


class LeavesLate(L.Callback):
    def on_train_start(self, *_):
        sys.exit(0)


class Engine:
    def __init__(self, rollout):
        raise RuntimeError("no server")


def Scorer(section, tokenizer):
    sys.exit(3)


def rows(split, size, seed):
    raise KeyError("column")


def no_rows(split, size, seed):
    return None


def number_rows(split, size, seed):
    return [1, 2, 3]


def few(split, size, seed):
    return []


def leaves(split, size, seed):
    sys.exit()


def verify(completion, row):
    raise KeyError("no such column")


def estimate(change):
    def estimator(tokens):
        log_ratio = tokens.student_logps_BT.detach() - tokens.teacher_logps_BT
        return change(log_ratio * tokens.student_logps_BT, log_ratio)

    return estimator


value = 3
summed = estimate(lambda loss, kl: Estimate(loss.sum(), kl))
number = estimate(lambda loss, kl: Estimate(1.0, kl))
nothing = estimate(lambda loss, kl: None)
detached = estimate(lambda loss, kl: Estimate(loss.detach(), kl))
integers = estimate(lambda loss, kl: Estimate(loss.long(), kl))
half = estimate(lambda loss, kl: Estimate(loss.half(), kl))
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    texts = {
        "parts.py": PARTS,
        "leaves.py": "import sys\nsys.exit(0)\n", "raises.py": "raise SystemExit\n",
        "two.yaml": "seed: 1\n---\nseed: 2\n",
        "dup.yaml": "seed: 1\nseed: 2\n", "loop.yaml": "optim: &a {kwargs: *a}\n",
        "nul.yaml": "\x00", "tag.yaml": "seed: !!python/object/apply:os.system [ls]\n", "rows.txt": "1+1=",
        "rows.jsonl": json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n", "binary.py": "\x00\x01",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "latin.yaml").write_bytes("seed: 1 # \xe9".encode("latin1"))
    for name in ("config_list", "empty_weights", "garbage_bin"):
        shutil.copytree(PACKAGE_FOLDER / "tiny" / "teacher", folder / name)
    (folder / "config_list" / "config.json").write_text("[1]")
    (folder / "empty_weights" / "model.safetensors").write_bytes(b"")
    (folder / "garbage_bin" / "model.safetensors").unlink()
    (folder / "garbage_bin" / "pytorch_model.bin").write_bytes(b"garbage" * 9)
    return folder


@pytest.fixture
def raised(monkeypatch):
    """What reading the configuration and training raise, as a script in Python would see it."""
    found = []

    def watch(module, name):
        inner = getattr(module, name)

        def call(*arguments):
            try:
                return inner(*arguments)
            except BaseException as error:
                found.append(error)
                raise

        monkeypatch.setattr(module, name, call)

    watch(config, "load_config")
    watch(runs, "train")
    return found


@pytest.fixture
def no_weights(monkeypatch):
    def load(*_, **__):
        pytest.fail("weights were loaded before the mistake was told")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)


CASES = [([f"{key}={value}"], key, value) for key, values in VALUES.items() for value in values.split()]
CASES += [(words.split(), key, text) for words, key, text in OTHERS]


@pytest.mark.parametrize(
    ("words", "key", "text"), CASES, ids=[" ".join(case[0]).replace("{bad}/", "") for case in CASES]
)
def test_bad_input(workspace, bad, no_weights, raised, capsys, words, key, text):
    before = sorted(workspace.folder.rglob("*"))
    if len(words) > 1 or words[0].startswith(("-", "data.path")) or "{" in words[0]:
        words = [word.format(bad=bad) for word in words]
    assert main(workspace.arguments("fit", *words)) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith(f"error: {key}: expected "), line
    assert ", found " in line
    assert text.strip(".") in line or str(float(text)) in line
    assert printed.out == ""
    assert sorted(workspace.folder.rglob("*")) == before
    if key != "command line":
        assert isinstance(raised[-1], UserError)
        assert f"error: {raised[-1]}" == line


@pytest.mark.parametrize("words", [
    "sync", "ui --port 99999", "measure --json .", "audit --json mlflow.db/found.json",
    "validate --checkpoint mlflow.db",
    "test --checkpoint .", "export", "export --checkpoint mlflow.db", "measure measure.estimators=[tokn]",
])  # fmt: skip
def test_other_commands_write_nothing_either(workspace, no_weights, capsys, words):
    before = sorted(workspace.folder.rglob("*"))
    assert main(workspace.arguments(*words.split())) == 2
    printed = capsys.readouterr()
    assert re.fullmatch("error: .*: expected .*, found .*\n", printed.err)
    assert printed.out == ""
    assert sorted(workspace.folder.rglob("*")) == before


def test_all_mistakes_of_a_run_are_told_at_once(workspace, bad, no_weights, capsys):
    other_run = workspace.folder / "run"
    other_run.mkdir()
    (other_run / "config.yaml").write_text("seed: 0\n")
    wrong = {"output_dir": "run", "tracking.uri": "mlruns", "trainer.strategy": "ddp_fork", "trainer.nope": "1",
             "callbacks": f"[{bad}/leaves.py:f]", "estimator.name": "toke", "optim.name": "adamw",
             "student.path": f"{bad}/none", "teacher.path": f"{bad}/empty_weights"}  # fmt: skip
    assert main(workspace.arguments("fit", *(f"{key}={value}" for key, value in wrong.items()))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert {line.split(": ")[1] for line in lines} == {key.replace("callbacks", "callbacks[0]") for key in wrong}


def told(workspace, bad, capsys, part):
    code = main(workspace.arguments("fit", f"callbacks=[{bad}/parts.py:{part}]", "trainer.max_steps=1"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "callbacks[0]: expected " in line]
    assert "parts.py, line " in line
    return code, line


def test_a_part_that_raises_after_a_step_fails_the_run(workspace, bad, capsys):
    code, line = told(workspace, bad, capsys, "Late")
    assert (code, line.split(": ")[0]) == (1, "failed")
    assert "OSError: no disk" in line
    (run,) = workspace.runs
    assert run.info.status == "FAILED"


def test_a_part_that_leaves_before_the_first_step_leaves_nothing_behind(workspace, bad, capsys):
    code, line = told(workspace, bad, capsys, "LeavesLate")
    assert (code, line.split(": ")[0]) == (2, "error")
    assert "SystemExit: 0" in line
    assert not workspace.runs
    assert not workspace.output.exists()


@pytest.mark.parametrize(("key", "words"), [
    ("rollout.server", ["rollout.engine=vllm", "rollout.server=http://127.0.0.1:9"]),
    ("teacher.server", ["teacher.kind=served", "teacher.server=http://127.0.0.1:9", "teacher.patience_s=0"]),
])  # fmt: skip
def test_a_server_that_is_not_there_leaves_nothing_behind(workspace, capsys, key, words):
    before = sorted(workspace.folder.rglob("*"))
    assert main(workspace.arguments("fit", "estimator.name=token", *words)) == 2
    assert f"error: {key}: expected " in capsys.readouterr().err
    assert sorted(workspace.folder.rglob("*")) == before
