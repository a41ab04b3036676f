"""Scores by width and precision are those of sentence-transformers' evaluator."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import save_sts
from scipy.stats import spearmanr
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

import sempa_st
from benchmarks import matryoshka
from sempa_st.data.sts import dev_pairs

pytestmark = pytest.mark.names_dtype


def test_the_scores_of_every_width(
    adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = save_sts(tmp_path), tmp_path / "widths.json"
    words = f"x {adapter_folder} --widths 32,12 --data-dir {data} --dtype float32 --output {output}"
    monkeypatch.setattr(sys, "argv", words.split())
    matryoshka.main()
    scores = json.loads(output.read_text())["scores"][adapter_folder.name]
    pairs = dev_pairs("stsb", str(data))
    model = sempa_st.load(adapter_folder, dtype="float32", device="cpu")
    first, second = (np.asarray(model.encode(list(side))) for side in (pairs.first, pairs.second))
    for width in (32, 12):
        exact = EmbeddingSimilarityEvaluator(list(pairs.first), list(pairs.second), pairs.scores, truncate_dim=width)
        assert scores[str(width)]["float32"] == pytest.approx(100 * exact(model)["spearman_cosine"], abs=1e-3)
        bits = [side[:, :width] > 0 for side in (first, second)]
        same = (bits[0] == bits[1]).sum(axis=1)
        assert scores[str(width)]["binary"] == pytest.approx(100 * spearmanr(same, pairs.scores).statistic, abs=1e-3)
        low, high = (getattr(np.vstack([first, second])[:, :width], end)(axis=0) for end in ("min", "max"))
        whole = [np.trunc((side[:, :width] - low) / ((high - low) / 255) - 128) for side in (first, second)]
        cosine = (whole[0] * whole[1]).sum(1) / np.linalg.norm(whole[0], axis=1) / np.linalg.norm(whole[1], axis=1)
        assert scores[str(width)]["int8"] == pytest.approx(100 * spearmanr(cosine, pairs.scores).statistic, abs=0.5)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("width", "int8", "binary", "12"))
