import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_opd.config import DataConfig
from lit_opd.data.prompts import encode, encode_rows, pad_left, pad_token_id, render
from lit_opd.errors import UserError

BOS, EOS = 1, 2


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_render_fills_the_template_with_prompt_and_columns(tokenizer):
    config = DataConfig(prompt_column="q", prompt_template="{level}: {prompt} {{x}}")
    assert render({"q": "1+1?", "level": 3}, config, tokenizer) == "3: 1+1? {x}"


def test_prompt_in_the_template_is_the_prompt_column_even_where_a_column_has_that_name(tokenizer):
    assert render({"q": "right", "prompt": "wrong"}, DataConfig(prompt_column="q"), tokenizer) == "right"


@pytest.mark.parametrize("template", ["{missing}", "{}", "{prompt", "{prompt.nothing}"])
def test_template_that_does_not_fit(template, tokenizer):
    with pytest.raises(UserError, match=r"data\.prompt_template.*braces"):
        render({"prompt": "a"}, DataConfig(prompt_template=template), tokenizer)


def test_chat_puts_the_filled_template_after_the_system_prompt(make_tokenizer):
    config = DataConfig(chat=True, system_prompt="be kind", prompt_template="Q {prompt}")
    text = render({"prompt": "hi"}, config, make_tokenizer(chat=True))
    assert text == "<bos>[system]be kind[user]Q hi[assistant]"


def test_chat_messages_keep_their_own_system_message(make_tokenizer):
    tokenizer = make_tokenizer(chat=True)
    messages = [{"role": "system", "content": "own"}, {"role": "user", "content": "hi"}]
    config = DataConfig(chat=True, system_prompt="ours")
    assert render({"prompt": messages}, config, tokenizer) == "<bos>[system]own[user]hi[assistant]"
    assert render({"prompt": messages[1:]}, config, tokenizer) == "<bos>[system]ours[user]hi[assistant]"


def test_contents_in_parts_are_their_text(make_tokenizer):
    parts = [{"type": "text", "text": "how "}, {"type": "text", "text": "much?", "image": None}]
    # As Parquet gives them: every key in every message.
    messages = [{"role": "user", "content": parts, "name": None}]
    text = render({"prompt": messages}, DataConfig(chat=True), make_tokenizer(chat=True))
    assert text == "<bos>[user]how much?[assistant]"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ([{"type": "image", "url": "a"}], "'image'"), ([{"type": "text", "text": "a"}, {"type": "audio"}], "'audio'"),
        (["a"], "'str'"), (3, "'int'"), (None, "'NoneType'"), ({"a": 1}, "'no text'"), ([{"type": "text"}], "'text'"),
    ],
)  # fmt: skip
def test_contents_that_are_no_text_are_refused(content, kind, make_tokenizer):
    row = {"prompt": [{"role": "user", "content": content}]}
    with pytest.raises(UserError, match=rf"data\.prompt_column: expected messages whose content is text.*{kind}"):
        render(row, DataConfig(chat=True), make_tokenizer(chat=True))


TURNS = [{"role": role, "content": text} for role, text in [("user", "1+1"), ("assistant", "2"), ("user", "2+2")]]
ANSWERED = [*TURNS, {"role": "assistant", "content": "It is"}]


@pytest.mark.parametrize(
    ("choice", "text"),
    [("drop", "<bos>[user]1+1[assistant]2[user]2+2[assistant]"),
     ("continue", "<bos>[user]1+1[assistant]2[user]2+2[assistant]It is")],
)  # fmt: skip
def test_the_last_turn_of_the_assistant_is_dropped_or_continued(choice, text, make_tokenizer):
    config = DataConfig(chat=True, last_assistant_turn=choice)
    assert render({"prompt": ANSWERED}, config, make_tokenizer(chat=True)) == text
    dropped = "<bos>[user]1+1[assistant]2[user]2+2[assistant]"
    assert render({"prompt": TURNS}, config, make_tokenizer(chat=True)) == dropped


