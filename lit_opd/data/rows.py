"""Read rows from a file, the hub, reasoning_gym or a function, and hold some of them out for validation.

The data module calls it, unless rows are given to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_opd.config import DataConfig
from lit_opd.data.readers import Row, import_extra, read_csv, read_file, read_json
from lit_opd.errors import UserError, suggest
from lit_opd.plugins import import_object

__all__ = ["Row", "check_rows", "load_rows", "split_rows"]

# Verifiers that compare with the answer column, so that a missing column is found before any model is loaded.
ANSWER_VERIFIERS = ("exact", "last_number", "math")
DEFAULT_ANSWER_COLUMN = str(DataConfig.answer_column)
# Keywords of `datasets.load_dataset` that its builders do not know.
OF_LOADING = ("keep_in_memory", "num_proc", "save_infos", "storage_options", "streaming", "verification_mode")
# A task with few distinct questions may never yield enough that are not held out.
REASONING_GYM_ROUNDS = 4


def load_rows(config: DataConfig) -> tuple[list[Row], list[Row]]:
    """Load the training and the validation rows, the same in the same order at every call.

    - `file`: a local .jsonl, .json, .parquet or .csv at `path`; validation rows come from `validation_path`, or by the
      rule of `split_rows`. `kwargs` go to the reader in `readers.py`.
    - `hub`: `datasets.load_dataset(path, split=split, **kwargs)`, divided by the rule of `split_rows`; a subset is
      `kwargs.name`. JSON and CSV of a data set are read as local files are.
    - `reasoning_gym`: the task `path` with the settings `kwargs`. Validation questions are drawn with the seed
      `validation_seed`, and no training row asks one of them.
    - `function`: `path` names a function, called once with split="train" and once with split="validation" as
      `function(split=..., size=..., seed=validation_seed, **kwargs)`; `size` is None where `train_size` is null. The
      function keeps the two apart.

    At most `train_size` and `validation_size` rows are returned.

    Raises:
        UserError: the source cannot be read, gives no rows, or lacks a column.
    """
    loaders = {"file": _file, "hub": _hub, "reasoning_gym": _reasoning_gym, "function": _function}
    config.check("data")
    if not config.path:
        raise UserError("data.path", f"what data.source={config.source} reads", "nothing", "Set data.path.")
    if config.validation_path and config.source != "file":
        remedy = "Unset it, or use data.source=file."
        raise UserError("data.validation_path", "null unless data.source=file", repr(config.validation_path), remedy)
    if config.split != DataConfig.split and config.source != "hub":
        remedy = "Unset it, or give data.path the rows that are meant."
        raise UserError("data.split", "unset unless data.source=hub", repr(config.split), remedy)
    train, validation = loaders[config.source](config)
    train, validation = train[: config.train_size], validation[: config.validation_size]
    check_rows(train, config, config.path)
    check_rows(validation, config, config.validation_path or config.path)
    return train, validation


def split_rows(rows: Iterable[Row], config: DataConfig) -> tuple[list[Row], list[Row]]:
    """Divide rows into training and validation by a rule that depends on the prompts and not on their order.

    Rows are ordered by the SHA-256 of (`validation_seed`, the prompt as JSON); the first `validation_size` are the
    validation rows and the rest are the training rows, both in that order. A prompt is never on both sides: training
    rows that repeat the last validation prompt are left out.

    Raises:
        UserError: a row has no prompt, or no training row is left.
    """
    rows = list(rows)
    check_rows(rows, config, config.path or "the rows")
    ordered = sorted(((_split_key(row, config), row) for row in rows), key=lambda pair: pair[0])
    held_out = ordered[: config.validation_size]
    train = [row for key, row in ordered[len(held_out) :] if key > held_out[-1][0]]
    if not train:
        found, remedy = config.validation_size, "Lower it so that training rows are left, or set data.validation_path."
        expected = f"fewer than the {len({key for key, _ in ordered})} different prompts of {len(rows)} rows"
        raise UserError("data.validation_size", expected, found, remedy)
    return train, [row for _, row in held_out]


def check_rows(rows: Sequence[Row], config: DataConfig, where: str) -> None:
    """Check that there are rows and that each has the columns the configuration names.

    Raises:
        UserError: no rows, a row without its prompt or the answer that the verifier compares with, or an answer column
            that was named and that no row has.
    """
    if not rows:
        raise UserError("data.path", "at least one row", f"none in {where}", "Check data.source and data.path.")
    needed = [("data.prompt_column", config.prompt_column)]
    if config.verifier in ANSWER_VERIFIERS and config.answer_column is not None:
        needed.append(("data.answer_column", config.answer_column))
    for index, row in enumerate(rows):
        for key, column in needed:
            value = row.get(column)
            # A list is no answer to compare with, as str would write it in Python's spelling.
            compares = isinstance(value, (str, Number)) and value != "" and value == value
            if value is None or (key == "data.answer_column" and not compares):
                found = f"row {index} of {where} with columns {_columns(row)}"
                remedy = f"Set {key} to one of the columns."
                raise UserError(key, f"a column {column!r} with text in every row", found, remedy)
    column = config.answer_column or DEFAULT_ANSWER_COLUMN
    if column != DEFAULT_ANSWER_COLUMN and all(row.get(column) is None for row in rows):
        expected, found = f"a column {column!r} in some row", f"columns {_columns(rows[0])} in {where}"
        raise UserError("data.answer_column", expected, found, "Set it to one of the columns, or to null.")


def _columns(row: Row) -> str:
    return ", ".join(str(key) for key, value in row.items() if value is not None)


def _split_key(row: Row, config: DataConfig) -> str:
    text = json.dumps([config.validation_seed, row[config.prompt_column]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _file(config: DataConfig) -> tuple[list[Row], list[Row]]:
    rows = read_file("data.path", str(config.path), config.kwargs)
    if config.validation_path is None:
        return split_rows(rows, config)
    return rows, read_file("data.validation_path", config.validation_path, config.kwargs)


def _hub(config: DataConfig) -> tuple[list[Row], list[Row]]:
    import_extra("data.source", "datasets", "demo")
    try:
        rows = _hub_rows(str(config.path), config)
    except Exception as error:  # datasets passes on whatever its readers and the network raise
        cause = f"{type(error).__name__}: {error.__cause__ or error}"
        remedy = "Check data.path, data.split and data.kwargs."
        if isinstance(error, OSError) and error.filename:
            remedy = f"{remedy} Its cache is where HF_HOME says."
        raise UserError("data.path", f"{config.path} to load with Hugging Face datasets", cause, remedy) from error
    return split_rows(rows, config)


def _hub_rows(path: str, config: DataConfig) -> list[Row]:
    import datasets
    from datasets.packaged_modules.csv.csv import Csv
    from datasets.packaged_modules.json.json import Json

    of_builder = {key: value for key, value in config.kwargs.items() if key not in OF_LOADING}
    builder = datasets.load_dataset_builder(path, **of_builder)
    if not isinstance(builder, (Csv, Json)):
        return datasets.load_dataset(path, split=config.split, **config.kwargs).to_list()
    settings = builder.config
    encoding = {"encoding": "utf-8-sig" if settings.encoding in (None, "utf-8") else settings.encoding}
    # Not datasets' own reading of JSON and CSV, which guesses types: see `readers`.
    download = datasets.DownloadManager(download_config=datasets.DownloadConfig(token=config.kwargs.get("token")))
    parts: dict[str, list[Row]] = {}
    for split, files in settings.data_files.items():
        paths = [Path(file) for file in download.iter_files(download.download_and_extract(list(files)))]
        if isinstance(builder, Json):
            read = [read_json(file, settings.field, **encoding) for file in paths]
        else:
            form = {"delimiter": settings.sep, "quotechar": settings.quotechar, "fieldnames": settings.names}
            read = [read_csv(file, **encoding, **form) for file in paths]
        parts[str(split)] = [row for rows in read for row in rows]
    wanted = datasets.ReadInstruction.from_spec(config.split).to_absolute({k: len(rows) for k, rows in parts.items()})
    return [row for part in wanted for row in parts[part.splitname][part.from_ : part.to]]


def _reasoning_gym(config: DataConfig) -> tuple[list[Row], list[Row]]:
    if config.train_size is None:
        expected, found = "a number, as reasoning_gym makes as many questions as wanted", "null"
        raise UserError("data.train_size", expected, found, "Set e.g. data.train_size=1000.")
    validation = reasoning_gym_rows(config, config.validation_size, config.validation_seed)
    held_out = {row[config.prompt_column] for row in validation}
    # Most tasks draw question i of seed s with seed s + i: neighbouring seeds would ask almost the same questions.
    seed = config.validation_seed + config.validation_size
    train: list[Row] = []
    for start in range(seed, seed + REASONING_GYM_ROUNDS * config.train_size, config.train_size):
        drawn = reasoning_gym_rows(config, config.train_size, start)
        train += [row for row in drawn if row[config.prompt_column] not in held_out]
        if len(train) >= config.train_size:
            return train, validation
    if not train:
        found, remedy = "none", "Lower data.validation_size or make the task larger in data.kwargs."
        raise UserError("data.validation_size", f"{config.path} to have questions that are not held out", found, remedy)
    told = f"{config.path} gave only {len(train)} questions that are not held out for validation."
    rank_zero_warn(f"data.train_size={config.train_size}: {told}")
    return train, validation


def reasoning_gym_rows(config: DataConfig, size: int, seed: int) -> list[Row]:
    """Draw questions of one reasoning_gym task, with the metadata that its own scoring wants."""
    task = reasoning_gym_task(config, size, seed)
    answer = config.answer_column or "answer"
    entries = (task[i] for i in range(size))
    return [{config.prompt_column: e["question"], answer: e["answer"], "metadata": e["metadata"]} for e in entries]


def reasoning_gym_task(config: DataConfig, size: int, seed: int) -> Any:
    """Make the reasoning_gym data set that `path` and `kwargs` name.

    Raises:
        UserError: reasoning_gym is not installed, the task is unknown, or its settings are wrong.
    """
    package = import_extra("data.source", "reasoning_gym", "demo")
    names = package.factory.DATASETS
    if config.path not in names:
        raise UserError("data.path", "a reasoning_gym task", repr(config.path), suggest(str(config.path), names))
    try:
        return package.create_dataset(config.path, size=size, seed=seed, **config.kwargs)
    except (TypeError, ValueError, AssertionError) as error:
        found, remedy = f"{error}", "Correct them."
        raise UserError("data.kwargs", f"settings of the reasoning_gym task {config.path}", found, remedy) from error


def _function(config: DataConfig) -> tuple[list[Row], list[Row]]:
    function = import_object("data.path", str(config.path))
    sizes = {"train": config.train_size, "validation": config.validation_size}
    parts = []
    for split, size in sizes.items():
        try:
            rows = function(split=split, size=size, seed=config.validation_seed, **config.kwargs)
            parts.append([dict(row) for row in rows])
        except (Exception, SystemExit) as error:  # it is the user's own
            call = f"{config.path} to give rows for split={split!r}, size={size}"
            remedy = f"Correct the function, data.kwargs or data.{split}_size."
            raise UserError("data.path", call, f"{type(error).__name__}: {error}", remedy) from error
    return parts[0], parts[1]
