"""Models with random weights in published shapes, made on the device, and the sizes of every case.

Speed does not depend on the weights, so nothing is downloaded. The shapes are those of the Qwen3 family
(config.json of Qwen/Qwen3-0.6B and Qwen3-1.7B). `TINY` has the same structure and takes seconds on a CPU, to see that
everything runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from lit_opd.types import PromptBatch, Prompts, Rollout, SamplingLaw


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, by the names that `Qwen3Config` gives them."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        student, teacher: shapes of the models.
        vocabulary: tokens.
        prompts, completions, prompt, new: G1: prompts, completions of each, and tokens of both.
        long: G2: rows and tokens of a row.
        positions: G3: of the head.
        widths: G3: hidden sizes of student and teacher.
        rows: decoding: rows at a time.
    """

    student: Shape
    teacher: Shape
    vocabulary: int
    prompts: int
    completions: int
    prompt: int
    new: int
    long: tuple[tuple[int, int], ...]
    positions: int
    widths: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]


PUBLISHED = Sizes(
    student=Shape(1024, 3072, 28, 16, 8, 128),
    teacher=Shape(2048, 6144, 28, 16, 8, 128),
    vocabulary=151936, prompts=8, completions=8, prompt=128, new=256,
    long=((1, 16384), (8, 4096)), positions=8192, widths=((1024, 2048), (2048, 4096), (4096, 4096)),
    rows=(1, 8, 64, 256),
)  # fmt: skip
TINY = Sizes(
    student=Shape(32, 64, 2, 4, 2, 8), teacher=Shape(48, 64, 2, 4, 2, 12),
    vocabulary=384, prompts=2, completions=2, prompt=12, new=8,
    long=((1, 64), (2, 32)), positions=64, widths=((32, 48),), rows=(1, 4),
)  # fmt: skip


def sizes_of(job: dict[str, Any]) -> Sizes:
    """The sizes that a job names."""
    return TINY if job["tiny"] else PUBLISHED


def device_of(job: dict[str, Any]) -> torch.device:
    """The accelerator, or the CPU for the tiny sizes where there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None and not job["tiny"]:
        raise SystemExit("expected an accelerator, found none; --tiny runs on a CPU")
    return found or torch.device("cpu")


def make_model(shape: Shape, vocabulary: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
    """Make a model with random weights on the device."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=32768, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **asdict(shape),
    )  # fmt: skip
    with torch.device(device):
        return Qwen3ForCausalLM._from_config(config, dtype=dtype).eval()


def make_hybrid(shape: Shape, vocabulary: int, device: torch.device, dtype: torch.dtype) -> Any:
    """Make a model in the manner of Qwen3.5, of whose layers three in four have linear attention."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig  # not of every transformers that is allowed

    torch.manual_seed(0)
    linear = {"linear_num_value_heads": shape.num_attention_heads, "linear_num_key_heads": shape.num_key_value_heads,
              "linear_key_head_dim": shape.head_dim, "linear_value_head_dim": shape.head_dim}  # fmt: skip
    config = Qwen3_5TextConfig(
        vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=32768, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, **asdict(shape) | {"num_hidden_layers": -(-shape.num_hidden_layers // 4) * 4}, **linear,
    )  # fmt: skip
    with torch.device(device):
        return Qwen3_5ForCausalLM._from_config(config, dtype=dtype).eval()


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer of so many words, w0 to the last."""
    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2")


def make_prompts(sizes: Sizes, number: int, seed: int = 0) -> list[str]:
    """Make prompts of `sizes.prompt` random words each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, sizes.vocabulary, (number, sizes.prompt), generator=generator)
    return [" ".join(f"w{token}" for token in row) for row in ids.tolist()]


def make_batch(sizes: Sizes, prompts: int, device: torch.device) -> PromptBatch:
    """Make prompts of random tokens as the engine takes them."""
    generator = torch.Generator().manual_seed(0)
    ids_BP = torch.randint(4, sizes.vocabulary, (prompts, sizes.prompt), generator=generator).to(device)
    mask_BP = torch.ones_like(ids_BP, dtype=torch.bool)
    return PromptBatch(Prompts(ids_BP, mask_BP), rows=[{}] * prompts, batch=0, places=[*range(prompts)])


def make_rollout(sizes: Sizes, rows: int, tokens: int, device: torch.device) -> Rollout:
    """Make completions of random tokens: each row has `tokens`, of which the first `sizes.prompt` are its prompt."""
    batch, new = make_batch(sizes, rows, device), tokens - sizes.prompt
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(4, sizes.vocabulary, (rows, new), generator=generator).to(device)
    counted, logps = torch.ones_like(ids_BT, dtype=torch.bool), torch.zeros(rows, new, device=device)
    return Rollout.completed(batch, 1, ids_BT, counted, logps, torch.zeros(rows, dtype=torch.bool), SamplingLaw())


def wait(device: torch.device) -> None:
    """Wait until the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device, tries: int = 5, warm_up: int = 2) -> float:
    """The median time of a call, the device's work included."""
    taken = []
    for number in range(warm_up + tries):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        if number >= warm_up:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def peak_gib(run: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory that a call adds to what is held, GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**30


def product_seconds(device: torch.device, *shapes: tuple[int, int, int]) -> float:
    """The time of bf16 products, each [rows, inner] by [inner, columns], one after the other."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for rows, inner, columns in shapes:
        pairs.append((torch.randn(rows, inner, device=device).bfloat16(),
                      torch.randn(inner, columns, device=device).bfloat16()))  # fmt: skip
    return sum(seconds(lambda a=a, b=b: a @ b, device) for a, b in pairs)
