"""Folders that sempa-st 0.1.0 saved open as before and give the vectors that it gave."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.readers import encode_without_sempa_st
from sentence_transformers import SentenceTransformer

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.write import set_base_reference
from sempa_st.utils.files import read_json

pytestmark = pytest.mark.names_dtype

STORED = Path(__file__).parents[1] / "fixtures" / "saved_by_0.1.0"
SENTENCES: list[str] = read_json(STORED / "vectors.json")["sentences"]


def assert_stored(vectors: Any, name: str) -> None:
    expected = read_json(STORED / "vectors.json")["vectors"][name]
    np.testing.assert_allclose(vectors, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored folders, with adapters that name the base where it is now."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(STORED, root, dirs_exist_ok=True)
    for settings in root.glob("*/adapter_config.json"):
        set_base_reference(settings.parent, str(root / "base"))
    return root


@pytest.mark.parametrize("name", ["native", "custom", "resaved"])
def test_sempa_st_gives_the_stored_vectors(models: Path, name: str) -> None:
    assert_stored(sempa_st.load(models / name, dtype="float32", device="cpu").encode(SENTENCES), name)


@pytest.mark.parametrize("name", ["native", "custom", "resaved"])
def test_a_base_that_moved_along_is_found_by_its_name(name: str) -> None:
    assert read_json(STORED / name / "adapter_config.json")["base_model_name_or_path"] == "/models/base"
    assert_stored(sempa_st.load(STORED / name, dtype="float32", device="cpu").encode(SENTENCES), name)


def test_a_base_that_did_not_move_along_must_be_named(tmp_path: Path) -> None:
    alone = shutil.copytree(STORED / "resaved", tmp_path / "resaved")
    with pytest.raises(SempaError, match=r"base of the adapter in .*resaved.*pass --base"):
        sempa_st.load(alone, dtype="float32", device="cpu")
    model = sempa_st.load(alone, base=str(STORED / "base"), dtype="float32", device="cpu")
    assert_stored(model.encode(SENTENCES), "resaved")


@pytest.mark.parametrize("name", ["native", "resaved", "method"])
def test_plain_sentence_transformers_gives_the_stored_vectors(models: Path, name: str) -> None:
    model = SentenceTransformer(str(models / name), trust_remote_code=name != "native", device="cpu")
    assert_stored(model.encode(SENTENCES), name)


def test_the_code_in_a_custom_folder_runs_without_sempa_st(models: Path, tmp_path: Path) -> None:
    assert_stored(encode_without_sempa_st(models / "custom", SENTENCES, trust=True, cwd=tmp_path), "custom")


def test_the_stored_models_differ(models: Path) -> None:
    """Otherwise a reader could lose an adapter and pass."""
    base = sempa_st.load(models / "base", dtype="float32", device="cpu").encode(SENTENCES)
    mean = sempa_st.load(models / "base", dtype="float32", device="cpu", method="mean").encode(SENTENCES)
    for name, bare in (("native", base), ("custom", base), ("resaved", base), ("method", mean)):
        with pytest.raises(AssertionError):
            assert_stored(bare, name)
