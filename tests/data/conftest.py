"""Real tokenizers of one token a character, made without the network."""

import string

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>"]
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}"
    "{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def make_tokenizer():
    def make(bos=False, eos=False, chat=False):
        vocabulary = {token: i for i, token in enumerate([*SPECIAL, *string.printable])}
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        backend.decoder = decoders.Fuse()
        single = f"{'<bos> ' * bos}$A{' <eos>' * eos}"
        backend.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(t, vocabulary[t]) for t in SPECIAL]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
        )
        tokenizer.chat_template = CHAT_TEMPLATE if chat else None
        return tokenizer

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer()
