"""The sentences of a file or of a folder of files, in shards that are read, embedded and written one by one."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from sempa_st.data.rows import MAX_COLUMNS, ROW_SUFFIXES, rows_from
from sempa_st.errors import SempaError, list_first
from sempa_st.utils.files import file_sha256, is_text

INPUT_SUFFIXES = (".txt", *ROW_SUFFIXES)
SHARD_ROWS = 4096
"""Rows of a shard, unless asked otherwise: two minutes of a 270M model on a CPU, and ten megabytes of its vectors."""
SENTENCE = "sentence"
"""Column of the lines of a txt file."""


@dataclass(frozen=True)
class Shard:
    """Some consecutive rows of a file.

    Args:
        number: Index of the shard, from 0.
        path: The file.
        start: Position in the file; see :func:`sempa_st.data.rows.rows_from`.
        first_row: Number of its first row, from 1, counted over all files.
        rows: Number of rows, bad ones included.
        count: Number of sentences.
    """

    number: int
    path: Path
    start: int
    first_row: int
    rows: int
    count: int


@dataclass(frozen=True)
class Sentences:
    """The sentences of one or more files, which are read again on each iteration.

    Args:
        path: The file, or the folder of files.
        column: Column with the sentences; None for plain text.
        shards: Shards with at least one sentence, in order.
        shard_size: Rows of a shard, bad ones included; the last one of a file may have fewer.
        skipped: Number of rows left out: empty, null or with a lone surrogate.
    """

    path: Path
    column: str | None
    shards: Sequence[Shard]
    shard_size: int
    skipped: int = 0

    @cached_property
    def count(self) -> int:
        """Number of sentences."""
        return sum(shard.count for shard in self.shards)

    @property
    def files(self) -> list[Path]:
        """The files, in order."""
        return list(dict.fromkeys(shard.path for shard in self.shards))

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the content of all files."""
        return hashlib.sha256("".join(map(file_sha256, self.files)).encode()).hexdigest()

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield the number of the row, from 1, and the sentence."""
        for shard in self.shards:
            for row, text, _ in read_shard(shard, self.column):
                yield row, text


def read_sentences(
    path: str | Path, *, column: str | None = None, skip_bad_rows: bool = False, shard_size: int = SHARD_ROWS
) -> Sentences:
    """Check and count the sentences of a file or folder, and divide them into shards.

    Args:
        path: A txt file with one sentence per line, or a csv, jsonl, json or parquet file; or a folder of files of one
            of these kinds, which are read in the order of their names.
        column: Column with the sentences; may be left out if there is only one.
        skip_bad_rows: Leave out bad rows: sentences that are empty, null or hold a lone surrogate.
        shard_size: Rows of a shard.

    Raises:
        SempaError: On an unknown kind of file or column, on a bad row (unless skipped), or if no sentence is left.
    """
    path = Path(path)
    shards: list[Shard] = []
    total, skipped = 0, 0
    for file in _files_in(path):
        column = _column_of(file, column)
        rows, bad = _add_shards(shards, file, column, total, shard_size)
        if bad and not skip_bad_rows:
            raise SempaError(
                f"{file} has {len(bad)} empty or null sentence(s), or ones with a lone surrogate, in "
                f"row(s) {list_first(bad)}. Mend them, or pass --skip-bad-rows."
            )
        total, skipped = total + rows, skipped + len(bad)
    if not shards:
        raise SempaError(f"{path} holds no sentence.")
    return Sentences(path, column, tuple(shards), shard_size, skipped)


def _files_in(path: Path) -> list[Path]:
    files = [path]
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.suffix.lower() in INPUT_SUFFIXES and item.is_file())
    kinds = sorted({file.suffix.lower() for file in files})
    if len(kinds) != 1:
        raise SempaError(
            f"The folder {path} holds files of {len(kinds)} kinds ({', '.join(kinds) or 'none'}). Expected files of "
            f"one of: {', '.join(INPUT_SUFFIXES)}."
        )
    if kinds[0] not in INPUT_SUFFIXES:
        raise SempaError(f"{path} has an unknown ending. Expected one of: {', '.join(INPUT_SUFFIXES)}; or a folder.")
    return files


def _column_of(path: Path, column: str | None) -> str | None:
    if path.suffix.lower() == ".txt":
        if column:
            raise SempaError(f"{path} is plain text and has no columns. Leave out --column {column}.")
        return None
    columns = list(next(rows_from(path), ({}, None))[0])
    if column is None and len(columns) == 1:
        return str(columns[0])
    if column is None or column not in columns:
        asked = "No --column was given" if column is None else f"There is no column {column!r}"
        raise SempaError(f"{asked} for {path}. Its columns: {list_first(columns, MAX_COLUMNS) or 'none'}.")
    return column


def _add_shards(
    shards: list[Shard], path: Path, column: str | None, before: int, shard_size: int
) -> tuple[int, list[int]]:
    """Append the shards of a file; return its number of rows and the numbers of its bad rows.

    Args:
        shards: Shards of the files before.
        path: The file.
        column: Column with the sentences.
        before: Number of rows of the files before.
        shard_size: Rows of a shard.
    """
    start, rows, count = 0, 0, 0
    bad: list[int] = []

    def close(position: int) -> None:
        nonlocal start, count
        first = rows - (rows - 1) % shard_size  # of the shard that ends with this row
        if count:
            shards.append(Shard(len(shards), path, start, before + first, rows - first + 1, count))
        start, count = position, 0

    name = column or SENTENCE
    for rows, (row, tell) in enumerate(rows_from(path, columns=[name]), 1):
        if is_text(row.get(name)):
            count += 1
        else:
            bad.append(rows)
        if rows % shard_size == 0:
            close(tell())
    if rows % shard_size:
        close(0)
    return rows, bad


def read_shard(shard: Shard, column: str | None) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield the number of each row that holds a sentence, the sentence and the whole row.

    Raises:
        SempaError: If the file has changed since it was divided into shards.
    """
    name, found = column or SENTENCE, 0
    for number, (row, _) in enumerate(islice(rows_from(shard.path, shard.start), shard.rows), shard.first_row):
        if is_text(text := row.get(name)):
            found += 1
            yield number, text, row
    check_unchanged(shard, found)


def check_unchanged(shard: Shard, found: int) -> None:
    """Raise :class:`SempaError` unless ``found`` sentences are those of the shard."""
    if found != shard.count:
        raise SempaError(
            f"{shard.path} changed while it was read: {found} sentences instead of {shard.count} from row "
            f"{shard.first_row} on. Run the command again."
        )


@contextmanager
def standard_input(kind: str) -> Iterator[Path]:
    """Copy standard input into a temporary file, and yield its path: the input is read more than once.

    Args:
        kind: Ending of the file, such as ``txt``, which says how it is read.
    """
    with tempfile.TemporaryDirectory(prefix="sempa-") as folder:
        path = Path(folder) / f"standard-input.{kind}"
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        yield path
