"""Rows of text files and tables, as they stand in the file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from contrastive_mm.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = {*DELIMITERS, ".jsonl", ".parquet"}
LONGEST_FIELD = 2**31 - 1


def read_lines(path: Path) -> list[str]:
    r"""The lines of a UTF-8 file, ended by ``\n`` or ``\r\n`` and by nothing else; a byte order mark is taken off.

    Raises:
        UserError: it can't be read, or is not UTF-8.
    """
    return [line.removesuffix("\r") for line in _read_text(path).split("\n")]


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, TSV, JSONL or Parquet file, by column; the case of its suffix does not matter.

    A column that a CSV or TSV row is too short for is None.

    Raises:
        UserError: it can't be read, or is not what its suffix says; the line is named.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix == ".jsonl":
        lines = (line for line in read_lines(path) if line.strip())
        return [_json_row(path, number, line) for number, line in enumerate(lines, 1)]
    return _delimited_rows(path, DELIMITERS[suffix])


def _read_text(path: Path) -> str:
    try:
        # A byte order mark is no text. Taken off after decoding, so that an error counts bytes from the file's first.
        return path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; convert it, e.g. with iconv -t UTF-8.") from error
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from error


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows: list[dict[str, Any]] = file.read().to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} can't be read as Parquet: {str(error).splitlines()[0]}") from error
    return rows


def _json_row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, row {number}: not JSON ({error.msg} at column {error.colno}).") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise UserError(f"{path}, row {number}: JSON that can't be read ({error}).") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}, row {number}: a JSON object is needed, not {type(row).__name__}.")
    return row


def _delimited_rows(path: Path, delimiter: str) -> list[dict[str, Any]]:
    with _long_fields():
        records = list(_records(path, delimiter))
    if not records:
        return []
    header = records[0][1]
    rows = []
    for line, fields in records[1:]:
        if any(fields[len(header) :]):
            raise UserError(
                f"{path}, line {line}: {len(fields)} fields, where the header has {len(header)}. "
                f"A field that holds {delimiter!r} must stand in quotes."
            )
        rows.append(dict(zip_longest(header, fields[: len(header)])))
    return rows


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not empty, each with the number of the line on which it begins."""
    # Line ends stay as they are: those in quotes belong to the field.
    text = io.StringIO(_read_text(path), newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    begins = 1
    try:
        for fields in reader:
            if fields:
                yield begins, fields
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f'{path}, line {begins}: the row that begins there has a quote (") too many or too few ({error}). '
            'Inside a quoted field, "" stands for a quote.'
        ) from error


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift csv's limit of 131,072 characters a field, which holds for the whole process, and put it back."""
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
