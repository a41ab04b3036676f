"""The benchmark that scores many adapters in one pass gives the vectors that each of them gives by itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from helpers.tiny import finish_adapter, make_llama, make_tokenizer, sample_sentences
from torch.nn import functional

import sempa_st
from benchmarks.score_together import continued, load_together
from sempa_st.errors import SempaError
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template, prefix_tokens, suffix_tokens

pytestmark = pytest.mark.names_dtype


def test_each_model_gets_its_own_vectors(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    closing = suffix_tokens(tokenizer, "prompteol")
    adapters = ({"layers": [1, 2]}, {"invocation": closing, "format": "custom"}, {"layers": [2]}, {})
    folders = [
        finish_adapter(tmp_path / str(seed), tiny_base, make_llama(), seed=seed, **settings)
        for seed, settings in enumerate(adapters)
    ]
    together = load_together([ModelFolder(folder) for folder in folders])
    sentences = sample_sentences()[:5]
    found = list(continued(together, together.module.token_rows(sentences)))
    alone = [
        sempa_st.load(path, dtype="float32", device="cpu").encode(sentences, convert_to_tensor=True)
        for path in (tiny_base, *folders)
    ]
    for states, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(functional.normalize(states), expected, rtol=0, atol=1e-5)
    assert min(float((a - b).norm()) for a, b in itertools.pairwise(alone)) > 1e-2


def test_an_adapter_of_the_whole_template_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    opening = prefix_tokens(tokenizer, "prompteol")
    folder = finish_adapter(tmp_path / "model", tiny_base, make_llama(), invocation=opening, format="custom")
    with pytest.raises(SempaError, match="Expected an adapter, plain or of the closing tokens"):
        load_together([ModelFolder(folder)])
