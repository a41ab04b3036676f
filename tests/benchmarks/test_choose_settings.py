"""The benchmark that scores a method at every layer in one pass gives what the method gives at each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import make_llama, make_tokenizer, save_sts
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer

from benchmarks.choose_settings import score_layers
from sempa_st.data.sts import local_files, read_pairs
from sempa_st.methods.module import MethodModule


@pytest.mark.parametrize("method", ["mean", "echo", "llm2vec", "token-prepending:exit=2", "contrastive-prompting:at=1"])
def test_every_layer_is_scored_as_by_itself(method: str, tmp_path: Path) -> None:
    pairs = read_pairs(local_files(str(save_sts(tmp_path)), "STSBenchmark", "dev", "mteb"))
    scores = score_layers(MethodModule(make_llama(), make_tokenizer(), f"{method}:layer=-1"), pairs, method)
    assert list(scores) == (["2", "3"] if "contrastive" in method else ["1", "2", "3"])
    for layer, score in scores.items():
        module = MethodModule(make_llama(), make_tokenizer(), f"{method}:layer={layer}")
        model = SentenceTransformer(modules=[module], device="cpu")
        first, second = (model.encode(list(side), convert_to_tensor=True) for side in (pairs.first, pairs.second))
        expected = spearmanr(torch.nn.functional.cosine_similarity(first, second), pairs.scores).statistic
        assert score == pytest.approx(100 * float(expected), abs=1e-2)
