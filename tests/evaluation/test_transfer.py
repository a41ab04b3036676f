from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.evaluation.transfer import STRENGTHS, features, load_transfer, probe

Cli = Callable[..., tuple[int, str, str]]


def noisy(count: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """Points of two classes that overlap, in 6 dimensions."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, count)
    return random.normal(size=(count, 6)) + 0.4 * labels[:, None], labels.tolist()


def accuracy(train: Any, test: Any, strength: float) -> float:
    fitted = LogisticRegression(C=strength, max_iter=1000).fit(*train)
    return float((fitted.predict(test[0]) == np.array(test[1])).mean())


def folds_of(data: Any) -> list[tuple[Any, Any]]:
    points, labels = data[0], np.array(data[1])
    parts = StratifiedKFold(10, shuffle=True, random_state=1111).split(points, labels)
    return [((points[a], labels[a]), (points[b], labels[b])) for a, b in parts]


def best_by_folds(data: Any) -> float:
    return max(STRENGTHS, key=lambda strength: np.mean([accuracy(*fold, strength) for fold in folds_of(data)]))


def test_the_penalty_is_chosen_as_senteval_does() -> None:
    """On dev rows, by folds of the training rows, and by folds within folds: against plain loops."""
    train, dev, test = noisy(60, 0), noisy(40, 1), noisy(200, 2)
    on_dev = max(STRENGTHS, key=lambda strength: accuracy(train, dev, strength))
    assert probe({"train": train, "dev": dev, "test": test}) == pytest.approx(accuracy(train, test, on_dev))
    assert probe({"train": train, "test": test}) == pytest.approx(accuracy(train, test, best_by_folds(train)))
    nested = [accuracy(inner, held, best_by_folds(inner)) for inner, held in folds_of(train)]
    assert probe({"all": train}) == pytest.approx(np.mean(nested))


def test_features_of_pairs(adapter_folder: Path) -> None:
    model = sempa_st.load(adapter_folder, dtype="float32", device="cpu")
    first, second = ["A cat.", "A dog."], ["A dog.", "A bird."]
    u, v = model.encode(first), model.encode(second)
    np.testing.assert_allclose(features(model, [first, second]), np.concatenate([abs(u - v), u * v], 1), atol=1e-4)
    np.testing.assert_allclose(features(model, [first]), u, atol=1e-4)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """SICK's entailment, in which a sentence entails itself and contradicts its negation."""
    (tmp_path / "sts").mkdir()
    animals = ("cat", "dog", "bird", "cow", "fox", "owl")
    for number, split in enumerate(("train", "dev", "test")):
        rows = []
        for animal in animals[number:] + animals[:number]:
            rows.append({"sentence1": f"A {animal} runs.", "sentence2": f"A {animal} runs.", "entailment": "yes"})
            rows.append(
                {"sentence1": f"A {animal} runs.", "sentence2": "Nothing else is here at all", "entailment": "no"}
            )
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "sts" / f"sickr.{split}.parquet")
    return tmp_path


def test_the_command_scores_what_is_at_hand(run_cli: Cli, adapter_folder: Path, data_dir: Path) -> None:
    arguments = ["--dtype", "float32", "--device", "cpu", "--data-dir", data_dir, "--output", data_dir / "out"]
    code, out, err = run_cli("evaluate", adapter_folder, "--tasks", "transfer", *arguments)
    assert code == 0, err
    assert "SICK-E" in out
    assert "100.00" in out  # equal sentences have the difference 0
    code, _, err = run_cli("evaluate", adapter_folder, "--tasks", "MR", *arguments)
    assert code == 2
    assert "transfer/mr.all.parquet" in err


def test_missing_and_broken_data(data_dir: Path) -> None:
    with pytest.raises(SempaError, match="--data-dir"):
        load_transfer(["SICK-E"], None)
    with pytest.raises(SempaError, match="has the files of none of"):
        load_transfer(["transfer"], str(data_dir / "sts"))
    rows = [{"sentence1": "a", "sentence2": "b", "entailment": None}]
    table = pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in rows[0]]))
    pq.write_table(table, data_dir / "sts" / "sickr.dev.parquet")
    with pytest.raises(SempaError, match=r"sickr.dev.parquet, row 1: expected sentences and a label"):
        load_transfer(["SICK-E"], str(data_dir))


@pytest.mark.parametrize(
    "labels", [[0] * 39 + [1], [0] * 40, [0, 1] * 4, [0.5, 1.5] * 20], ids=["lone", "one", "few", "floats"]
)
def test_labels_that_no_classifier_learns_are_refused(tmp_path: Path, labels: list[Any]) -> None:
    (tmp_path / "transfer").mkdir()
    rows = [{"sentence": f"Row {number}.", "label": label} for number, label in enumerate(labels)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "transfer" / "mr.all.parquet")
    with pytest.raises(SempaError, match=r"mr\.all\.parquet has .* Expected 10 rows or more"):
        load_transfer(["MR"], str(tmp_path))
