"""The end of a turn is the one that the chat template writes."""

import pytest

from lit_opd.models import LanguageModel, end_of_turn

QWEN = "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content | trim }}<pad>\n{% endfor %}"
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<bos>{{ m.content }}{% else %} {{ m.content }} <eos>{% endif %}"
    "{% endfor %}"
)
TEMPLATES = {
    "after every turn": (QWEN, 0),
    "after the assistant's": (LLAMA_2, 2),
    "as text": ("{% for m in messages %}{{ m.content }};{% endfor %}", None),
    "none": (None, None),
    "one that refuses": ("{{ raise_exception('no') }}", None),
    "one that leaves answers out": (
        "{{ messages[0].content }}<eos>",
        None,
    ),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_first_special_token_after_the_answer_ends_a_turn(kind, make_tiny_tokenizer):
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template, end = TEMPLATES[kind]
    assert end_of_turn(tokenizer) == end


def test_a_completion_ends_with_a_turn_in_a_chat_and_with_the_tokenizers_end_elsewhere(make_model, make_tiny_tokenizer):
    tokenizer, model = make_tiny_tokenizer(), make_model(1)
    model.generation_config.eos_token_id = [1, 2, 5]
    policy = LanguageModel(model, tokenizer, "student")
    assert policy.stop_ids == [1, 2, 5]
    assert policy.end_of_completion(chat=True) == 2, "no template"
    tokenizer.chat_template = QWEN
    assert (policy.end_of_completion(chat=True), policy.end_of_completion(chat=False)) == (0, 2)
    tokenizer.eos_token = None
    model.config.eos_token_id = None
    assert policy.end_of_completion(chat=False) == 1, "the first that something names"
