from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA

import sempa_st
from sempa_st.analysis.data import AnalysisData
from sempa_st.analysis.pca import principal_components
from sempa_st.errors import SempaError

pytestmark = pytest.mark.names_dtype

Cli = Callable[..., tuple[int, str, str]]
ROWS = np.random.default_rng(0).normal(size=(30, 7)) * [9, 5, 3, 1, 1, 1, 1] + 4


def test_the_components_are_those_of_scikit_learn() -> None:
    unit = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    reference = PCA(2, svd_solver="full").fit(unit)
    expected = reference.transform(unit)
    points, shares = principal_components(ROWS)
    signs = np.sign((points * expected).sum(axis=0))
    np.testing.assert_allclose(points * signs, expected, atol=1e-5)
    np.testing.assert_allclose(shares, reference.explained_variance_ratio_, rtol=1e-4)


def test_the_signs_do_not_depend_on_the_order_of_the_rows() -> None:
    order = np.random.default_rng(1).permutation(len(ROWS))
    np.testing.assert_allclose(principal_components(ROWS[order])[0], principal_components(ROWS)[0][order], atol=1e-5)


def test_equal_vectors_lie_on_one_point() -> None:
    points, shares = principal_components(np.tile([[0.1, 0.7, 0.3]], (5, 1)))
    assert shares.tolist() == [0, 0]
    np.testing.assert_allclose(points, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("vectors", "message"), [([[1.0, 2.0]], "at least 2 row"), ([[1.0, 2.0], [np.nan, 0.0]], "Vector 1 holds")]
)
def test_vectors_without_components_are_refused(vectors: list[list[float]], message: str) -> None:
    with pytest.raises(SempaError, match=message):
        principal_components(vectors)


def test_the_part_draws_the_sentences_of_the_triplets(run_cli: Cli, tiny_base: Path, tmp_path: Path) -> None:
    options = ("--only", "pca", "--share", 0.06, "--dtype", "float32", "--device", "cpu")
    outputs = [tmp_path / "one", tmp_path / "two"]
    models = (tiny_base, f"mean:{tiny_base}")
    for output in outputs:
        code, _, err = run_cli("analyze", *models, *options, "--output", output)
        assert code == 0, err
    triplets = AnalysisData().sample_triplets(21, 0)
    rows = list(csv.DictReader((outputs[0] / "parts" / "pca" / "points.csv").open()))
    assert len(rows) == 2 * 3 * 21
    mine = [row for row in rows if row["model"] == "tiny-llama"]
    assert [row["sentence"] for row in mine[21:42]] == [triplet.entailed for triplet in triplets]
    assert {row["role"] for row in mine[21:42]} == {"positive"}
    sentences = [row["sentence"] for row in mine]
    points, shares = principal_components(sempa_st.load(tiny_base, dtype="float32", device="cpu").encode(sentences))
    found = [[float(row["first"]), float(row["second"])] for row in mine]
    np.testing.assert_allclose(found, points, atol=1e-4)
    values = json.loads((outputs[0] / "results.json").read_text())["parts"]["pca"]
    assert values["models"]["tiny-llama"]["explained variance"] == pytest.approx(shares.tolist(), abs=1e-4)
    first, second = ((output / "parts" / "pca" / "pca.png").read_bytes() for output in outputs)
    assert first == second
