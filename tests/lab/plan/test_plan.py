"""The bytes of a plan, counted against tensors and against what was measured on a GPU."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config

from lit_opd.cli import main
from lit_opd.config import Config, OptimConfig, StudentConfig, TeacherConfig, load_config
from lit_opd.errors import UserError
from lit_opd.lab.plan import advise, find_device, make_plan
from lit_opd.lab.plan.optimizers import state_bytes
from lit_opd.lab.plan.phases import model_sizes
from lit_opd.lab.plan.sizes import sizes_of
from lit_opd.models import load_frozen, load_student
from lit_opd.optim import build_optimizer

SPEED = Path(__file__).parents[3] / "docs" / "speed.md"
SHAPES = {"0.6b": (28, 1024, 16, 3072), "1.7b": (28, 2048, 16, 6144)}
G1 = ["student.path=0.6b", "teacher.path=1.7b", "data.batch_size=8", "data.max_prompt_tokens=128",
      "rollout.num_completions=8", "rollout.max_new_tokens=256", "trainer.precision=bf16-mixed",
      "optim.head_chunk_mib=256", "optim.paths=plain", "optim.micro_batch_tokens=16384",
      "evaluation.batch_size=8"]  # fmt: skip


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A folder with the published shapes of Qwen3, as configurations without weights."""
    folder = tmp_path_factory.mktemp("qwen3")
    for name, (layers, hidden, heads, inner) in SHAPES.items():
        sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
        Qwen3Config(vocab_size=151936, num_key_value_heads=8, head_dim=128, intermediate_size=inner,
                    tie_word_embeddings=True, **sizes).save_pretrained(folder / name)  # fmt: skip
    return folder


@pytest.fixture
def g1(qwen3, monkeypatch):
    """Makes the configuration of the step that was measured, with other values."""
    monkeypatch.chdir(qwen3)
    paths = [f"{key}.path={qwen3 / name}" for key, name in (("student", "0.6b"), ("teacher", "1.7b"))]
    return lambda *words: load_config([], [*G1, *paths, *words])


def planned(config, device="h200-141gb"):
    return make_plan(config, find_device(device))


# Weights and optimizers


@pytest.fixture(scope="module")
def wide(make_model, save_model):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    return save_model(make_model(**sizes, tie_word_embeddings=True))


