"""Embed the sentences of a file into a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError
from sempa_st.files import ROW_SUFFIXES, atomic_file, check_output_file, list_rows, read_rows

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

OUTPUT_SUFFIXES = (".npy", ".parquet")


@dataclass(frozen=True)
class Sentences:
    """Sentences read from a file.

    Args:
        rows: Row number of each sentence in the file, from 1.
        texts: The sentences.
        skipped: Number of empty or null ones left out.
    """

    rows: list[int]
    texts: list[str]
    skipped: int = 0


def read_sentences(path: str | Path, *, column: str | None = None, skip_bad_rows: bool = False) -> Sentences:
    """Read sentences: each line of a txt file, or one column of a csv, jsonl, json or parquet file.

    Raises:
        SempaError: On an unknown kind of file or column, or an empty or null sentence.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        if column:
            raise SempaError(f"{path} is plain text and has no columns. Leave out --column {column}.")
        values: list[Any] = _read_lines(path)
    elif path.suffix.lower() in ROW_SUFFIXES:
        values = _read_column(path, column)
    else:
        raise SempaError(f"{path} has an unknown ending. Expected one of: .txt, {', '.join(ROW_SUFFIXES)}.")
    good = [(number, value) for number, value in enumerate(values, 1) if isinstance(value, str) and value.strip()]
    skipped = len(values) - len(good)
    if skipped and not skip_bad_rows:
        present = {number for number, _ in good}
        bad = [number for number in range(1, len(values) + 1) if number not in present]
        raise SempaError(
            f"{path} has {skipped} empty or null sentence(s), in row(s) {list_rows(bad)}. Mend them, or pass "
            "--skip-bad-rows."
        )
    if not good:
        raise SempaError(f"{path} holds no sentence.")
    return Sentences([number for number, _ in good], [text for _, text in good], skipped)


def _read_lines(path: Path) -> list[str]:
    try:
        # Not splitlines(): form feeds and Unicode separators inside a sentence do not end it.
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SempaError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _read_column(path: Path, column: str | None) -> list[Any]:
    rows = read_rows(path)
    columns = list(rows[0]) if rows else []
    if column is None and len(columns) == 1:
        column = columns[0]
    if column is None or column not in columns:
        asked = "No --column was given" if column is None else f"There is no column {column!r}"
        raise SempaError(f"{asked} for {path}. Its columns: {', '.join(map(str, columns)) or 'none'}.")
    return [row.get(column) for row in rows]


def encode_to_file(
    model: SentenceTransformer, sentences: Sentences, output: str | Path, *, batch_size: int = 32
) -> tuple[int, int]:
    """Embed sentences and write the vectors, whole or not at all.

    ``.npy`` gets a float32 array of shape (sentences, width); ``.parquet`` the columns row, sentence and embedding.

    Returns:
        The shape of the array of vectors.
    """
    check_output_file(output, OUTPUT_SUFFIXES)
    vectors = model.encode(sentences.texts, batch_size=batch_size, show_progress_bar=True, convert_to_numpy=True)
    vectors = vectors.astype("float32", copy=False)
    with atomic_file(output) as partial:
        if partial.suffix.lower() == ".npy":
            import numpy as np

            with partial.open("wb") as handle:  # given a name, numpy may append to it
                np.save(handle, vectors, allow_pickle=False)
        else:
            _write_parquet(partial, sentences, vectors)
    return int(vectors.shape[0]), int(vectors.shape[1])


def _write_parquet(path: Path, sentences: Sentences, vectors: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    table = pa.table({"row": sentences.rows, "sentence": sentences.texts, "embedding": embedding})
    pq.write_table(table, path)
