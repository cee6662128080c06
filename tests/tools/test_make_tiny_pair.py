import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_opd.data.arithmetic import problems

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "lit_opd" / "tiny"
ROLES = ("teacher", "student")
ACCURACY = {"teacher": (0.95, 1.0), "student": (0.2, 0.45)}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_tiny_pair", ROOT / "tools" / "make_tiny_pair.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Sampling a thousand answers takes longer than everything else that is tested here.
    module.EVALUATION = module.EVALUATION | {"size": 32}
    return module


@pytest.fixture(scope="module", autouse=True)
def single_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tool, tmp_path_factory):
    """Two small runs into two folders."""
    outs = [tmp_path_factory.mktemp("pair") for _ in range(2)]
    for out in outs:
        tool.make_pair(out, teacher_steps=3, student_steps=2)
    return outs


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_runs_write_the_same_bytes(made):
    first, second = map(files, made)
    assert {"recipe.json", "teacher/model.safetensors", "student/model.safetensors"} <= first.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert first.keys() == second.keys()


def test_steps_change_the_weights(tool, made, tmp_path):
    tool.make(tmp_path, "student", steps=3)
    assert files(tmp_path)["student/model.safetensors"] != files(made[0])["student/model.safetensors"]


def test_recipe_records_the_steps_taken(made):
    recipe = json.loads((made[0] / "recipe.json").read_text())
    assert (recipe["teacher"]["steps"], recipe["student"]["steps"]) == (3, 2)


@pytest.mark.parametrize("role", ROLES)
def test_saved_weights_are_the_trained_ones(tool, made, role):
    model, tokenizer = load(made[0] / role)
    recipe = json.loads((made[0] / "recipe.json").read_text())
    assert model.dtype == torch.float32
    assert tool.sampled_accuracy(model, tokenizer, **recipe["evaluation"]) == recipe[role]["accuracy"]


def test_training_lowers_the_loss_of_unseen_problems(tool):
    tokenizer = tool.build_tokenizer()
    model = tool.build_model(tokenizer, shape=tool.ROLES["student"]["shape"], seed=0)
    inputs, labels = tool.encode(problems(split="validation", size=64, seed=0), tokenizer)
    before = model(input_ids=inputs, labels=labels).loss.item()
    data = tool.encode(problems(split="train", size=512, seed=0), tokenizer)
    tool.train(model, *data, steps=12, learning_rate=2e-3, seed=0)
    assert model(input_ids=inputs, labels=labels).loss.item() < before - 0.5


def test_training_does_not_depend_on_the_global_generator(tool):
    tokenizer = tool.build_tokenizer()
    data = tool.encode(problems(split="train", size=512, seed=0), tokenizer)
    shape = tool.ROLES["student"]["shape"]
    models = [tool.build_model(tokenizer, shape=shape, seed=0) for _ in range(2)]
    for global_seed, model in enumerate(models):
        torch.manual_seed(global_seed)
        tool.train(model, *data, steps=1, learning_rate=2e-3, seed=0)
    assert all(torch.equal(first, second) for first, second in zip(*(m.parameters() for m in models), strict=True))


def test_loss_covers_the_completion_and_its_end(tool):
    tokenizer = tool.build_tokenizer()
    rows = problems(split="train", size=50, seed=0)
    inputs, labels = tool.encode(rows, tokenizer)
    for row, text, label in zip(rows, inputs, labels, strict=True):
        trained = label != tool.IGNORED
        assert torch.equal(text[trained], label[trained])
        assert tokenizer.decode(label[trained]) == row["completion"] + "<eos>"
        assert tokenizer.decode(text[~trained], skip_special_tokens=True) == row["prompt"]


@pytest.mark.parametrize("role", ROLES)
def test_shipped_tokenizer(tool, role):
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / role)
    recipe = json.loads((SHIPPED / "recipe.json").read_text())
    assert tokenizer.get_vocab() == {token: index for index, token in enumerate(recipe["vocabulary"])}
    ids = tokenizer.encode("37+58=", add_special_tokens=True)
    assert tokenizer.convert_ids_to_tokens(ids) == ["<bos>", *"37+58="]
    assert tokenizer.encode("37+58=", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "37+58="
    assert tokenizer.encode("7<eos>", add_special_tokens=False)[-1] == tokenizer.eos_token_id
    assert tokenizer.encode("x", add_special_tokens=False) == [tokenizer.unk_token_id]
    assert tokenizer.padding_side == "left"


def test_shipped_pair_shares_one_tokenizer():
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (SHIPPED / "teacher" / name).read_bytes() == (SHIPPED / "student" / name).read_bytes()


@pytest.mark.parametrize("role", ROLES)
def test_shipped_model_matches_the_recipe(tool, role):
    model, tokenizer = load(SHIPPED / role)
    recipe = json.loads((SHIPPED / "recipe.json").read_text())
    settings = {key: recipe[role][key] for key in tool.ROLES[role]}
    assert settings == tool.ROLES[role]
    assert model.num_parameters() == recipe[role]["parameters"]
    assert model.config.vocab_size == len(recipe["vocabulary"]) == len(tokenizer)
    assert {key: getattr(model.config, key) for key in recipe[role]["shape"]} == recipe[role]["shape"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(model.generation_config, name) == getattr(tokenizer, name) is not None


@pytest.mark.parametrize("role", ROLES)
def test_shipped_accuracy(tool, role):
    low, high = ACCURACY[role]
    recipe = json.loads((SHIPPED / "recipe.json").read_text())
    accuracy = tool.sampled_accuracy(*load(SHIPPED / role), split="validation", size=256, seed=1)
    assert low <= accuracy <= high
    # Four standard deviations of a share of 256 at its widest.
    assert accuracy == pytest.approx(recipe[role]["accuracy"], abs=0.125)


def test_teacher_is_larger_and_both_are_small():
    recipe = json.loads((SHIPPED / "recipe.json").read_text())
    assert recipe["student"]["parameters"] < 0.6 * recipe["teacher"]["parameters"] < 0.6 * 600_000
    assert sum(map(len, files(SHIPPED).values())) < 4_000_000


def test_main_writes_where_it_is_told(tool, tmp_path, monkeypatch, capsys):
    arguments = ["make_tiny_pair.py", "--out", str(tmp_path / "pair"), "--teacher-steps", "1", "--student-steps", "1"]
    monkeypatch.setattr("sys.argv", arguments)
    tool.main()
    assert {path.name for path in (tmp_path / "pair").iterdir()} == {"teacher", "student", "recipe.json"}
    printed = capsys.readouterr().out
    assert "teacher: 494592 parameters, sampled accuracy" in printed
    assert "MB" in printed
