"""What can go wrong between two models is told before a run, as far as tokenizers and configurations tell it."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

from lit_opd.config import PACKAGE_FOLDER, DataConfig, load_config
from lit_opd.errors import UserError
from lit_opd.linter import LintWarning
from lit_opd.runs.first_look import chat_template, router_loss, small_steps, stop_tokens
from lit_opd.runs.prepare import prepare_data

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"
TINY = PACKAGE_FOLDER / "tiny"
CHAT = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}"
CHATTING = DataConfig(chat=True)
TURNS = "{% for m in messages %}{{ m['content'] }};{% endfor %}"


def test_a_chat_template_that_is_not_used_passes(tiny_tokenizer):
    assert chat_template(tiny_tokenizer, tiny_tokenizer, DataConfig()).found == "not used (data.chat=false)"


def test_chat_templates_are_compared_on_a_conversation(make_tiny_tokenizer):
    student, teacher, other, bare = (make_tiny_tokenizer() for _ in range(4))
    student.chat_template = teacher.chat_template = CHAT
    other.chat_template = CHAT.replace("<bos>", "<eos>")
    found = chat_template(student, teacher, CHATTING)
    assert (found.verdict, found.fix) == ("pass", "")
    found = chat_template(student, other, CHATTING)
    assert found.verdict == "warn"
    assert (
        "differs from character 1: the student reads 'bos>How much is 2 + ', the teacher expects 'eos>How"
        in found.found
    )
    assert found.fix.startswith("The teacher reads the student's rendering.")
    found = chat_template(student, bare, CHATTING)
    assert found.verdict == "warn"
    assert found.found.startswith("the teacher's tokenizer has none that takes a conversation")
    with pytest.raises(UserError, match=r"data\.chat: expected false, as the tokenizer has no chat template"):
        chat_template(bare, student, CHATTING)


def test_the_system_message_is_part_of_the_conversation(make_tiny_tokenizer):
    student, teacher = make_tiny_tokenizer(), make_tiny_tokenizer()
    student.chat_template, teacher.chat_template = CHAT, f"{{% set messages = messages[-3:] %}}{CHAT}"
    assert chat_template(student, teacher, CHATTING).verdict == "pass"
    assert chat_template(student, teacher, DataConfig(chat=True, system_prompt="Be brief.")).verdict == "warn"


def test_the_same_text_to_other_ids_is_told(spelling):
    student, teacher = spelling(False), spelling(True)
    student.chat_template = teacher.chat_template = "{{ '12' }}"
    assert chat_template(student, teacher, CHATTING).found == "a conversation is rendered alike, but to other ids"


@pytest.mark.parametrize(
    ("own", "other", "turn", "verdict", "found"),
    [
        ([2], [2], None, "pass", "'<eos>' for both"),
        ([2, 3], [3], None, "pass", "'<eos>', '<unk>' for the student, '<unk>' for the teacher: the student's include"),
        ([2], [3], None, "warn", "'<eos>' for the student, '<unk>' for the teacher"),
        ([2], [2], 3, "warn", "'<eos>' for the student, whose chat template ends a turn with '<unk>'"),
        ([2, 3], [2], 3, "pass", "'<eos>', '<unk>' for the student, '<eos>' for the teacher"),
        ([], [2], None, "fail", "the student has none, and never ends"),
    ],
)
def test_what_ends_a_completion_is_compared(own, other, turn, verdict, found, tiny_tokenizer):
    look = stop_tokens(tiny_tokenizer, own, other, turn)
    assert look.verdict == verdict
    assert look.found.startswith(found)
    assert ("add 3 ('<unk>') to eos_token_id in its generation_config.json, as [2, 3]" in look.fix) == (
        verdict == "warn"
    )


def test_a_routers_loss_that_is_left_out_is_told():
    config = MixtralConfig(output_router_logits=True, router_aux_loss_coef=0.02)
    look = router_loss(config)
    assert look.verdict == "warn"
    assert look.found.startswith(
        "the student's config.json asks for the router's auxiliary loss (router_aux_loss_coef="
    )
    assert router_loss(MixtralConfig()).verdict == router_loss(LlamaConfig()).verdict == "pass"


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        (["optim.lr=1e-6"], "pass"),
        (["optim.lr=1e-6", "student.dtype=bfloat16"], "warn"),
        (["optim.lr=1e-6", "trainer.precision=bf16-mixed"], "pass"),
        (["optim.lr=1e-6", "trainer.precision=bf16-true"], "warn"),
        (["optim.lr=1e-4", "student.dtype=bfloat16"], "pass"),
        (["optim.lr=1e-6", "student.dtype=bfloat16", "student.lora={r: 2}"], "pass"),
        (["optim.lr=1e-6", "trainer.precision=bf16-true", "student.lora={r: 2}"], "warn"),
        (["optim.lr=1e-5", "student.dtype=float16"], "pass"),
        (["optim.lr=1e-6", "student.dtype=bfloat16", "optim.name=StochasticAdamW"], "pass"),
    ],
)
def test_steps_that_rounding_swallows_are_told(words, verdict):
    """As a step of the optimizer shows: below half of the spacing of numbers nothing moves."""
    look = small_steps(load_config([QUICKSTART], words))
    assert look.verdict == verdict
    assert (torch.tensor(0.02).bfloat16() - 2e-5 == torch.tensor(0.02).bfloat16()).all()
    assert (torch.tensor(0.02).bfloat16() - 1e-4 != torch.tensor(0.02).bfloat16()).all()


@pytest.fixture
def other_end(tmp_path):
    """A copy of the shipped student whose completions end with another token than the teacher's, and that chats."""
    folder = tmp_path / "student"
    shutil.copytree(TINY / "student", folder)
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"eos_token_id": 3}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": TURNS}))
    return folder


def test_fit_tells_it_before_the_data_is_read(other_end):
    words = ["data.train_size=8", "data.validation_size=2", "data.batch_size=4", f"student.path={other_end}"]
    with pytest.warns(LintWarning, match="^stop tokens: .* for the student, '<eos>' for the teacher. Let either"):
        prepare_data(load_config([QUICKSTART], words))
    with pytest.warns(LintWarning, match=r"^small steps: a weight of 0\.02 in bfloat16 moves by 8e-05 or not at all"):
        prepare_data(load_config([QUICKSTART], [*words[:3], "student.dtype=bfloat16", "optim.lr=1e-6"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LintWarning)
        prepare_data(load_config([QUICKSTART], words), tell=False)
        prepare_data(load_config([QUICKSTART], words[:3]))
    with pytest.warns(LintWarning, match="^chat template: the teacher's tokenizer has none that takes a conversation"):
        prepare_data(load_config([QUICKSTART], [*words, "data.chat=true"]))


def test_a_student_that_never_ends_gets_no_demonstrations(other_end):
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((other_end / name).read_text())
        (other_end / name).write_text(json.dumps(settings | {"eos_token_id": None}))
    words = ["data.train_size=8", "data.validation_size=2", "data.batch_size=4", f"student.path={other_end}"]
    with pytest.warns(LintWarning, match=r"^stop tokens: the student has none, and never ends\. Name one"):
        prepare_data(load_config([QUICKSTART], words))
    shown = ["rollout.student_share=0.5", "rollout.demonstrations=data"]
    with pytest.raises(UserError, match=r"^rollout\.demonstrations: expected a student that ends, found none. Name"):
        prepare_data(load_config([QUICKSTART], [*words, *shown]))
