"""Sentence vectors on disk, read in blocks, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sempa_st.errors import SempaError

BLOCK = 2048
"""Rows that are in memory at once."""


class Vectors(Protocol):
    """Rows that can be sliced: a numpy array, a memory map, or vectors of a :class:`VectorStore`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, and their width."""

    def __getitem__(self, rows: slice, /) -> Any:
        """Return some of the rows as an array."""


class VectorStore:
    """A growing file of vectors, each filed under its sentence.

    Args:
        path: File to write; it is created.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index: dict[str, int] = {}
        self._width = 0
        path.write_bytes(b"")

    def missing(self, sentences: Sequence[str]) -> list[str]:
        """Return the distinct sentences that have no vector yet, in order."""
        return [sentence for sentence in dict.fromkeys(sentences) if sentence not in self._index]

    def add(self, sentences: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Append the vectors of new sentences, of shape (sentences, width).

        Raises:
            SempaError: If their width differs from that of the vectors before.
        """
        width = vectors.shape[1]
        if self._index and width != self._width:
            raise SempaError(f"A model gave vectors of width {self._width} and of width {width}. Expected one width.")
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(vectors, dtype=np.float32).tobytes())
        self._width = width
        self._index |= {sentence: row for row, sentence in enumerate(sentences, len(self._index))}

    def view(self, sentences: Sequence[str]) -> StoredVectors:
        """Return the vectors of sentences, which all must have been added."""
        rows = np.array([self._index[sentence] for sentence in sentences], dtype=np.int64)
        stored = np.memmap(self._path, dtype=np.float32, mode="r", shape=(len(self._index), self._width))
        return StoredVectors(stored, rows)


class StoredVectors:
    """Some rows of a file of vectors, in any order; a slice reads them."""

    def __init__(self, stored: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
        self._stored = stored
        self._rows = rows

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows, and their width."""
        return len(self._rows), self._stored.shape[1]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice, /) -> NDArray[np.float32]:
        chosen: NDArray[np.float32] = self._stored[self._rows[rows]]
        return chosen

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.asarray(self[:], dtype=dtype)


def check_vectors(vectors: Vectors | Sequence[Any], *, at_least: int = 1) -> Vectors:
    """Return vectors, after a check of their number and width.

    Args:
        vectors: Rows of one width: an array, or a sequence of vectors.
        at_least: Least number of rows.

    Raises:
        SempaError: If the widths differ, or there are too few rows.
    """
    if not hasattr(vectors, "shape"):
        widths = {np.shape(row) for row in vectors}
        if len(widths) > 1:
            raise SempaError(f"The vectors have different shapes: {sorted(widths)}. Expected vectors of one width.")
        vectors = np.asarray(vectors)
    if len(vectors.shape) != 2 or vectors.shape[0] < at_least or vectors.shape[1] < 1:
        raise SempaError(
            f"The vectors have the shape {tuple(vectors.shape)}. Expected at least {at_least} row(s) of one width."
        )
    return vectors


def unit_block(vectors: Vectors, start: int, block: int = BLOCK) -> NDArray[np.float32]:
    """Return at most ``block`` rows from the row ``start`` on, each divided by its norm.

    Raises:
        SempaError: If a row is not finite, or is zero and has no direction; the message names its index.
    """
    rows = np.asarray(vectors[start : start + block], dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1)
    for fault, found in (("an infinite or NaN value", ~np.isfinite(norms)), ("nothing but zeros", norms == 0)):
        if found.any():
            raise SempaError(f"Vector {start + found.argmax()} holds {fault}. Expected vectors with a direction.")
    unit: NDArray[np.float32] = (rows / norms[:, None]).astype(np.float32)
    return unit


def unit_blocks(vectors: Vectors, block: int = BLOCK) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the index of the first row and the rows of each :func:`unit_block`."""
    for start in range(0, vectors.shape[0], block):
        yield start, unit_block(vectors, start, block)
