import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lit_opd.config import DataConfig
from lit_opd.errors import UserError
from lit_opd.lab.audit.tokenizers import chat_template, segmentation, vocabulary

CHAT = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}"
CALC = "0123456789+=-"
CHATTING = DataConfig(chat=True)


@pytest.fixture
def spelling():
    """Makes a tokenizer over one vocabulary that has the pair `12`, and writes it whole or in two."""

    def make(whole):
        tokens = ["<pad>", "<bos>", "<eos>", "<unk>", *CALC, "12"]
        backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("12|." if whole else "."), "isolated")
        backend.decoder = decoders.Fuse()
        names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), tokens, strict=False))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **names)

    return make


def test_one_vocabulary_passes(tiny_tokenizer):
    found = vocabulary(tiny_tokenizer, tiny_tokenizer, 17, 17)
    assert (found.verdict, found.fix) == ("pass", "")
    assert found.found == "17 ids are the same tokens for both"


def test_padding_of_one_output_layer_is_told_and_passes(tiny_tokenizer):
    found = vocabulary(tiny_tokenizer, tiny_tokenizer, 17, 32)
    assert found.verdict == "pass"
    assert "one output layer has 15 rows of padding more" in found.found
    assert found.numbers == {"shared_ids": 17}


def test_a_permutation_of_the_vocabulary_fails_and_is_counted(make_tiny_tokenizer):
    found = vocabulary(make_tiny_tokenizer("0123456789+=-"), make_tiny_tokenizer("1023456789+=-"), 17, 17)
    assert found.verdict == "fail"
    assert found.found == "id 4 is '0' for the student and '1' for the teacher; 2 of 17 ids differ"
    assert found.fix == "Choose a teacher and a student of one tokenizer family."
    assert found.numbers == {"differing_ids": 2}


def test_an_output_layer_without_rows_for_all_tokens_fails(tiny_tokenizer):
    found = vocabulary(tiny_tokenizer, tiny_tokenizer, 17, 16)
    assert (found.verdict, found.found) == ("fail", "teacher.path has 16")


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


def test_completions_that_both_tokenizers_spell_alike_pass(make_evidence):
    found = segmentation(make_evidence())
    assert (found.verdict, found.fix, found.numbers) == ("pass", "", {"share": 0.0})


def test_completions_that_the_teachers_tokenizer_spells_otherwise_are_shown(make_evidence, spelling):
    evidence = make_evidence()
    rollout = evidence.rollout
    rollout.ids_BT[:, 0], rollout.ids_BT[:, 1] = 5, 6  # "1", "2"
    rollout.real_BT[:, :2] = True
    evidence.student.tokenizer, evidence.teacher.tokenizer = spelling(False), spelling(True)
    found = segmentation(evidence)
    assert (found.verdict, found.numbers) == ("warn", {"share": 1.0})
    assert "the tokenizers spell 64 of 64 completions differently: '1' '2' by the student's, '12'" in found.found
    assert found.fix.startswith("Look at the ids ranked below, and mend ends that differ first.")
    evidence.teacher.tokenizer = spelling(False)
    assert segmentation(evidence).verdict == "pass"
