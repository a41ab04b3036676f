"""Read the rows of csv, jsonl, json and parquet files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.utils.files import UTF8, read_json

_PARQUET_ROWS = 8192


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
        f"{source} has the columns ({', '.join(map(str, columns)) or 'none'}). Expected {expected}. {advice}"
    )


def iter_rows(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield each row of a csv, jsonl, json or parquet file as a dict.

    A json file must hold a list of objects and is read at once; the other formats are streamed.

    Raises:
        SempaError: If the file is missing, has another extension, or cannot be parsed. Rows before the bad one are
            yielded first.
    """
    path = Path(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise SempaError(
            f"{path} has the unknown extension {path.suffix!r}. Expected one of {', '.join(ROW_SUFFIXES)}."
        )
    if not path.is_file():
        raise SempaError(f"The file {path} does not exist. Check the path.")
    try:
        for row in reader(path):
            if not isinstance(row, dict):
                raise SempaError(f"{path} does not hold a list of rows. Expected one JSON object per row.")
            yield row
    except SempaError:
        raise
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise SempaError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error


def _iter_csv(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding=UTF8, newline="") as handle:
        for number, row in enumerate(csv.DictReader(handle, strict=True), 1):
            if None in row:
                raise ValueError(f"row {number} has more fields than the header; quote fields that hold a comma")
            yield row


def _iter_jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding=UTF8) as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number} is not JSON ({error})") from error


def _iter_json(path: Path) -> Iterator[Any]:
    rows = read_json(path)
    yield from rows if isinstance(rows, list) else [None]


def _iter_parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
            yield from batch.to_pylist()


_READERS = {".csv": _iter_csv, ".jsonl": _iter_jsonl, ".json": _iter_json, ".parquet": _iter_parquet}
ROW_SUFFIXES = tuple(_READERS)
