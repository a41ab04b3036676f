"""Shards as Arrow tables, with all columns of the input or some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from sempa_st.data.rows import parquet_batches, rows_from
from sempa_st.encoding.sentences import SENTENCE, SHARD_ROWS, Sentences, Shard, check_unchanged, read_shard
from sempa_st.errors import SempaError
from sempa_st.utils.files import is_text


def text_schema(column: str | None) -> Any:
    """Return the Arrow schema of the column with the sentences alone."""
    import pyarrow as pa

    return pa.schema([(column or SENTENCE, pa.string())])


def shard_tables(shard: Shard, column: str | None, schema: Any, size: int) -> Iterator[tuple[list[int], Any]]:
    """Yield the rows that hold sentences: their numbers, and an Arrow table of ``size`` rows (the last may have fewer).

    Args:
        shard: The shard.
        column: Column with the sentences.
        schema: Schema of the columns to read: of all, see :func:`input_schema`, or of some.
        size: Rows of a table.

    Raises:
        SempaError: If the file has changed since it was divided into shards.
    """
    import pyarrow as pa

    if shard.path.suffix.lower() != ".parquet":
        rows = read_shard(shard, column)
        while window := list(islice(rows, size)):
            with _one_type(shard.path):
                arrays = [pa.array([row.get(field.name) for *_, row in window], field.type) for field in schema]
            yield [number for number, *_ in window], pa.table(arrays, schema=schema)
        return
    # Rows of parquet are never Python objects, so that their types stay as they are.
    batches, left = [], shard.rows
    for batch in parquet_batches(shard.path, shard.start, schema.names):
        batches.append(batch.slice(0, left))
        left -= len(batches[-1])
        if not left:
            break
    table = pa.Table.from_batches(batches)
    kept = [index for index, text in enumerate(table[column].to_pylist()) if is_text(text)]
    check_unchanged(shard, len(kept))
    for start in range(0, len(kept), size):
        window_rows = kept[start : start + size]
        yield [shard.first_row + index for index in window_rows], table.take(window_rows)


def input_schema(sentences: Sentences) -> Any:
    """Return the Arrow schema of all columns of the input.

    Raises:
        SempaError: If a column has values of several types, or files have different columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sentences.files
    suffix = files[0].suffix.lower()
    schemas: Iterator[Any]
    if suffix == ".txt":
        return text_schema(None)
    if suffix == ".parquet":
        schemas = (pq.read_schema(file).remove_metadata() for file in files)
    elif suffix == ".csv":
        names = (next(rows_from(file))[0] for file in files)
        schemas = (pa.schema([(name, pa.string()) for name in row]) for row in names)
    else:
        schemas = (_inferred(rows) for rows in _windows_of_rows(sentences))
    with _one_type(sentences.path):
        schema = next(schemas)
        for other in schemas:
            if suffix in (".csv", ".parquet") and not other.equals(schema):
                raise SempaError(
                    f"The files in {sentences.path} have different columns: ({', '.join(schema.names)}) and "
                    f"({', '.join(other.names)}), or other types in them. Expected the same in all."
                )
            schema = pa.unify_schemas([schema, other], promote_options="permissive")
        pq.ParquetWriter(pa.BufferOutputStream(), schema).close()  # Arrow has types that parquet has not
    return schema


@contextmanager
def _one_type(path: Path) -> Iterator[None]:
    """Turn the errors of values that no column of a parquet file can hold into one that names their file."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        raise SempaError(
            f"A column of {path} holds values of several types, or such as no parquet file can hold: {error!s:.200}. "
            "Give it one type, or choose an npy file as output."
        ) from error


def _windows_of_rows(sentences: Sentences) -> Iterator[list[dict[str, Any]]]:
    for shard in sentences.shards:
        rows = read_shard(shard, sentences.column)
        while window := [row for *_, row in islice(rows, SHARD_ROWS)]:
            yield window


def _inferred(rows: Sequence[dict[str, Any]]) -> Any:
    import pyarrow as pa

    names = dict.fromkeys(str(name) for row in rows for name in row)
    return pa.schema([(name, pa.array([row.get(name) for row in rows]).type) for name in names])