def held_bytes(model):
    """Bytes of a model's tensors, and of what bitsandbytes keeps beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        tensors += [state.absmax] if state is not None else []
        tensors += [parameter.SCB] if getattr(parameter, "SCB", None) is not None else []
    return sum(t.nbytes for t in {t.data_ptr(): t for t in tensors}.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "8bit", "4bit"])
def test_a_teachers_weights(quantization, dtype, wide):
    section = TeacherConfig(path=wide, dtype=dtype, quantization=quantization)
    config = Config(student=StudentConfig(wide), teacher=section)
    stays = planned(config).phases["teacher"]
    assert stays["teacher's weights"] == pytest.approx(held_bytes(load_frozen(section).model), rel=0.1)


@pytest.mark.parametrize("lora", [None, {"r": 4, "target_modules": "all-linear"}])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_students_weights(dtype, lora, wide):
    section = StudentConfig(wide, dtype=dtype, lora=lora)
    config = Config(student=section, teacher=TeacherConfig(path=wide))
    found = planned(config).phases["optimizer"]
    student = load_student(section).model
    assert found["student's weights"] == pytest.approx(held_bytes(student), rel=0.02)
    trained = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    assert found["gradients"] == trained


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("AdamW", {}), ("AdamW", {"fused": False}), ("SGD", {"momentum": 0.9}), ("SGD", {}), ("AdamW8bit", {}),
     ("StochasticAdamW", {}), ("Lion8bit", {}), ("Muon", {})],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizers_state(name, kwargs, dtype):
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("torch has Muon from 2.9 on")
    if "8bit" in name:
        pytest.importorskip("bitsandbytes", minversion="0.50")  # the first with CPUs
    weights = [torch.nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((300, 200), (7, 64 * 64), (500,))]
    config = OptimConfig(name=name, kwargs=kwargs, warmup_steps=9)
    optimizer = build_optimizer(config, weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = optimizer.state.values()
    found = sum(t.nbytes for state in states for t in state.values() if isinstance(t, torch.Tensor))
    codes = {"AdamW8bit": 2, "Lion8bit": 1}.get(name, 0)  # of 8 bits, a table for each of two large tensors
    maps = codes * 4 * 256 * 2
    numbers = [w.numel() for w in weights]
    expected = state_bytes(config, dtype, hidden=1 - numbers[-1] / sum(numbers)) * sum(numbers)
    assert expected == pytest.approx(found - maps, rel=0.1, abs=64)


def test_an_optimizer_that_makes_no_step_here():
    config = OptimConfig(name="torch.optim:LBFGS")
    with pytest.raises(UserError, match="optim.name: expected torch.optim:LBFGS to make a step here, found TypeError"):
        state_bytes(config, torch.float32)


# What was measured on a GPU


def test_the_step_that_was_measured(g1):
    """32.8 GB, on one H200 in torch 2.11: 0.6B in float32 under bf16-mixed from 1.7B, 64 rows of 384 tokens."""
    assert planned(g1()).peak == pytest.approx(32.8e9, rel=0.1)


def test_the_documents_quote_the_plans_of_that_step(g1):
    def said(*words):
        return f"{planned(g1(*words)).peak / 1e9:.1f} GB"

    fast, tokens = ["optim.paths=auto", "optim.head_chunk_mib=auto"], "optim.micro_batch_tokens"
    quoted = [said(), said(*fast), said(*fast, f"{tokens}=8192"), said(*fast, f"{tokens}=4096")]
    quoted.append(said(*fast, f"{tokens}=4096", "student.gradient_checkpointing=true"))
    assert [number for number in quoted if number not in SPEED.read_text()] == []
    assert OptimConfig().micro_batch_tokens == 8192, "which the page calls the default"


def test_the_long_row_that_was_measured(g1):
    """40 GiB of a student's step on one row of 16,384 tokens, head included."""
    words = ["data.batch_size=1", "rollout.num_completions=1", "data.max_prompt_tokens=1", "evaluation.batch_size=1"]
    plan = planned(g1(*words, "rollout.max_new_tokens=16383", "optim.micro_batch_tokens=16384"))
    others = ("teacher's weights", "optimizer's state", "scores")
    found = sum(size for part, size in plan.phases["student"].items() if part not in others)
    assert found == pytest.approx(40 * 2**30, rel=0.1)
    assert f"| {found / 2**30:.1f} GiB | 40 GiB |" in SPEED.read_text()


def test_what_saves_memory_saves_it(g1):
    def peak(*words):
        return planned(g1(*words)).peaks["student"]

    whole = peak()
    assert peak("optim.paths=auto", "rollout.capture=off") < whole  # no mask, no repeated keys
    assert peak("student.gradient_checkpointing=true") < whole - 15e9
    assert peak("optim.micro_batch_tokens=4096") < whole - 12e9
    assert peak("teacher.offload=true") == pytest.approx(whole - 2 * (1.72e9 - 0.311e9), rel=0.01)
    assert peak("teacher.quantization=4bit") < whole - 1.9e9
    assert peak("optim.name=AdamW8bit") == pytest.approx(whole - 6 * 0.596e9, rel=0.01)
    assert peak("trainer.precision=bf16-true") < whole - 5e9


def test_captured_decoding_keeps_its_weights_and_cache(g1):
    plain, captured = (planned(g1("optim.paths=auto", f"rollout.capture={choice}")) for choice in ("off", "auto"))
    more = captured.peaks["optimizer"] - plain.peaks["optimizer"]
    assert more == pytest.approx(2 * 0.596e9 + 2.82e9, rel=0.01)
    cache = 2 * 28 * 64 * 384 * 8 * 128 * 2
    assert captured.phases["student"]["decode cache"] == cache
    assert captured.token_step_s == pytest.approx((2 * 0.596e9 + cache) / 4.8e12, rel=0.01)


def test_teachers_elsewhere_take_nothing_and_several_take_turns(g1, qwen3):
    config = g1()
    served = replace(config, teacher=TeacherConfig(kind="served", server="http://x"))
    assert planned(served).phases["student"]["teacher's weights"] == 0
    assert "teacher" not in planned(served).phases
    several = replace(config, teachers={"a": config.teacher, "b": TeacherConfig(path=str(qwen3 / "0.6b"))})
    own = planned(config).phases["student"]["teacher's weights"]
    assert planned(several).phases["student"]["teacher's weights"] == own


