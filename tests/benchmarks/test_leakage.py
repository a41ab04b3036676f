"""Pairs that share a sentence with the training triplets are found, and left out of the second score."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import save_sts
from scipy.stats import spearmanr

import sempa_st
from benchmarks import leakage
from sempa_st.data.rows import read_rows

pytestmark = pytest.mark.names_dtype


def test_scores_with_and_without_the_shared_pairs(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = save_sts(tmp_path)
    rows = read_rows(data / "sts" / "stsb.test.parquet")
    # Seen as a premise, in other case and punctuation, and as a neutral sentence.
    seen = [rows[0]["sentence1"].upper() + " !", rows[2]["sentence2"]]
    triplet = {"sent0": seen[0], "sent1": "Nobody says this.", "hard_neg": "Nor that.", "neutral": seen[1]}
    (data / "nli").mkdir()
    pq.write_table(pa.Table.from_pylist([triplet]), data / "nli" / "triplets.parquet")
    command = f"leakage {tiny_base} --data-dir {data} --tasks STSBenchmark --output {tmp_path / 'out.json'}"
    monkeypatch.setattr(sys, "argv", command.split())
    leakage.main()
    found = json.loads((tmp_path / "out.json").read_text())["sets"]["STSBenchmark"]

    clean = [row for row in rows if not {row["sentence1"], row["sentence2"]} & {rows[0]["sentence1"], seen[1]}]
    assert (found["pairs"], found["shared"]) == (len(rows), len(rows) - len(clean))
    assert 2 <= found["shared"] < len(rows) - 2
    model = sempa_st.load(tiny_base, dtype="float32", device="cpu")
    for name, kept in (("all", rows), ("without", clean)):
        first, second = (model.encode([row[f"sentence{side}"] for row in kept]) for side in (1, 2))
        cosines = model.similarity_pairwise(first, second)
        expected = 100 * spearmanr(cosines, [row["score"] for row in kept]).statistic
        assert found["spearman"][str(tiny_base)][name] == pytest.approx(expected, abs=1e-3)
    assert "STSBenchmark" in capsys.readouterr().out
