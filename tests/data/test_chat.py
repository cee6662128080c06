"""Keywords of a chat template reach it wherever prompts of student and teacher are rendered, or are refused."""

import pytest

from lit_opd import PromptDataModule
from lit_opd.config import DataConfig, TeacherConfig, load_config
from lit_opd.data.prompts import encode_rows, render, show
from lit_opd.errors import UserError

# As templates of models that may think: open thinking is closed at once where it is not wanted.
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
QUIET = {"enable_thinking": False}
TURNS = [{"role": "user", "content": "hi"}]


@pytest.fixture
def thinker(make_tokenizer):
    made = make_tokenizer(chat=True)
    made.chat_template = THINKING
    return made


@pytest.mark.parametrize("prompt", ["hi", TURNS])
def test_a_keyword_reaches_the_template(prompt, thinker):
    for keywords, end in (({}, ""), ({"enable_thinking": True}, ""), (QUIET, "<think></think>")):
        config = DataConfig(chat=True, chat_template_kwargs=keywords)
        (ids,) = encode_rows([{"prompt": prompt}], config, thinker).ids
        assert "".join(thinker.convert_ids_to_tokens(ids)) == f"[user]hi[assistant]{end}"


def test_a_teacher_reads_the_students_keywords_or_its_own(thinker, make_tokenizer):
    rows, config = [{"prompt": TURNS}], DataConfig(chat=True, chat_template_kwargs=QUIET)
    prompts = encode_rows(rows, config, thinker)
    reads = TeacherConfig(path="a", reads={"system_prompt": "s"}).shown
    own = TeacherConfig(path="a", reads={"chat_template_kwargs": {"enable_thinking": True}}).shown
    other = make_tokenizer(chat=True)  # whose template knows no thinking
    shown = {"as the student": reads, "alone": own, "of another family": {"tokenizer": other}}
    read = show(prompts, shown, config, thinker).shown
    texts = {name: "".join(thinker.convert_ids_to_tokens(ids)) for name, (ids,) in read.items()}
    assert texts == {"as the student": "[system]s[user]hi[assistant]<think></think>", "alone": "[user]hi[assistant]",
                     "of another family": "<bos>[user]hi[assistant]"}  # fmt: skip
    with pytest.raises(UserError, match=r"^teacher\.reads\.chat_template_kwargs: .*found 'thinking'\. Did you mean"):
        show(prompts, {"teacher": {"chat_template_kwargs": {"thinking": 1}}}, config, thinker)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"enable_thinkin": True}, r"that the tokenizer's chat template reads, found 'enable_thinkin'\. Did you mean"),
        ({"messages": []}, r"found 'messages'\. Known: enable_thinking\."),
        ({"tokenize": True}, r"found 'tokenize'\."),
        ({"add_generation_prompt": False}, r"found 'add_generation_prompt'\."),
    ],
)
def test_a_keyword_that_changes_nothing_is_told(keys, message, thinker):
    with pytest.raises(UserError, match=rf"^data\.chat_template_kwargs: expected keywords .*{message}") as error:
        encode_rows([{"prompt": "hi"}], DataConfig(chat=True, chat_template_kwargs=keys), thinker)
    assert "\n" not in str(error.value)


def test_keywords_without_a_chat_are_refused(thinker):
    with pytest.raises(UserError, match=r"^data\.chat_template_kwargs: expected nothing unless data\.chat=true"):
        render({"prompt": "hi"}, DataConfig(chat_template_kwargs=QUIET), thinker)


def test_a_resumed_run_with_other_keywords_trains_on_other_prompts_and_says_so(thinker):
    def module(words):
        config = load_config(
            [], ["student.path=a", "teacher.path=b", "data.chat=true", "data.batch_size=2", *words]
        ).data
        return PromptDataModule(config, tokenizer=thinker, train_rows=["hi", "ho"])

    loud, quiet = module([]), module(["data.chat_template_kwargs.enable_thinking=false"])
    assert loud.rendered_sha256 != quiet.rendered_sha256
    quiet.load_state_dict({**loud.state_dict(), "completed_batches": 1})
    with pytest.warns(UserWarning, match=r"^rendered_sha256 changed since the checkpoint"):
        quiet.train_dataloader()
