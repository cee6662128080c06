"""Make the tiny pair shipped with the package: a teacher which adds, and a half-trained student.

Usage: ``python tools/make_tiny_pair.py [--out lit_opd/tiny] [--teacher-steps N] [--student-steps N]``

Everything is trained from scratch on ``lit_opd.data.arithmetic``, so the weights depend on nothing but this
script. On one machine with one set of library versions, two runs write the same bytes.
"""

import argparse
import json
import math
import platform
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lit_opd.data.arithmetic import is_correct, problems

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
CHARACTERS = "0123456789+=;"
TRAIN_PAIRS = 8000
BATCH_SIZE = 128
EVALUATION = {"split": "validation", "size": 1024, "seed": 0}
LONGEST_COMPLETION = 20  # tokens of "9+9=18;9+9+1=19;198<eos>"
IGNORED = -100  # the label which the loss of Hugging Face models skips

# The student is stopped where about one sampled answer in three is right: low enough to leave a visible gap,
# high enough that its own samples are worth a teacher's comment.
ROLES: dict[str, dict] = {
    "teacher": {
        "seed": 1,
        "steps": 600,
        "learning_rate": 2e-3,
        "shape": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4},
    },
    "student": {
        "seed": 2,
        "steps": 240,
        "learning_rate": 2e-3,
        "shape": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
    },
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per character, which puts ``<bos>`` in front of every text."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=64,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, *, shape: dict[str, int], seed: int) -> LlamaForCausalLM:
    """Initialise a small Llama which knows the special tokens of the tokenizer."""
    torch.manual_seed(seed)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        **special,
        **shape,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(**special)
    return model


def encode(rows: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode reference solutions as inputs and labels; only the completion and its ``<eos>`` carry a loss."""
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
    # Padding on the right needs no attention mask: no causal position which is trained can see it.
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    prompts = tokenizer([row["prompt"] for row in rows]).input_ids
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    in_prompt = torch.arange(batch.input_ids.shape[1]) < prompt_lengths[:, None]
    labels = batch.input_ids.masked_fill(in_prompt | (batch.attention_mask == 0), IGNORED)
    return batch.input_ids, labels


def train(
    model: PreTrainedModel, inputs: torch.Tensor, labels: torch.Tensor, *, steps: int, learning_rate: float, seed: int
) -> None:
    """Train in place by cross-entropy, with AdamW, a short warm-up and a cosine to zero."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    model.train()
    for step in range(steps):
        batch = torch.randint(len(inputs), (BATCH_SIZE,), generator=generator)
        loss = model(input_ids=inputs[batch], labels=labels[batch]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"  step {step:5d}  loss {loss.item():.4f}", flush=True)
    model.eval()


@torch.inference_mode()
def sampled_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, split: str, size: int, seed: int
) -> float:
    """Measure the share of problems solved by one sample each, drawn at temperature one from the full vocabulary."""
    rows = problems(split=split, size=size, seed=seed)
    prompts = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    torch.manual_seed(seed)
    tokens = model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        max_new_tokens=LONGEST_COMPLETION,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    completions = tokenizer.batch_decode(tokens[:, prompts.input_ids.shape[1] :], skip_special_tokens=True)
    return sum(map(is_correct, completions, rows)) / size


def make(out: Path, role: str, *, steps: int) -> dict:
    """Train one role, save it as a Hugging Face folder and return its entry in the recipe."""
    settings = ROLES[role] | {"steps": steps}
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, shape=settings["shape"], seed=settings["seed"])
    rows = problems(split="train", size=TRAIN_PAIRS, seed=settings["seed"])
    train(
        model,
        *encode(rows, tokenizer),
        steps=steps,
        learning_rate=settings["learning_rate"],
        seed=settings["seed"],
    )
    accuracy = sampled_accuracy(model, tokenizer, **EVALUATION)
    model.save_pretrained(out / role)
    tokenizer.save_pretrained(out / role)
    print(f"{role}: {model.num_parameters()} parameters, sampled accuracy {accuracy:.3f}")
    return settings | {"parameters": model.num_parameters(), "accuracy": accuracy}


def make_pair(out: Path, *, teacher_steps: int, student_steps: int) -> dict:
    """Write both folders and ``recipe.json``, which records how they were made and what they reach."""
    recipe = {
        "task": "lit_opd.data.arithmetic",
        "train_pairs": TRAIN_PAIRS,
        "batch_size": BATCH_SIZE,
        "evaluation": EVALUATION,
        "vocabulary": [*SPECIAL_TOKENS, *CHARACTERS],
        "teacher": make(out, "teacher", steps=teacher_steps),
        "student": make(out, "student", steps=student_steps),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (out / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lit_opd/tiny"))
    parser.add_argument("--teacher-steps", type=int, default=ROLES["teacher"]["steps"])
    parser.add_argument("--student-steps", type=int, default=ROLES["student"]["steps"])
    arguments = parser.parse_args()
    # The order in which several threads add floats is not fixed.
    torch.set_num_threads(1)
    make_pair(arguments.out, teacher_steps=arguments.teacher_steps, student_steps=arguments.student_steps)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"wrote {arguments.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
