"""Embed one shard into one file: what every worker does, in this process or elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.encoding.sentences import SENTENCE, Shard
from sempa_st.encoding.shard_folder import EMBEDDING, ShardFolder, write_npy_header
from sempa_st.encoding.tables import shard_tables
from sempa_st.encoding.vectors import WINDOW, VectorSettings, encode_window

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_Write = Callable[[dict[str, Any], Any], None]
_ROW = "row"


@dataclass(frozen=True)
class ShardWriter:
    """Write the vectors of shards into the folder of a run.

    Args:
        output: The output of the run.
        column: Column with the sentences; None for plain text.
        schema: Arrow schema of the input's columns that are read.
        settings: What decides the vectors, besides the model.
        batch_size: Sentences per batch.
    """

    output: Path
    column: str | None
    schema: Any
    settings: VectorSettings
    batch_size: int

    def __call__(
        self, model: SentenceTransformer, shard: Shard, advance: Callable[[int], object] = lambda _: None
    ) -> None:
        """Embed a shard with a model, unless its file is there.

        Args:
            model: The model.
            shard: The shard.
            advance: Called with the number of sentences encoded since its last call.

        Raises:
            SempaError: If the shard cannot be read, embedded or written.
        """
        folder = ShardFolder(self.output)
        if folder.shard(shard.number).exists():
            return
        write_to = _npy_writer if folder.suffix == ".npy" else _parquet_writer
        with folder.writing(shard.number) as partial, write_to(partial, shard.count) as write:
            for rows, table in shard_tables(shard, self.column, self.schema, WINDOW):
                texts = table[self.column or SENTENCE]
                vectors = encode_window(
                    model,
                    rows,
                    texts.to_pylist(),
                    self.settings,
                    self._ranges,
                    batch_size=self.batch_size,
                    advance=advance,
                )
                write(
                    {_ROW: rows, SENTENCE: texts, **dict(zip(table.column_names, table.columns, strict=True))}, vectors
                )

    @cached_property
    def _ranges(self) -> Any:
        import numpy as np

        path = ShardFolder(self.output).ranges
        return np.load(path) if path.exists() else None


@contextmanager
def _npy_writer(path: Path, count: int) -> Iterator[_Write]:
    import numpy as np

    with path.open("wb") as handle:

        def write(_columns: dict[str, Any], vectors: Any) -> None:
            if not handle.tell():
                write_npy_header(handle, (count, vectors.shape[1]), vectors.dtype)
            handle.write(np.ascontiguousarray(vectors).tobytes())

        yield write


@contextmanager
def _parquet_writer(path: Path, count: int) -> Iterator[_Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None

    def write(columns: dict[str, Any], vectors: Any) -> None:
        nonlocal writer
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        table = pa.table({**columns, EMBEDDING: embedding})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer:
            writer.close()
