"""Rows of CSV and JSONL files, strictly: what cannot be read is refused with its file, its line and what to do.

Nothing is skipped and nothing is guessed: a row that is left out in silence is one that nobody misses until it counts.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from bigtrain.data.paths import missing
from bigtrain.errors import DataError
from bigtrain.named import nearest

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_LONGEST_FIELD = 1 << 26  # characters; Python's own limit, 2^17, is less than many a document
_HALF = re.compile("[\ud800-\udfff]")  # of a character of UTF-16: JSON can write one alone, and no tokenizer reads it


class Row(NamedTuple):
    """One row.

    Attributes:
        place: The file and the line where it begins.
        values: By column: text in CSV; whatever JSON has in JSONL.
    """

    place: str
    values: Mapping[str, Any]


def read_rows(path: Path, columns: Sequence[str], *, where: str) -> Iterator[Row]:
    """The rows of a file, each with all of these columns.

    Args:
        path: A .csv or .tsv file with a line of names, or .jsonl with an object on each line; UTF-8.
        columns: What every row must have; further columns are left alone.
        where: The key of the run file that names the file, for errors.

    Raises:
        DataError: Naming the file, the line and the remedy.
    """
    if not path.is_file():
        raise missing(path, "a .csv, .tsv or .jsonl file", where=where)
    if path.suffix in _DELIMITERS:
        return _rows_of_csv(path, columns, _DELIMITERS[path.suffix])
    if path.suffix in _JSON_LINES:
        return _rows_of_json(path, columns)
    raise DataError(
        f"{str(path)!r} is neither .csv, .tsv nor .jsonl",
        where=where,
        remedy="convert it: .jsonl has one JSON object on each line, .csv a line of column names first",
    )


def bad_row(place: str, problem: str, remedy: str) -> DataError:
    """The error for one row."""
    return DataError(problem, where=place, remedy=remedy)


def text_of(row: Row, column: str) -> str:
    """A column's text.

    Raises:
        DataError: Where it is empty, or no text.
    """
    value = row.values[column]
    if not isinstance(value, str):
        raise bad_row(row.place, f"{column!r} is {_kind(value)}, not text", "put a text there, in quotes")
    if not value.strip():
        raise bad_row(row.place, f"{column!r} is empty", "give it a text, or take the row out")
    return value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file with their numbers, from 1; each keeps its end."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    problem = f"the line is not UTF-8: {error.reason} at byte {error.start}"
                    raise bad_row(f"{path}:{number}", problem, "convert the file to UTF-8") from error
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be read: {error.strerror or error}",
            where=str(path),
            remedy="check the file and its rights",
        ) from error


# ---- CSV ----------


def _rows_of_csv(path: Path, columns: Sequence[str], delimiter: str) -> Iterator[Row]:
    with _long_fields():
        reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
        header = _next(reader, path)
        if not header:
            raise bad_row(f"{path}:1", "the file has no line of column names", "begin it with one")
        _check_columns(columns, header, f"{path}:1")
        twice = next((name for name in header if header.count(name) > 1 and name in columns), None)
        if twice is not None:
            raise bad_row(f"{path}:1", f"the column {twice!r} is there twice", "give columns different names")
        empty = None
        while True:
            place = f"{path}:{reader.line_num + 1}"
            fields = _next(reader, path)
            if fields is None:
                return
            if empty is not None:  # at the very end an empty line is only the end of the file
                raise bad_row(empty, "the row is empty", "take the line out")
            if not fields:
                empty = place
                continue
            if len(fields) != len(header):
                raise bad_row(
                    place,
                    f"the row has {len(fields)} fields, and there are {len(header)} columns",
                    'put right its quotes and commas: a text that holds one is put in quotes, "like, this"',
                )
            yield Row(place, dict(zip(header, fields, strict=True)))


def _next(reader: Any, path: Path) -> list[str] | None:
    """The next row's fields; None at the end."""
    begins = reader.line_num + 1
    try:
        return next(reader, None)
    except csv.Error as error:
        raise bad_row(
            f"{path}:{begins}",
            f"the row that begins here cannot be read: {error}",
            'put right its quotes: a quote within a text is doubled, "like ""this"""',
        ) from error


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


# ---- JSONL ----------


def _rows_of_json(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    empty = None
    for number, line in _lines(path):
        place = f"{path}:{number}"
        if empty is not None:
            raise bad_row(empty, "the row is empty", "take the line out")
        if not line.strip():
            empty = place
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise bad_row(
                place, f"the line is no JSON: {error}", "put right the line, or take it out: one object on each line"
            ) from error
        if not isinstance(values, dict):
            raise bad_row(place, f"the line holds {_kind(values)}, not an object", 'write {"column": value, …}')
        _check_columns(columns, values, place)
        if "\\u" in line and _HALF.search(json.dumps([values[column] for column in columns], ensure_ascii=False)):
            raise bad_row(
                place, "a text has half a character, \\ud800 to \\udfff alone", "write whole ones, or take it out"
            )
        yield Row(place, values)


def _check_columns(columns: Sequence[str], there: Sequence[str] | Mapping[str, Any], place: str) -> None:
    for column in columns:
        if column not in there:
            near = nearest(column, there, limit=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise bad_row(
                place,
                f"there is no column {column!r}",
                f"{hint}name the column in data.args; there are: {', '.join(map(repr, list(there)[:12])) or 'none'}",
            )


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"the number {value!r}" if isinstance(value, (int, float)) else "something else")
