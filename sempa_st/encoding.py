"""Embed the sentences of a file into a file, one window at a time, so that memory does not grow with their number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.data.rows import ROW_SUFFIXES, iter_rows
from sempa_st.errors import SempaError, list_first
from sempa_st.utils.files import UTF8, atomic_file, check_output_file, is_text
from sempa_st.utils.finite import NotFiniteError, check_finite

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

OUTPUT_SUFFIXES = (".npy", ".parquet")
_WINDOW = 2048
"""Sentences that are sorted by length, encoded and written together."""
_BATCHES = 2
"""Batches per step of the progress bar."""


@dataclass(frozen=True)
class Sentences:
    """The sentences of a file, which is read again on each iteration.

    Args:
        path: The file.
        column: Column with the sentences; None for plain text.
        count: Number of sentences.
        skipped: Number of rows left out: empty, null or with a lone surrogate.
    """

    path: Path
    column: str | None
    count: int
    skipped: int = 0

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Yield the row number in the file, from 1, and the sentence."""
        for number, value in enumerate(_values(self.path, self.column), 1):
            if is_text(value):
                yield number, value


def read_sentences(path: str | Path, *, column: str | None = None, skip_bad_rows: bool = False) -> Sentences:
    """Check and count the sentences of a file.

    Args:
        path: A txt file with one sentence per line, or a csv, jsonl, json or parquet file.
        column: Column with the sentences; may be left out if there is only one.
        skip_bad_rows: Leave out bad rows: sentences that are empty, null or hold a lone surrogate.

    Raises:
        SempaError: On an unknown kind of file or column, on a bad row (unless skipped), or if no sentence is left.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        if column:
            raise SempaError(f"{path} is plain text and has no columns. Leave out --column {column}.")
    elif path.suffix.lower() in ROW_SUFFIXES:
        column = _find_column(path, column)
    else:
        raise SempaError(f"{path} has an unknown ending. Expected one of: .txt, {', '.join(ROW_SUFFIXES)}.")
    count, bad = 0, []
    for count, value in enumerate(_values(path, column), 1):
        if not is_text(value):
            bad.append(count)
    if bad and not skip_bad_rows:
        raise SempaError(
            f"{path} has {len(bad)} empty or null sentence(s), or ones with a lone surrogate, in "
            f"row(s) {list_first(bad)}. Mend them, or pass --skip-bad-rows."
        )
    if count == len(bad):
        raise SempaError(f"{path} holds no sentence.")
    return Sentences(path, column, count - len(bad), len(bad))


def _values(path: Path, column: str | None) -> Iterator[Any]:
    if column is not None:
        yield from (row.get(column) for row in iter_rows(path))
        return
    try:
        # Not splitlines(): form feeds and Unicode separators inside a sentence do not end it.
        with path.open(encoding=UTF8) as handle:
            yield from (line.removesuffix("\n") for line in handle)
    except (OSError, UnicodeDecodeError) as error:
        raise SempaError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _find_column(path: Path, column: str | None) -> str:
    columns = list(next(iter_rows(path), {}))
    if column is None and len(columns) == 1:
        return columns[0]
    if column is None or column not in columns:
        asked = "No --column was given" if column is None else f"There is no column {column!r}"
        raise SempaError(f"{asked} for {path}. Its columns: {', '.join(map(str, columns)) or 'none'}.")
    return column


def encode_file(
    model: str | SentenceTransformer,
    input: str | Path | Sentences,
    output: str | Path,
    *,
    column: str | None = None,
    batch_size: int = 32,
    skip_bad_rows: bool = False,
    **options: Any,
) -> tuple[int, int]:
    """Embed the sentences of a file and write all vectors, or no file at all: ``sempa encode`` from Python.

    ``.npy`` gets a float32 array of shape (sentences, width); ``.parquet`` the columns row, sentence and embedding.
    Equal sentences of a window are encoded once.

    Args:
        model: What :func:`sempa_st.load` takes, or a model that it returned.
        input: File with sentences, or what :func:`read_sentences` returned for it.
        output: ``.npy`` or ``.parquet`` file to write.
        column: Column with the sentences; may be left out if there is only one.
        batch_size: Sentences per batch.
        skip_bad_rows: Leave out empty sentences.
        **options: Arguments of :func:`sempa_st.load`, for a model that is to be loaded.

    Returns:
        Number of vectors, and their width.

    Raises:
        SempaError: If the model, the input or the output cannot be used, a vector is not finite, or the number of
            sentences has changed.
    """
    from tqdm.auto import tqdm

    check_output_file(output, OUTPUT_SUFFIXES)
    if isinstance(input, Sentences):
        sentences = input
    else:
        sentences = read_sentences(input, column=column, skip_bad_rows=skip_bad_rows)
    if isinstance(model, str):
        from sempa_st.loading import load

        model = load(model, **options)
    written, width, remaining = 0, 0, iter(sentences)
    writer = _npy_writer if Path(output).suffix.lower() == ".npy" else _parquet_writer
    with (
        atomic_file(output) as partial,
        writer(partial, sentences.count) as write,
        tqdm(total=sentences.count, desc="encode", unit="sentence", dynamic_ncols=True) as bar,
    ):
        while window := list(islice(remaining, _WINDOW)):
            vectors = _finite_vectors(model, window, batch_size, bar.update)
            write(window, vectors)
            written, width = written + len(window), vectors.shape[1]
        if written != sentences.count:
            raise SempaError(
                f"{sentences.path} changed while it was read: {written} sentences instead of {sentences.count}. Run "
                "the command again."
            )
    return written, width


def _finite_vectors(
    model: SentenceTransformer, window: list[tuple[int, str]], batch_size: int, advance: Callable[[int], object]
) -> Any:
    texts = [text for _, text in window]
    try:
        vectors = _encode_once(model, texts, batch_size, advance)
        check_finite(vectors, texts)
    except NotFiniteError as error:  # name rows of the file, not positions in a batch
        bad = set(error.texts)
        raise NotFiniteError([(row, text) for row, text in window if text in bad], error.total, "row") from error
    return vectors


def _encode_once(
    model: SentenceTransformer, texts: list[str], batch_size: int, advance: Callable[[int], object]
) -> Any:
    """Encode each distinct sentence of a window once, in a few batches of similar length at a time."""
    import numpy as np

    from sempa_st.forward.batching import batches_by_length, min_batch_characters

    counts = Counter(texts)
    distinct = list(counts)
    vectors: list[Any] = []
    vector_index: dict[str, int] = {}
    size = _BATCHES * batch_size
    for indices in batches_by_length(distinct, size, min_batch_characters(model, size)):
        batch = [distinct[index] for index in indices]
        vectors.append(model.encode(batch, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True))
        vector_index |= {text: len(vector_index) + index for index, text in enumerate(batch)}
        advance(sum(counts[text] for text in batch))
    return np.concatenate(vectors).astype("float32", copy=False)[[vector_index[text] for text in texts]]


_Write = Callable[[list[tuple[int, str]], Any], None]


@contextmanager
def _npy_writer(path: Path, count: int) -> Iterator[_Write]:
    import numpy as np

    with path.open("wb") as handle:

        def write(window: list[tuple[int, str]], vectors: Any) -> None:
            if not handle.tell():
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, vectors.shape[1])}
                np.lib.format.write_array_header_1_0(handle, header)
            handle.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())

        yield write


@contextmanager
def _parquet_writer(path: Path, count: int) -> Iterator[_Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer: pq.ParquetWriter | None = None

    def write(window: list[tuple[int, str]], vectors: Any) -> None:
        nonlocal writer
        rows, texts = zip(*window, strict=True)
        embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        table = pa.table({"row": rows, "sentence": texts, "embedding": embedding})
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer:
            writer.close()
