"""Tokenizers of one small language that spell it differently."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


def word_tokenizer(tokens, pattern=".", eos="<eos>", unk="<unk>"):
    """The tokens that a pattern cuts out of a text, with ids in the order of the list."""
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token=unk))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token=unk, padding_side="left")


def byte_tokenizer(merges=(), special=("<|end|>",)):
    """Bytes, of which neighbours are merged: as the tokenizers of GPT-2 and its kin."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelt = [tuple(in_bytes(part) for part in pair) for pair in merges]
    tokens = [*special, *alphabet, *dict.fromkeys("".join(pair) for pair in spelt)]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, spelt))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[0])
    made.add_special_tokens({"additional_special_tokens": list(special[1:])})
    return made


def in_bytes(text):
    """The letters by which such a tokenizer writes a text, or bytes that need not be one."""
    names = bytes_to_unicode()
    return "".join(names[byte] for byte in (text if isinstance(text, bytes) else text.encode()))
