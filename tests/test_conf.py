"""Every file in conf/ loads, is commented, and makes two steps; those of conf/compare/ name other files."""

import json
import shutil
import string
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_opd.cli import main
from lit_opd.config import load_config

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "conf").rglob("*.yaml"))
PATHS = ("student.path=student", "teacher.path=teacher")
SMALL = (
    "output_dir=run", "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.devices=1", "data.train_size=8",
    "data.validation_size=4", "data.batch_size=4", "rollout.max_new_tokens=6", "evaluation.every_n_steps=2",
    "evaluation.num_examples=2", "tracking.uri=sqlite:///mlflow.db", "tracking.system_metrics=false",
)  # fmt: skip
SPECIAL = ["<pad>", "<bos>", "<eos>"]
CHAT = (
    "<bos>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

# Those of conf/recipes/ are run by test_recipes.py.
RUNS = [file for file in FILES if file.parent.name == "conf"]

every_file = pytest.mark.parametrize("file", FILES, ids=[str(f.relative_to(ROOT)) for f in FILES])
every_run = pytest.mark.parametrize("file", RUNS, ids=[str(f.relative_to(ROOT)) for f in RUNS])


def make_model(folder, layers, seed):
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *string.printable])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r".|\n"), "isolated")
    backend.decoder = decoders.Fuse()
    special = dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory, database):
    """A folder with a random pair whose tokenizer knows every printable character and chats, and a database."""
    folder = tmp_path_factory.mktemp("conf")
    make_model(folder / "student", layers=1, seed=0)
    make_model(folder / "teacher", layers=2, seed=1)
    shutil.copy(database, folder)
    return folder


@every_run
def test_loads(file):
    config = load_config([file], PATHS if "student" not in file.read_text() else ())
    assert config.output_dir != load_config([], PATHS).output_dir


@every_file
def test_every_key_has_a_comment(file):
    section_told = False
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith(("#", "- ")):
            continue
        told = "#" in line
        if not line.startswith(" "):
            section_told = told
            told |= text.endswith(":")  # its keys are then told one by one
        assert told or section_told, f"line {number}: {text}"


@every_run
def test_makes_two_steps(file, place, tmp_path, monkeypatch, capsys):
    shutil.copy(place / "mlflow.db", tmp_path)
    monkeypatch.chdir(tmp_path)
    inside = "${lit_opd:" in file.read_text()
    pair = () if inside else (f"student.path={place / 'student'}", f"teacher.path={place / 'teacher'}")
    assert main(["fit", "--config", str(file), *SMALL, *pair]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert "after 2 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "models" / "smollm2-teacher").is_dir(), reason="python tools/make_smollm2_pair.py")
def test_smollm2_makes_a_step_with_real_weights(place, tmp_path, monkeypatch, capsys):
    shutil.copy(place / "mlflow.db", tmp_path)
    monkeypatch.chdir(tmp_path)
    pair = [f"{key}.path={ROOT / 'models' / f'smollm2-{key}'}" for key in ("student", "teacher")]
    words = [*SMALL, *pair, "trainer.max_steps=1", "data.batch_size=2", "data.validation_size=2"]
    assert main(["fit", "--config", str(ROOT / "conf" / "smollm2.yaml"), *words]) == 0, capsys.readouterr().err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"]["reverse_kl"]["mean"] > summary["teacher"]["reverse_kl"]["mean"]
