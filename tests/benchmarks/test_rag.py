"""What the benchmark of retrieval and answers counts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import sample_sentences, save_sts

from benchmarks import rag
from sempa_st.data.sts import local_files, read_pairs

pytestmark = pytest.mark.names_dtype


class Table:
    """A stand-in for a model: a text's vector is the one that it was given for it."""

    def __init__(self, vectors: dict[str, Sequence[float]]) -> None:
        self.vectors = vectors

    def encode(self, texts: Sequence[str], normalize_embeddings: bool = False) -> np.ndarray:
        rows = np.array([self.vectors[text] for text in texts], dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalize_embeddings else rows


def test_sentences_are_those_of_the_text() -> None:
    text = (
        "\n = A heading of six or more words = \n\nThe first one has six words . And the next as many words ! Short .\n"
    )
    text += "The first one has six words .\n"
    assert rag.sentences_of(text) == ["The first one has six words .", "And the next as many words !"]


def test_recall_is_the_share_of_questions_whose_partner_is_among_the_ten() -> None:
    axes = np.eye(24)
    partners, passages = ["p0", "p1"], [f"other {n}" for n in range(12)]
    near = [axes[1] + (0.1 + 0.01 * n) * axes[2] for n in range(12)]  # twelve passages nearer to q1 than its partner
    vectors = {"q0": axes[0], "p0": axes[0] + axes[3], "q1": axes[1], "p1": axes[1] + axes[4]}
    model = Table({**vectors, **dict(zip(passages, near, strict=True))})
    found = rag.recall(model, ["q0", "q1"], partners, passages)
    assert found["recall at 10"] == 0.5
    assert found["MiB"] == 14 * 24 * 4 / 2**20
    assert rag.recall(model, ["q0", "q1"], partners, passages[:9])["recall at 10"] == 1.0


def test_the_pairs_are_those_that_mean_the_same(tmp_path: Path) -> None:
    data = str(save_sts(tmp_path))
    pairs = read_pairs(local_files(data, "STSBenchmark", "test", "mteb"))
    questions, partners = rag.paired_sentences(data)
    rows = list(zip(pairs.first, pairs.second, pairs.scores, strict=True))
    same = {(first, second) for first, second, score in rows if score >= 4.5 and first != second}
    assert questions and set(zip(questions, partners, strict=True)) <= same
    assert sorted(questions) == sorted({first for first, _ in same})


def test_the_program_measures_two_models(
    adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = save_sts(tmp_path), tmp_path / "rag.json"
    (data / "text").mkdir()
    (data / "text" / "wikitext2.test.txt").write_text("\n".join(sample_sentences()[:60]), encoding="utf-8")
    asked: list[Sequence[str]] = []
    monkeypatch.setattr(rag, "measured", lambda models: asked.append(models) or float(len(models)))
    words = f"x --model {adapter_folder} --peer {adapter_folder} --passages 20 --data-dir {data} --output {output}"
    monkeypatch.setattr(sys, "argv", words.split())
    rag.main()
    written = json.loads(output.read_text())
    assert [row["model"] for row in written["rows"]] == [adapter_folder.name] * 2
    assert written["rows"][0]["recall at 10"] == written["rows"][1]["recall at 10"]
    assert written["passages"] == 20 + len(rag.paired_sentences(str(data))[0])
    assert [len(models) for models in asked] == [1, 2]
    assert "recall at 10" in capsys.readouterr().out


def test_memory_is_of_a_process_of_its_own(adapter_folder: Path) -> None:
    assert rag.measured([str(adapter_folder)]) > 1
