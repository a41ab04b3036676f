"""How embeddings are spread out: uniformity, alignment, isotropy, effective rank and mean cosine.

Vectors are divided by their norms and read in blocks: memory holds a few blocks, and two matrices of shape (hidden,
hidden), whatever the number of vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sempa_st.analysis.vectors import BLOCK, Vectors, check_vectors, unit_block, unit_blocks
from sempa_st.errors import SempaError

_SHARPNESS = 2
"""The t of the uniformity: log E exp(-t |x - y|^2)."""


def uniformity(
    vectors: Vectors | Sequence[Any], *, block: int = BLOCK, advance: Callable[[int], object] | None = None
) -> float:
    """Return log E exp(-2 |x - y|^2) of unit vectors (arXiv 2005.10242); lower is more uniform.

    The mean is over all unordered pairs of two different rows, (i, j) with i < j. It is exact, not a sample, and takes
    time quadratic in the number of rows.

    Args:
        vectors: Array of shape (sentences, hidden).
        block: Rows of each side that are in memory at once.
        advance: Called with the number of rows that are done.

    Returns:
        A number between -8 (each pair opposite) and 0 (all vectors equal).

    Raises:
        SempaError: If there are fewer than two rows, or one is zero or not finite.
    """
    checked = check_vectors(vectors, at_least=2)
    count = checked.shape[0]
    total = 0.0
    for start, rows in unit_blocks(checked, block):
        for other in range(0, start + 1, block):
            columns = rows if other == start else unit_block(checked, other, block)
            # |x - y|^2 = 2 - 2 cos. The exponents lie between -8 and 0, where a sum of exponentials is safe as it is.
            kernel = np.exp(2 * _SHARPNESS * (rows @ columns.T - 1))
            pairs = float(kernel.sum(dtype=np.float64))
            total += (pairs - float(kernel.trace(dtype=np.float64))) / 2 if other == start else pairs
        if advance:
            advance(len(rows))
    return float(np.log(total / (count * (count - 1) / 2)))


def alignment(first: Vectors | Sequence[Any], second: Vectors | Sequence[Any], *, block: int = BLOCK) -> float:
    """Return E |x - y|^2 of unit vectors over positive pairs (arXiv 2005.10242); lower is better.

    Args:
        first: One side of each pair, of shape (pairs, hidden).
        second: The other side, of the same shape.
        block: Rows of each side that are in memory at once.

    Returns:
        A number between 0 and 4.

    Raises:
        SempaError: If the shapes differ, there is no pair, or a vector is zero or not finite.
    """
    first, second = check_vectors(first), check_vectors(second)
    if tuple(first.shape) != tuple(second.shape):
        raise SempaError(
            f"The two sides have the shapes {tuple(first.shape)} and {tuple(second.shape)}. Expected equal ones."
        )
    blocks = zip(unit_blocks(first, block), unit_blocks(second, block), strict=True)
    total = sum(float(np.square(left - right, dtype=np.float64).sum()) for (_, left), (_, right) in blocks)
    return total / first.shape[0]


def mean_cosine(vectors: Vectors | Sequence[Any], *, block: int = BLOCK) -> float:
    """Return the mean cosine of all unordered pairs of two different rows, from the sum of the unit vectors.

    Args:
        vectors: Array of shape (sentences, hidden).
        block: Rows in memory at once.

    Raises:
        SempaError: If there are fewer than two rows, or one is zero or not finite.
    """
    checked = check_vectors(vectors, at_least=2)
    count = checked.shape[0]
    total, squares = np.zeros(checked.shape[1]), 0.0
    for _, rows in unit_blocks(checked, block):
        total += rows.sum(axis=0, dtype=np.float64)
        squares += float(np.square(rows, dtype=np.float64).sum())
    return float((total @ total - squares) / (count * (count - 1)))


def spectrum(
    vectors: Vectors | Sequence[Any], *, block: int = BLOCK
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return eigenvalues and eigenvectors of V^T V, where the rows of V are the unit vectors, not centred.

    Args:
        vectors: Array of shape (sentences, hidden).
        block: Rows in memory at once.

    Returns:
        Eigenvalues of shape (hidden,), ascending and not negative; eigenvectors of shape (hidden, hidden), in columns.

    Raises:
        SempaError: If there are fewer than two rows, or one is zero or not finite.
    """
    checked = check_vectors(vectors, at_least=2)
    width = checked.shape[1]
    gram = np.zeros((width, width))
    for _, rows in unit_blocks(checked, block):
        wide = rows.astype(np.float64)
        gram += wide.T @ wide
    values, directions = np.linalg.eigh(gram)
    values[values < values[-1] * width * np.finfo(np.float64).eps] = 0  # rounding, some of it below zero
    return values, directions


def effective_rank(eigenvalues: NDArray[np.float64]) -> float:
    """Return the exponential of the entropy of the singular values, divided by their sum (Roy and Vetterli 2007).

    Args:
        eigenvalues: Of V^T V, from :func:`spectrum`; the singular values of V are their square roots.

    Returns:
        A number between 1 (all vectors on one line) and the width (all directions alike).
    """
    singular = np.sqrt(eigenvalues)
    shares = singular[singular > 0] / singular.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def isotropy(vectors: Vectors | Sequence[Any], directions: NDArray[np.float64], *, block: int = BLOCK) -> float:
    """Return min Z(u) / max Z(u), where Z(u) = sum over rows v of exp(u . v); higher is more isotropic.

    This is the measure of Mu and Viswanath (arXiv 1702.01417) on unit vectors v. They define it over all unit vectors u
    and compute it over the eigenvectors of V^T V. The sign of an eigenvector is arbitrary, so both u and -u are taken:
    the result does not depend on the solver. Taking one sign only gives a number that is higher.

    Args:
        vectors: Array of shape (sentences, hidden).
        directions: The eigenvectors u, of shape (hidden, directions), from :func:`spectrum`.
        block: Rows in memory at once.

    Returns:
        A number above 0 and at most 1.

    Raises:
        SempaError: If there are fewer than two rows, or one is zero or not finite.
    """
    sums = np.zeros((2, directions.shape[1]))
    narrow = directions.astype(np.float32)
    for _, rows in unit_blocks(check_vectors(vectors, at_least=2), block):
        projected = rows @ narrow
        for sign, row in ((1, 0), (-1, 1)):
            sums[row] += np.exp(sign * projected).sum(axis=0, dtype=np.float64)  # exponents lie between -1 and 1
    return float(sums.min() / sums.max())
