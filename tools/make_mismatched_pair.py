"""Make a pair that differs in habits: the teacher spells a tag in other pieces, and ends with another token.

Usage: ``python -m tools.make_mismatched_pair --out FOLDER [--steps N]``

Both models begin from the shipped tiny pair and share one vocabulary, id by id, with five tokens more. The student
writes ``<think>`` as ``<`` ``think>`` and ends with ``<eos>``; the teacher writes it as ``<think`` ``>`` and ends with
``<end>``. It can read the student's spelling, and goes on from there. In that, the pair is like the one of
arXiv:2603.25562, whose teacher gives the student's ``<`` a log-probability of -19. The folder ``student_both_ends`` is
the same student, with ``<end>`` too among the tokens that stop it.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lit_opd.data.arithmetic import problems
from tools.make_tiny_pair import CHARACTERS, IGNORED, SPECIAL_TOKENS, TRAIN_PAIRS, encode, train

SHIPPED = Path(__file__).parents[1] / "lit_opd" / "tiny"
TAG = "<think>"
PIECES = {"student": ("<", "think>"), "teacher": ("<think", ">")}
END = {"student": "<eos>", "teacher": "<end>"}
SEEDS = {"student": 3, "teacher": 4}
LEARNING_RATE = 2e-3
STEPS = 120


def build_tokenizer(role: str) -> PreTrainedTokenizerFast:
    """One token a character but for the tag, which every role spells in its own two pieces."""
    tokens = (*SPECIAL_TOKENS, *CHARACTERS, *PIECES["student"], *PIECES["teacher"], END["teacher"])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    spelling = "|".join(sorted(PIECES[role], key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{spelling}|."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    names = dict(zip(("pad_token", "bos_token", "unk_token"), ("<pad>", "<bos>", "<unk>"), strict=True))
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END[role], padding_side="left", model_max_length=64,
        clean_up_tokenization_spaces=False, **names,
    )  # fmt: skip
    # Neither end is text, whoever decodes.
    made.add_tokens([*END.values()], special_tokens=True)
    return made


def examples(role: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tagged solutions as the role writes them; for the teacher half of them begin as the student writes them."""
    rows = problems(split="train", size=TRAIN_PAIRS // 2, seed=SEEDS[role])
    rows = [row | {"completion": TAG + row["completion"]} for row in rows]
    own = encode(rows, build_tokenizer(role))
    if role == "student":
        return own
    inputs, labels = own[0].clone(), own[1].clone()
    for piece, other in zip(PIECES["teacher"], PIECES["student"], strict=True):
        before, after = (build_tokenizer(role).convert_tokens_to_ids(token) for token in (piece, other))
        # Read, but never written.
        labels[inputs == before] = IGNORED
        inputs[inputs == before] = after
    return torch.cat([own[0], inputs]), torch.cat([own[1], labels])


def grow(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Make room for the new tokens, which begin nearly as ``<unk>``: a token that neither model ever writes."""
    known = model.config.vocab_size
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        noise = model.config.initializer_range * torch.randn_like(weight[known:])
        weight[known:] = weight[tokenizer.unk_token_id] + noise


def make(out: Path, role: str, *, steps: int) -> None:
    """Train one role from its shipped weights and save it as a Hugging Face folder."""
    torch.manual_seed(SEEDS[role])
    tokenizer = build_tokenizer(role)
    model = LlamaForCausalLM.from_pretrained(SHIPPED / role)
    grow(model, tokenizer)
    model.config.eos_token_id = tokenizer.eos_token_id
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    model.generation_config = GenerationConfig(**special)
    print(role)
    train(model, *examples(role), steps=steps, learning_rate=LEARNING_RATE, seed=SEEDS[role])
    model.save_pretrained(out / role)
    tokenizer.save_pretrained(out / role)


def end_by_either(folder: Path, out: Path) -> None:
    """Copy a student and let the teacher's end stop it too: what the audit proposes."""
    shutil.copytree(folder, out, dirs_exist_ok=True)
    file = out / "generation_config.json"
    tokenizer = build_tokenizer("student")
    ends = [tokenizer.convert_tokens_to_ids(END[role]) for role in ("student", "teacher")]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ends}, indent=2) + "\n")


def make_pair(out: Path, *, steps: int) -> None:
    """Write the folders `student`, `teacher` and `student_both_ends`."""
    for role in ("student", "teacher"):
        make(out, role, steps=steps)
    end_by_either(out / "student", out / "student_both_ends")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    # The order in which several threads add floats is not fixed.
    torch.set_num_threads(1)
    make_pair(arguments.out, steps=arguments.steps)


if __name__ == "__main__":
    main()
