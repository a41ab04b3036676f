"""The types of the real Gemma 3 270M base from PyPI, and the shipped models on it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.tiny import sample_sentences
from peft import AutoPeftModelForCausalLM
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

import sempa_st
from sempa_st.data.sts import read_pairs
from sempa_st.folder.copying import copy_model
from sempa_st.model.embedded import embedded_base
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.utils.assets import asset_path

pytestmark = pytest.mark.integration

SENTENCES = sample_sentences()[:8]


def test_the_chosen_type_decides() -> None:
    model = sempa_st.load("gemma3-270m", dtype="bfloat16", device="cpu")
    exact = sempa_st.load("gemma3-270m", dtype="float32", device="cpu")
    vectors = [m.encode(SENTENCES[:4], convert_to_tensor=True).float() for m in (model, exact)]
    assert model.dtype == torch.bfloat16
    assert cosine_similarity(*vectors).min() > 0.98
    rounded = sempa_st.load("gemma3-270m", dtype="float32", device="cpu", int8=True)
    assert cosine_similarity(rounded.encode(SENTENCES[:4], convert_to_tensor=True), vectors[1]).min() > 0.98
    projections = [type(layer.mlp.down_proj) for layer in rounded[0].decoder.layers]
    assert projections.count(torch.nn.Linear) > len(projections) / 2  # rounding them costs much of the score


def sample_score(model: SentenceTransformer) -> float:
    pairs = read_pairs([asset_path("sts_sample.jsonl")])
    first, second = (model.encode(list(side), convert_to_tensor=True) for side in (pairs.first, pairs.second))
    return 100 * float(spearmanr(cosine_similarity(first, second), pairs.scores).statistic)


def test_the_shipped_models_embed_better_and_open_everywhere(tmp_path: Path) -> None:
    base = sample_score(sempa_st.load("gemma3-270m", dtype="float32", device="cpu"))
    ours = sempa_st.load("sempa-gemma3-270m", dtype="float32", device="cpu")
    assert sample_score(ours) > base + 5
    folder = copy_model("sempa-gemma3-270m", tmp_path / "copy")
    native = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    vectors = [m.encode(SENTENCES, convert_to_tensor=True) for m in (ours, native)]
    assert cosine_similarity(*vectors).min() >= 0.99999
    activated = sempa_st.load("sempa-gemma3-270m-activated", dtype="float32", device="cpu")
    assert sample_score(activated) > base + 5


def test_the_shipped_activated_adapter_leaves_ordinary_text_to_the_base(tmp_path: Path) -> None:
    folder = copy_model("sempa-gemma3-270m-activated", tmp_path / "activated")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tuned = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(embedded_base(), dtype=torch.float32)
    ordinary = tokenizer(
        ["The best thing about a rainy Sunday", "Means in one word"], padding=True, return_tensors="pt"
    )
    template = tokenizer(EMBEDDING_TEMPLATES["prompteol"].text("A cat sleeps"), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(tuned(**ordinary).logits, plain(**ordinary).logits)
        assert not torch.equal(tuned(**template).logits[:, -1], plain(**template).logits[:, -1])
    written = [model.generate(**ordinary, max_new_tokens=8, do_sample=False) for model in (tuned, plain)]
    assert torch.equal(*written)
