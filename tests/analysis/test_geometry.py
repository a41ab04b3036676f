from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sempa_st.analysis.geometry import alignment, effective_rank, isotropy, mean_cosine, spectrum, uniformity
from sempa_st.errors import SempaError

pytestmark = pytest.mark.names_dtype

RANDOM = np.random.default_rng(0).normal(size=(37, 11)).astype(np.float32) * 40 + 20
MEASURES: list[Callable[[Any], Any]] = [uniformity, mean_cosine, spectrum, lambda rows: isotropy(rows, np.eye(3))]


def isotropy_of(vectors: Any, **kwargs: Any) -> float:
    return isotropy(vectors, spectrum(vectors)[1], **kwargs)


def rank_of(vectors: Any) -> float:
    return effective_rank(spectrum(vectors)[0])


def brute_force(vectors: np.ndarray) -> dict[str, float]:
    """The four measures by their definitions, in loops and with numpy's singular values."""
    unit = [row / np.sqrt((row.astype(np.float64) ** 2).sum()) for row in vectors]
    pairs = [(x, y) for i, x in enumerate(unit) for y in unit[:i]]
    _, singular, directions = np.linalg.svd(np.array(unit), full_matrices=True)
    z = [sum(math.exp(sign * u @ v) for v in unit) for u in directions for sign in (1, -1)]
    shares = singular / singular.sum()
    return {
        "uniformity": math.log(sum(math.exp(-2 * ((x - y) ** 2).sum()) for x, y in pairs) / len(pairs)),
        "mean cosine": sum(x @ y for x, y in pairs) / len(pairs),
        "isotropy": min(z) / max(z),
        "effective rank": math.exp(-sum(share * math.log(share) for share in shares)),
    }


@pytest.mark.parametrize("block", [1, 5, 37, 1000])
def test_random_vectors_against_the_definitions(block: int) -> None:
    expected = brute_force(RANDOM)
    values, directions = spectrum(RANDOM, block=block)
    assert uniformity(RANDOM, block=block) == pytest.approx(expected["uniformity"], abs=1e-5)
    assert mean_cosine(RANDOM, block=block) == pytest.approx(expected["mean cosine"], abs=1e-5)
    assert isotropy(RANDOM, directions, block=block) == pytest.approx(expected["isotropy"], rel=1e-5)
    assert effective_rank(values) == pytest.approx(expected["effective rank"], rel=1e-5)


def test_the_corners_of_a_simplex() -> None:
    """Of n unit vectors with cosine -1/(n-1): |x-y|^2 = 2n/(n-1), they span n-1 directions alike."""
    count = 6
    corners = np.eye(count) - 1 / count
    assert uniformity(corners) == pytest.approx(-4 * count / (count - 1), abs=1e-5)
    assert mean_cosine(corners) == pytest.approx(-1 / (count - 1), abs=1e-6)
    assert rank_of(corners) == pytest.approx(count - 1, rel=1e-5)


def test_orthogonal_vectors() -> None:
    count = 5
    axes = 3.0 * np.eye(count)
    assert uniformity(axes) == pytest.approx(-4, abs=1e-6)
    assert mean_cosine(axes) == pytest.approx(0, abs=1e-7)
    assert rank_of(axes) == pytest.approx(count, rel=1e-6)
    assert isotropy_of(axes) == pytest.approx((math.exp(-1) + count - 1) / (math.e + count - 1), rel=1e-6)


def test_one_vector_again_and_again() -> None:
    same = np.tile(np.float32([0.3, -1.7, 2.2, 0.1]), (50, 1))
    assert uniformity(same, block=8) == pytest.approx(0, abs=1e-5)
    assert mean_cosine(same) == pytest.approx(1, abs=1e-6)
    assert rank_of(same) == pytest.approx(1, abs=1e-5)
    assert isotropy_of(same) == pytest.approx(math.exp(-2), rel=1e-4)
    assert alignment(same, same) == 0


def test_opposite_vectors() -> None:
    assert uniformity([[1.0, 1.0], [-2.0, -2.0]]) == pytest.approx(-8, abs=1e-5)
    assert alignment([[1.0, 0.0]], [[-5.0, 0.0]]) == pytest.approx(4, abs=1e-6)


def test_an_isotropic_gaussian() -> None:
    """In d dimensions E exp(4 cos) = Gamma(d/2) (2/4)^(d/2-1) I_(d/2-1)(4), whatever the other vector."""
    from scipy.special import gamma, iv

    width = 8
    rows = np.random.default_rng(1).normal(size=(4000, width))
    half = width / 2
    expected = math.log(gamma(half) * (2 / 4) ** (half - 1) * iv(half - 1, 4)) - 4
    assert uniformity(rows) == pytest.approx(expected, abs=0.01)
    assert mean_cosine(rows) == pytest.approx(0, abs=0.005)
    assert rank_of(rows) == pytest.approx(width, rel=0.01)
    assert isotropy_of(rows) > 0.95


def test_alignment_against_the_definition() -> None:
    first, second = RANDOM[:18], RANDOM[18:36]
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in (first, second)]
    expected = np.mean([((x - y) ** 2).sum() for x, y in zip(*unit, strict=True)])
    assert alignment(first, second, block=5) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ([[1.0, 2.0, 3.0]], r"shape \(1, 3\)\. Expected at least 2 row\(s\)"),
        (np.zeros((0, 3)), r"shape \(0, 3\)\. Expected at least 2"),
        ([1.0, 2.0], "Expected at least 2"),
        ([[1.0, 0.0, 0.0], [0.0, math.nan, 0.0]], "Vector 1 holds an infinite or NaN value"),
        ([[1.0, 0.0, math.inf], [0.0, 1.0, 0.0]], "Vector 0 holds an infinite or NaN value"),
        ([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], "Vector 1 holds nothing but zeros"),
        ([[1.0, 0.0, 0.0], [0.0, 1.0]], "different shapes"),
    ],
)
def test_vectors_that_cannot_be_measured(measure: Callable[[Any], Any], vectors: Any, message: str) -> None:
    with pytest.raises(SempaError, match=message):
        measure(vectors)


def test_pairs_of_different_widths_are_refused() -> None:
    with pytest.raises(SempaError, match=r"\(1, 2\) and \(1, 3\)"):
        alignment([[1.0, 0.0]], [[1.0, 0.0, 0.0]])


def test_memory_does_not_grow_with_the_number_of_vectors(tmp_path: Path) -> None:
    """A file of 20 MB is measured in less than 8 MB, most of which are blocks of 256 rows."""
    count, width, block = 20_000, 256, 256
    file = np.memmap(tmp_path / "vectors.f32", dtype=np.float32, mode="w+", shape=(count, width))
    file[:] = np.random.default_rng(0).standard_normal((count, width), dtype=np.float32)
    tracemalloc.start()
    try:
        values, directions = spectrum(file, block=block)
        isotropy(file, directions, block=block)
        mean_cosine(file, block=block)
        uniformity(file[:4000], block=block)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert effective_rank(values) == pytest.approx(width, rel=0.01)
    assert peak < 8 << 20
