"""Read the rows of csv, jsonl, json and parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError, list_first
from sempa_st.utils.files import UTF8, read_json

_PARQUET_ROWS = 8192
MAX_COLUMNS = 40
"""Number of a file's columns that a message lists."""
Tell = Callable[[], int]
"""Returns a position in a file."""


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of :func:`iter_rows` as a list."""
    return list(iter_rows(path))


def find_columns(
    rows: Sequence[dict[str, Any]],
    layouts: Sequence[tuple[str, ...]],
    source: str,
    advice: str = "Rename its columns.",
) -> tuple[str, ...]:
    """Return the first of several column layouts that the rows have; the first row decides.

    Args:
        rows: Rows of a file or a Hub data set.
        layouts: Column names of each accepted layout, the preferred one first.
        source: File or Hub id, for the error message.
        advice: What to do, for the error message.

    Raises:
        SempaError: If there are no rows, or they lack a column of every layout.
    """
    columns = list(rows[0]) if rows else []
    for layout in layouts:
        if set(layout) <= set(columns):
            return layout
    expected = " or ".join(f"({', '.join(layout)})" for layout in layouts)
    raise SempaError(
        f"{source} has the columns ({list_first(columns, MAX_COLUMNS) or 'none'}). Expected {expected}. {advice}"
    )


def iter_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield each row of a csv, jsonl, json or parquet file as a dict.

    A json file must hold a list of objects and is read at once; the other formats are streamed.

    Raises:
        SempaError: If the file is missing, has another extension, or cannot be parsed. Rows before the bad one are
            yielded first.
    """
    path = Path(path)
    if path.suffix.lower() not in ROW_SUFFIXES:
        raise SempaError(
            f"{path} has the unknown extension {path.suffix!r}. Expected one of {', '.join(ROW_SUFFIXES)}."
        )
    for row, _ in rows_from(path):
        yield row


def rows_from(path: Path, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[tuple[Any, Tell]]:
    """Yield the rows of a file from a position on, each with a function that returns the position behind it.

    Args:
        path: csv, jsonl, json or parquet file; or a txt file, whose lines are the column ``sentence``.
        start: Position of the first row: 0, or what such a function returned. It is only meaningful for the same file.
        columns: Columns to read of a parquet file; other files are read whole.

    Raises:
        SempaError: As :func:`iter_rows`.
    """
    suffix = path.suffix.lower()
    if not path.is_file():
        raise SempaError(f"The file {path} does not exist. Check the path.")
    try:
        for row, tell in _READERS[suffix](path, start, columns):
            if not isinstance(row, dict):
                raise SempaError(f"{path} does not hold a list of rows. Expected one JSON object per row.")
            yield row, tell
    except SempaError:
        raise
    except (OSError, ValueError, OverflowError, NotImplementedError, RecursionError, csv.Error) as error:
        kind = "UTF-8 text" if suffix == ".txt" else path.suffix[1:]
        raise SempaError(f"{path} cannot be read as {kind}: {error}") from error


# Lines come from readline(), since a file that is iterated over cannot tell its position. They are not splitlines():
# form feeds and Unicode separators inside a sentence do not end it.
def _iter_txt(path: Path, start: int, _columns: Any) -> Iterator[tuple[dict[str, Any], Tell]]:
    with path.open(encoding=UTF8) as handle:
        handle.seek(start)
        while line := handle.readline():
            yield {"sentence": line.removesuffix("\n")}, handle.tell


def _iter_csv(path: Path, start: int, _columns: Any) -> Iterator[tuple[dict[str, Any], Tell]]:
    with path.open(encoding=UTF8, newline="") as handle:
        reader = csv.DictReader(iter(handle.readline, ""), strict=True)
        if start and reader.fieldnames:  # the header has been read
            handle.seek(start)
        for number, row in enumerate(reader, 1):
            if None in row:
                raise ValueError(f"row {number} has more fields than the header; quote fields that hold a comma")
            yield row, handle.tell


def _iter_jsonl(path: Path, start: int, _columns: Any) -> Iterator[tuple[Any, Tell]]:
    with path.open(encoding=UTF8) as handle:
        handle.seek(start)
        for number, line in enumerate(iter(handle.readline, ""), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON ({error})") from error
            yield row, handle.tell


def _iter_json(path: Path, start: int, _columns: Any) -> Iterator[tuple[Any, Tell]]:
    rows = read_json(path)
    for index in range(start, len(rows)) if isinstance(rows, list) else [0]:
        yield rows[index] if isinstance(rows, list) else None, partial(int, index + 1)


def _iter_parquet(path: Path, start: int, columns: Sequence[str] | None) -> Iterator[tuple[dict[str, Any], Tell]]:
    index = start
    for batch in parquet_batches(path, start, columns):
        for row in batch.to_pylist():
            index += 1
            yield row, partial(int, index)


def parquet_batches(path: Path, start: int = 0, columns: Sequence[str] | None = None) -> Iterator[Any]:
    """Yield the rows of a parquet file from the row with the index ``start`` on, as Arrow record batches.

    Row groups before it are not read.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        group = 0
        while group < file.num_row_groups and start >= file.metadata.row_group(group).num_rows:
            start -= file.metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, file.num_row_groups))
        for batch in file.iter_batches(_PARQUET_ROWS, row_groups=groups, columns=columns):
            if start < len(batch):
                yield batch.slice(start)
            start = max(0, start - len(batch))


_READERS: dict[str, Callable[..., Iterator[tuple[Any, Tell]]]] = {
    ".csv": _iter_csv,
    ".jsonl": _iter_jsonl,
    ".json": _iter_json,
    ".parquet": _iter_parquet,
    ".txt": _iter_txt,
}
ROW_SUFFIXES = (".csv", ".jsonl", ".json", ".parquet")