def test_a_turn_that_is_continued_has_no_end(make_tokenizer):
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ m.content }}", "{{ m.content }}<eos>")
    text = render({"prompt": ANSWERED[2:]}, DataConfig(chat=True, last_assistant_turn="continue"), tokenizer)
    assert text == "<bos>[user]2+2<eos>[assistant]It is"


def test_the_last_turn_of_the_assistant_is_refused_unless_chosen(make_tokenizer):
    tokenizer = make_tokenizer(chat=True)
    with pytest.raises(UserError, match=r"data\.last_assistant_turn.*ends with the assistant: 'It is'.*drop.*continue"):
        render({"prompt": ANSWERED}, DataConfig(chat=True), tokenizer)
    for role in ("Assistant", "model", "gpt"):
        with pytest.raises(UserError, match=rf"data\.last_assistant_turn.*ends with the {role}: '4'"):
            render({"prompt": [TURNS[0], {"role": role, "content": "4"}]}, DataConfig(chat=True), tokenizer)
    for choice in ("drop", "continue"):
        with pytest.raises(
            UserError, match=r"data\.last_assistant_turn: expected conversations with a turn of the user"
        ):
            render({"prompt": ANSWERED[3:]}, DataConfig(chat=True, last_assistant_turn=choice), tokenizer)


def test_null_in_a_column_of_the_template_is_no_text(tokenizer):
    with pytest.raises(UserError, match=r"data\.prompt_template.*columns \(prompt\)"):
        render({"prompt": "a", "hint": None}, DataConfig(prompt_template="{prompt} {hint}"), tokenizer)


@pytest.mark.parametrize(
    ("prompt", "keys", "key"),
    [
        ("a", {"chat": True}, "data.chat"),  # the tokenizer has no chat template
        ("a", {"system_prompt": "s"}, "data.system_prompt"),
        ([{"role": "user", "content": "a"}], {}, "data.chat"),
        (3, {}, "data.prompt_column"),
        (["a"], {"chat": True}, "data.prompt_column"),
        ([], {"chat": True}, "data.prompt_column"),
    ],
)
def test_what_cannot_be_rendered(prompt, keys, key, tokenizer):
    with pytest.raises(UserError) as error:
        render({"prompt": prompt}, DataConfig(**keys), tokenizer)
    assert error.value.key == key


def test_what_the_chat_template_refuses(make_tokenizer):
    with pytest.raises(UserError, match=r"data\.chat.*unknown role"):
        render({"prompt": [{"role": "judge", "content": "a"}]}, DataConfig(chat=True), make_tokenizer(chat=True))


def test_chat_has_one_beginning_of_sequence(make_tokenizer):
    tokenizer = make_tokenizer(bos=True, eos=True, chat=True)
    config = DataConfig(chat=True)
    (ids,) = encode([render({"prompt": "hi"}, config, tokenizer)], config, tokenizer)
    assert ids.count(BOS) == 1
    assert ids[0] == BOS
    assert EOS not in ids


def test_plain_text_gets_a_beginning_but_no_end(make_tokenizer):
    tokenizer = make_tokenizer(bos=True, eos=True)
    (ids,) = encode(["hi"], DataConfig(), tokenizer)
    assert (ids[0], decoded(tokenizer, ids[1:])) == (BOS, "hi")


@pytest.mark.parametrize("appends", [True, False])
def test_an_end_that_the_prompt_itself_has_stays(appends, make_tokenizer):
    (ids,) = encode(["hi<eos>"], DataConfig(), make_tokenizer(eos=appends))
    assert ids[-1] == EOS


ROWS = [{"prompt": "a" * n + "z"} for n in (1, 5, 9)]


def test_overlong_prompts_are_dropped_and_counted(tokenizer):
    prompts = encode_rows(ROWS, DataConfig(max_prompt_tokens=6), tokenizer)
    assert prompts.rows == ROWS[:2]
    assert [len(ids) for ids in prompts.ids] == [2, 6]
    assert (prompts.dropped, prompts.truncated) == (1, 0)


