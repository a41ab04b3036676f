"""Other libraries' classes for OpenAI's embeddings, pointed at the server. They run where those are installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.server import Running, load_float32, running_server
from helpers.tiny import sample_sentences

pytestmark = pytest.mark.names_dtype

SENTENCES = sample_sentences()[:12]


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with running_server(load_float32(folder)) as it:
        yield it


def assert_same(found: list[list[float]], folder: Path) -> None:
    wanted = load_float32(folder).encode(SENTENCES)
    vectors = np.array(found)
    cosines = (vectors * wanted).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(wanted, axis=1)
    assert vectors.shape == wanted.shape and cosines.min() > 0.99999


def test_langchain(server: Running, folder: Path) -> None:
    library = pytest.importorskip("langchain_openai")
    embeddings = library.OpenAIEmbeddings(
        base_url=f"{server.url}/v1", api_key="none", model="tiny", check_embedding_ctx_length=False
    )
    assert_same(embeddings.embed_documents(SENTENCES), folder)
    assert_same([embeddings.embed_query(sentence) for sentence in SENTENCES], folder)


def test_llama_index(server: Running, folder: Path) -> None:
    library = pytest.importorskip("llama_index.embeddings.openai")
    embedding = library.OpenAIEmbedding(api_base=f"{server.url}/v1", api_key="none", model_name="tiny")
    assert_same(embedding.get_text_embedding_batch(SENTENCES), folder)
    assert_same([embedding.get_query_embedding(sentence) for sentence in SENTENCES], folder)
