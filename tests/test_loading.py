"""The arguments of ``sempa_st.load`` that sentence-transformers' own constructor has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hub import TOKEN, Hub, running_hub, talk_to
from helpers.tiny import finish_adapter, make_llama, make_tokenizer, save_base
from huggingface_hub import constants
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import StaticEmbedding

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.digests import digest_in
from sempa_st.model.patching import attention_implementation

pytestmark = pytest.mark.names_dtype
TEXTS = ["A cat sleeps.", "Where is it?", "A dog runs in the snow."]


def load(model: object, **arguments: Any) -> SentenceTransformer:
    return sempa_st.load(str(model), **{"device": "cpu", "dtype": "float32", **arguments})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        talk_to(hub, monkeypatch, tmp_path / "own-cache")
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
        yield hub


def over_the_hub(adapter_folder: Path, path: Path, base: str) -> Path:
    folder = shutil.copytree(adapter_folder, path)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))
    return folder


def test_a_revision_is_the_model_of_its_commit(hub: Hub, tiny_base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    other = finish_adapter(tmp_path / "other", tiny_base, make_llama(), seed=7)
    hub.publish("acme/tiny", tiny_base)
    for number, folder in enumerate((adapter_folder, other)):
        hub.publish("me/sempa", over_the_hub(folder, tmp_path / str(number), "acme/tiny"))
    first, newest = (sha for sha, _ in hub.repositories["me/sempa"].commits)
    expected = [load(folder).encode(TEXTS) for folder in (adapter_folder, other)]
    assert abs(expected[0] - expected[1]).max() > 1e-3
    np.testing.assert_array_equal(load("me/sempa", revision=first).encode(TEXTS), expected[0])
    np.testing.assert_array_equal(load("me/sempa", revision=newest).encode(TEXTS), expected[1])
    np.testing.assert_array_equal(load("me/sempa").encode(TEXTS), expected[1])
    native = load("me/sempa", revision=first, reader="native").encode(TEXTS)
    np.testing.assert_allclose(native, expected[0], atol=1e-5)
    with pytest.raises(SempaError, match="no such revision"):
        load("me/sempa", revision="0" * 40)
    for local in (adapter_folder, "sempa-gemma3-270m", "gemma3-270m"):
        with pytest.raises(SempaError, match="The revision 'v1' is of a repository of the Hub"):
            load(local, revision="v1")


def test_a_revision_of_a_base_saves_that_base(hub: Hub, tmp_path: Path) -> None:
    for seed in (3, 4):
        hub.publish("acme/tiny", save_base(tmp_path / f"base{seed}", make_llama(seed), make_tokenizer()))
    first = hub.repositories["acme/tiny"].commits[0][0]
    opened = load("acme/tiny", revision=first)
    expected = load(tmp_path / "base3").encode(TEXTS)
    np.testing.assert_array_equal(opened.encode(TEXTS), expected)
    opened.save_pretrained(str(tmp_path / "saved"))
    np.testing.assert_array_equal(load(tmp_path / "saved").encode(TEXTS), expected)


@pytest.mark.parametrize("reader", ["sempa", "native"])
def test_a_token_opens_private_models_and_bases(
    hub: Hub, tiny_base: Path, adapter_folder: Path, tmp_path: Path, reader: str
) -> None:
    hub.publish("acme/tiny", tiny_base)
    hub.publish("me/sempa", over_the_hub(adapter_folder, tmp_path / "m", "acme/tiny"))
    for repository in hub.repositories.values():
        repository.private = True
    cache = tmp_path / "cache"
    with pytest.raises(SempaError, match=r"that you can access.*pass a token"):
        load("me/sempa", reader=reader, cache_folder=cache)
    opened = load("me/sempa", reader=reader, token=TOKEN, cache_folder=cache)
    np.testing.assert_allclose(opened.encode(TEXTS), load(adapter_folder).encode(TEXTS), atol=1e-5)
    assert sorted(path.name for path in cache.glob("models--*")) == ["models--acme--tiny", "models--me--sempa"]
    assert not list(tmp_path.glob("own-cache/models--*/snapshots/*/*.safetensors"))
    with pytest.raises(SempaError, match="that you can access"):  # a token and a cache are those of one call
        load("me/sempa", reader=reader)


def test_arguments_for_the_decoder(adapter_folder: Path, tiny_base: Path) -> None:
    plain = load(adapter_folder)
    eager = load(adapter_folder, model_kwargs={"attn_implementation": "eager"})
    assert attention_implementation(eager[0].model.config) == "eager" != attention_implementation(plain[0].model.config)
    np.testing.assert_allclose(eager.encode(TEXTS), plain.encode(TEXTS), atol=1e-5)
    names = [model.model_card_data.model_name for model in (plain, eager)]
    assert all(map(digest_in, names))
    assert len(set(names)) == 2
    for model, arguments in ((adapter_folder, {"reader": "native"}), (tiny_base, {"method": "mean"})):
        opened = load(model, model_kwargs={"attn_implementation": "eager"}, **arguments)
        np.testing.assert_allclose(opened.encode(TEXTS), load(model, **arguments).encode(TEXTS), atol=1e-5)
    mapped = load(adapter_folder, device=None, model_kwargs={"device_map": "cpu"})
    np.testing.assert_array_equal(mapped.encode(TEXTS), plain.encode(TEXTS))
    assert mapped.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_kwargs": {"torch_dtype": "float16"}}, r"sets 'torch_dtype'.*Pass dtype=\.\.\. to load"),
        ({"model_kwargs": {"trust_remote_code": True}}, "sets 'trust_remote_code'.*never run"),
        ({"model_kwargs": {"device_map": "auto"}}, "Both device 'cpu' and a device_map"),
        ({"truncate_dim": 33}, "truncate_dim is 33. Expected a number from 1 to 32"),
        ({"truncate_dim": 0}, "truncate_dim is 0"),
        ({"prompts": {"query": 3}}, "The prompt 'query' is 3. Expected a text"),
    ],
)
def test_arguments_that_cannot_be(adapter_folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SempaError, match=message):
        load(adapter_folder, **arguments)


@pytest.mark.parametrize("reader", ["sempa", "native"])
def test_width_and_prompts(adapter_folder: Path, tmp_path: Path, reader: str) -> None:
    whole = load(adapter_folder, reader=reader)
    opened = load(adapter_folder, reader=reader, truncate_dim=8, prompts={"query": "Find: "})
    assert opened.get_embedding_dimension() == 8
    cut = whole.encode(TEXTS, normalize_embeddings=False)[:, :8]
    found = opened.encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(found, cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)
    prompted = whole.encode([f"Find: {text}" for text in TEXTS])[:, :8]
    asked = opened.encode_query(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(asked, prompted / np.linalg.norm(prompted, axis=1, keepdims=True), atol=1e-5)
    assert whole.prompts["query"] == ""
    if reader == "sempa":
        opened.save_pretrained(str(tmp_path / "saved"))
        again = load(tmp_path / "saved")
        assert (again.truncate_dim, again.prompts["query"]) == (8, "Find: ")


def test_static_embeddings_are_read_as_they_are(tmp_path: Path) -> None:
    """Their tokenizer is one of tokenizers, and their ids are those of all texts in a row."""
    torch.manual_seed(0)
    static = SentenceTransformer(
        modules=[StaticEmbedding(make_tokenizer().backend_tokenizer, embedding_dim=16)], device="cpu"
    )
    static.save(str(tmp_path / "static"))
    texts = ["A cat sleeps.", "Two dogs run in the snow.", ""]
    loaded = sempa_st.load(tmp_path / "static", dtype="float32", device="cpu")
    np.testing.assert_allclose(loaded.encode(texts), static.encode(texts), atol=1e-6)
    assert not loaded.encode([""]).any()
    loaded[0].embedding.weight.data[:] = float("nan")
    with pytest.raises(SempaError, match=r"1 of 1 vector\(s\) contain infinite or NaN values"):
        loaded.encode(texts[:1])
