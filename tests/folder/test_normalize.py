"""Vectors as an index sees them: in float32, of norm 1 and normalised in float32, in whatever type a model computes."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from helpers.tiny import sample_sentences

import sempa_st
from sempa_st.folder.copying import copy_model
from sempa_st.folder.layout import ModelFolder
from sempa_st.forward.sentence_transformers import hidden_states
from sempa_st.utils.files import write_json

pytestmark = pytest.mark.names_dtype

SENTENCES = sample_sentences()[:50]
OLD = Path(__file__).parents[1] / "fixtures" / "saved_by_0.1.0"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("reader", ["sempa", "native"])
@pytest.mark.parametrize("tensors", [False, True])
def test_scores_of_an_inner_product_index_are_cosines(
    reader: str, dtype: str, tensors: bool, adapter_folder: Path
) -> None:
    model = sempa_st.load(adapter_folder, dtype=dtype, reader=reader, device="cpu")
    vectors = model.encode(SENTENCES, convert_to_tensor=tensors)
    assert vectors.dtype == (torch.float32 if tensors else np.float32)
    vectors = np.asarray(vectors)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    scores, found = index.search(vectors, 1)
    assert found[:, 0].tolist() == list(range(len(SENTENCES)))
    np.testing.assert_allclose(scores[:, 0], 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reader", ["sempa", "native"])
def test_a_folder_of_an_earlier_version_is_read_as_it_is(reader: str, tmp_path: Path) -> None:
    old = sempa_st.load(OLD / "native", dtype="bfloat16", reader="sempa", device="cpu")
    assert np.linalg.norm(old.encode(SENTENCES), axis=1).min() > 2
    scores = (old.encode(SENTENCES, normalize_embeddings=True).astype(float) ** 2).sum(axis=1)
    np.testing.assert_allclose(scores, 1, rtol=0, atol=1e-6)
    copy = copy_model(str(OLD / "native"), tmp_path / "copy")
    new = sempa_st.load(copy, dtype="bfloat16", reader=reader, device="cpu")
    np.testing.assert_allclose(np.linalg.norm(new.encode(SENTENCES), axis=1), 1, rtol=0, atol=1e-6)
    old.save_pretrained(str(tmp_path / "saved"))
    assert [ModelFolder(folder).normalizes for folder in (OLD / "native", copy, tmp_path / "saved")] == [0, 1, 0]
    assert ModelFolder(tmp_path / "saved").format == ModelFolder(copy).format == "native"


def test_a_cut_vector_is_normalised_again(adapter_folder: Path) -> None:
    model = sempa_st.load(adapter_folder, dtype="float32", device="cpu")
    whole = model.encode(SENTENCES)[:, :8]
    expected = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    np.testing.assert_allclose(model.encode(SENTENCES, truncate_dim=8), expected, rtol=0, atol=1e-6)
    model.truncate_dim = 8
    np.testing.assert_allclose(model.encode(SENTENCES), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.encode(SENTENCES[0]), expected[0], rtol=0, atol=1e-6)


def test_the_base_is_normalised_and_its_hidden_states_are_not(tiny_base: Path) -> None:
    model = sempa_st.load(tiny_base, dtype="float32", device="cpu")
    states, vectors = hidden_states(model).encode(SENTENCES), model.encode(SENTENCES)
    norms = np.linalg.norm(states, axis=1, keepdims=True)
    assert norms.min() > 2
    np.testing.assert_allclose(states / norms, vectors, rtol=0, atol=1e-6)
    with torch.no_grad():
        ids = torch.tensor(model[0].token_rows(SENTENCES[:1]))
        expected = model[0].decoder(input_ids=ids).last_hidden_state[0, -1]
    np.testing.assert_allclose(states[0], expected, rtol=0, atol=1e-4)


def test_what_normalises_something_else_is_no_folder_of_ours(adapter_folder: Path, tmp_path: Path) -> None:
    copy = copy_model(str(adapter_folder), tmp_path / "copy")
    write_json(copy / "2_Normalize" / "config.json", {"module_input_name": "token_embeddings"})
    assert not ModelFolder(copy).normalizes
    assert ModelFolder(copy).format is None


def test_libraries_that_look_at_the_name_of_the_class_know_the_model(adapter_folder: Path) -> None:
    """BERTopic takes a model for one of sentence-transformers by this very look."""
    assert "sentence_transformers" in str(type(sempa_st.load(adapter_folder, dtype="float32", device="cpu")))
