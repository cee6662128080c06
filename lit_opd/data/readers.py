"""Read rows from files as they are written: what is text in a file stays that text.

Why here, and not by Hugging Face datasets: it makes 7 of the text 007 and a timestamp of a date, takes `[ ]`, `*` and
`::` in a name for a pattern, and may answer from its cache when a file has changed. `rows` calls this.
"""

from __future__ import annotations

import csv
import importlib
import json
from pathlib import Path
from typing import Any

from lit_opd.errors import UserError, choose

__all__ = ["Row", "import_extra", "read_csv", "read_file", "read_json"]

Row = dict[str, Any]


def read_file(key: str, name: str, kwargs: dict[str, Any]) -> list[Row]:
    """Read a local .jsonl, .json, .csv or .parquet that a key names, with the keywords of its reader.

    Raises:
        UserError: no such file, keywords that its reader does not take, or a file that is damaged, with the line.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(key, "a file", f"no file {name!r}", "Check the path; it is relative to the current folder.")
    choose(key, path.suffix, READERS)
    try:
        return READERS[path.suffix](path, **kwargs)
    except TypeError as error:
        remedy = "A .csv takes encoding and the keywords of csv.DictReader, .json encoding and field, .parquet columns."
        raise UserError("data.kwargs", f"keywords that read a {path.suffix}", str(error), remedy) from error
    except (OSError, ValueError, LookupError, csv.Error, RecursionError, NotImplementedError) as error:
        found = f"{type(error).__name__}: {error}"
        raise UserError(key, f"{name} to read as {path.suffix}", found, "Correct the file or data.kwargs.") from error


def read_json(path: Path, field: str | None = None, encoding: str = "utf-8-sig") -> list[Row]:
    """Read a list of objects, the list that `field` of one object holds, or one object a line."""
    text = path.read_text(encoding)
    try:
        whole: Any = json.loads(text) if text.strip() else []
    except json.JSONDecodeError:
        if text.lstrip().startswith("["):
            raise
        whole = [_line(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if field is not None:
        whole = whole[field]
    rows = whole if isinstance(whole, list) else [whole]
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {index} is no object but {row!r:.40}")
    return rows


def read_csv(path: Path, encoding: str = "utf-8-sig", **dialect: Any) -> list[Row]:
    """Read every cell as its text, with the keywords of `csv.DictReader`."""
    csv.field_size_limit(2**31 - 1)  # csv refuses cells of more than 128 KiB, which a long prompt may have
    with path.open(encoding=encoding, newline="") as file:
        reader = csv.DictReader(file, **{"strict": True, **dialect})
        names = list(reader.fieldnames or [])
        if len(set(names)) < len(names):
            raise ValueError(f"two columns of one name among {', '.join(names)}")
        rows = []
        for row in reader:
            if None in row or None in row.values():  # how DictReader marks cells too many and too few
                raise ValueError(f"line {reader.line_num} has not the {len(names)} cells of the first")
            rows.append(row)
    return rows


def read_parquet(path: Path, columns: list[str] | None = None) -> list[Row]:
    """Read rows with the types that the file gives to its columns."""
    parquet = import_extra("data.path", "pyarrow.parquet", "demo")
    with path.open("rb") as file:  # a path would be searched for words such as day=3, which become columns
        return parquet.ParquetFile(file).read(columns=columns).to_pylist()


def import_extra(key: str, module: str, extra: str) -> Any:
    """Import a package that only an optional extra installs.

    Raises:
        UserError: naming the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(key, f"the package {module!r}", str(error), f'Run: pip install "lit_opd[{extra}]".') from error


def _line(number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error


READERS: dict[str, Any] = {".jsonl": read_json, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet}