@pytest.mark.parametrize("bos", [True, False])
def test_truncation_keeps_the_end_and_the_beginning_of_sequence(bos, make_tokenizer):
    tokenizer = make_tokenizer(bos=bos)
    prompts = encode_rows(ROWS, DataConfig(max_prompt_tokens=4, overlong="truncate"), tokenizer)
    kept = [decoded(tokenizer, ids) for ids in prompts.ids]
    assert kept == (["<bos>az", "<bos>aaz", "<bos>aaz"] if bos else ["az", "aaaz", "aaaz"])
    assert (len(prompts), prompts.dropped, prompts.truncated) == (3, 0, 2)


def test_overlong_prompts_are_refused_with_counts(tokenizer):
    with pytest.raises(UserError, match="at most 6 tokens, found 1 of 3 longer, the longest with 10"):
        encode_rows(ROWS, DataConfig(max_prompt_tokens=6, overlong="error"), tokenizer)


def test_dropping_every_prompt_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens.*3 of 3 longer"):
        encode_rows(ROWS, DataConfig(max_prompt_tokens=1), tokenizer)


@pytest.mark.parametrize("empty", ["", " \n"])
@pytest.mark.parametrize("kind", [{}, {"bos": True}, {"chat": True}])
def test_empty_prompt(empty, kind, make_tokenizer):
    with pytest.raises(UserError, match="an empty one in row 1"):
        encode_rows([{"prompt": "a"}, {"prompt": empty}], DataConfig(chat="chat" in kind), make_tokenizer(**kind))


@pytest.mark.parametrize(("key", "value"), [("prompt_template", "Q {prompt}"), ("examples", [{"user": "a"}])])
def test_what_messages_would_ignore_is_refused(key, value, make_tokenizer):
    row = {"prompt": [{"role": "user", "content": "a"}]}
    with pytest.raises(UserError, match=rf"data\.{key}: expected its default where prompts are lists of messages"):
        encode_rows([row], DataConfig(chat=True, **{key: value}), make_tokenizer(chat=True))


def test_half_a_character(tokenizer):
    with pytest.raises(UserError, match=r"data\.prompt_column.*surrogate, in row 1"):
        encode_rows([{"prompt": "a"}, {"prompt": "b\ud800"}], DataConfig(), tokenizer)


def test_prompt_of_nothing_that_the_tokenizer_knows(make_tokenizer):
    tokenizer = make_tokenizer(bos=True)
    tokenizer.unk_token = "?"
    with pytest.raises(UserError, match=r"data\.prompt_column.*nothing but '\?' in row 0"):
        encode_rows([{"prompt": "??"}], DataConfig(), tokenizer)


def test_no_rows_are_no_prompts(tokenizer):
    assert len(encode_rows([], DataConfig(), tokenizer)) == 0


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=7), max_size=5))
def test_padding_is_on_the_left_and_masked(prompts):
    ids_BP, mask_BP = pad_left(prompts, pad_id=99)
    assert (ids_BP.dtype, mask_BP.dtype) == (torch.long, torch.bool)
    assert ids_BP.shape == mask_BP.shape == (len(prompts), max(map(len, prompts), default=0))
    for ids_P, mask_P, prompt in zip(ids_BP, mask_BP, prompts, strict=True):
        assert ids_P[mask_P].tolist() == prompt
        assert mask_P[-len(prompt) :].all()
        assert (ids_P[~mask_P] == 99).all()


def test_padding_token_falls_back(tokenizer):
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == EOS
    tokenizer.eos_token = None
    assert pad_token_id(tokenizer) == 0


def test_chat_puts_worked_turns_before_the_question(make_tokenizer):
    config = DataConfig(chat=True, examples=[{"user": "1+1", "assistant": "2"}])
    text = render({"prompt": "2+2"}, config, make_tokenizer(chat=True))
    assert text == "<bos>[user]1+1[assistant]2[user]2+2[assistant]"


def test_a_worked_turn_needs_both_texts(make_tokenizer):
    with pytest.raises(UserError, match=r"data\.examples: expected a list of \{user: ..., assistant: ...\}"):
        render({"prompt": "2+2"}, DataConfig(chat=True, examples=[{"user": "1+1"}]), make_tokenizer(chat=True))