# Limits and advice


@pytest.mark.parametrize("device", ["rtx-4090-24gb", "h100-80gb"])
def test_the_largest_that_fits_fits_and_no_more_does(device, g1):
    config, chosen = g1(), find_device(device)
    sizes = model_sizes(config)
    advice = advise(config, chosen, sizes, make_plan(config, chosen, sizes))
    tokens, size = advice.micro_batch_tokens, advice.batch_size
    assert planned(g1(f"optim.micro_batch_tokens={tokens}"), device).fits
    assert tokens == 64 * 384 or not planned(g1(f"optim.micro_batch_tokens={tokens + 384}"), device).fits
    assert planned(g1(f"data.batch_size={size}"), device).fits
    assert not planned(g1(f"data.batch_size={size + 1}"), device).fits


@pytest.mark.parametrize(
    ("device", "words", "first"),
    [
        ("rtx-4090-24gb", [], "optim.micro_batch_tokens="),
        ("rtx-4090-24gb", ["evaluation.batch_size=512", "optim.micro_batch_tokens=4096"], "evaluation.batch_size=8"),
        ("rtx-4090-24gb", ["optim.head_chunk_mib=9000", "optim.micro_batch_tokens=4096"], "optim.head_chunk_mib=256"),
        ("l4-24gb", ["student.path=1.7b", "optim.micro_batch_tokens=384"], "student.lora="),
    ],
)
def test_advice_that_is_followed_makes_the_run_fit(device, words, first, g1, qwen3):
    words = [word.replace("=1.7b", f"={qwen3}/1.7b") for word in words]
    config, chosen = g1(*words), find_device(device)
    plan, sizes = make_plan(config, chosen), model_sizes(config)
    assert not plan.fits
    advice = advise(config, chosen, sizes, plan)
    assert advice.changes[0].startswith(first)
    assert planned(g1(*words, *advice.changes), device).fits is advice.enough is True


# The command


@pytest.fixture
def run(qwen3, capsys):
    def call(*words):
        paths = [f"student.path={qwen3}/0.6b", f"teacher.path={qwen3}/1.7b"]
        code = main(["plan", *G1, *paths, *words])
        return code, *capsys.readouterr()

    return call


def test_the_command_tells_what_fits(run, tmp_path):
    code, out, err = run("--device", "H200-141GB", "--json", str(tmp_path / "plan.json"))
    assert (code, err) == (0, "")
    assert "largest that fits: optim.micro_batch_tokens=24576, data.batch_size=" in out
    assert out.rstrip().endswith("(student), which fits")
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["peak"] == sum(found["phases"]["student"].values())
    assert found["fits"] is True


def test_the_command_names_the_key_of_what_does_not_fit(run):
    code, out, err = run("--device", "rtx-4090-24gb")
    assert code == 2
    assert err.startswith("error: optim.micro_batch_tokens: expected at most 22.31 GB on rtx-4090-24gb, found 3")
    told = r"in the phase student, of which 20\.\d+ GB activations\. Set optim\.micro_batch_tokens=\d+\.\n"
    assert re.search(told, err)
    assert err.count("\n") == 1
    assert out.rstrip().endswith("which does not fit")


def test_what_no_change_makes_fit(run):
    code, _, err = run("--device", "rtx-4090-24gb", "rollout.max_new_tokens=4000000")
    assert code == 2
    assert "is too little: choose smaller models." in err


def test_an_unknown_device(run):
    code, _, err = run("--device", "h100-90gb")
    assert code == 2
    assert err == "error: --device: expected a device that is known, found 'h100-90gb'. Did you mean 'h100-80gb'?\n"


def test_this_machine(run):
    code, out, err = run("rollout.max_new_tokens=8", "optim.micro_batch_tokens=1")
    assert "this machine's main memory" in out + err
    assert "plain decoding" in out


def test_a_body_of_another_kind_is_told(make_model, save_model):
    folder = save_model(GPT2LMHeadModel(GPT2Config(vocab_size=17, n_embd=16, n_layer=2, n_head=2, n_positions=32)))
    assert sizes_of(StudentConfig(folder), "student").unlike is not None
    plan = planned(Config(student=StudentConfig(folder), teacher=TeacherConfig(path=folder)))
    assert "the student is counted as if it were a Llama: its body is not built like Llama's" in plan.notes
