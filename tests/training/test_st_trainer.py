"""sentence-transformers' own trainer goes on from an adapter that ``sempa_st.load(..., trainable=True)`` opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from helpers.tiny import finish_adapter, make_llama
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)

import sempa_st
from sempa_st.data.nli import load_nli
from sempa_st.errors import SempaError
from sempa_st.model.tokenizer import suffix_tokens

pytestmark = pytest.mark.names_dtype

PAIRS = Dataset.from_list([{"anchor": t.premise, "positive": t.entailed} for t in load_nli("sample").triplets[:8]])
TEXTS = ["A cat sleeps.", "Two dogs run on a beach, and a child looks on."]


def loss_of(name: str, model: SentenceTransformer) -> torch.nn.Module:
    if name == "cached":
        return CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)
    plain = MultipleNegativesRankingLoss(model)
    return MatryoshkaLoss(model, plain, [32, 16, 8]) if name == "matryoshka" else plain


def train(model: SentenceTransformer, loss: str, folder: Path) -> set[str]:
    """Take two steps; returns the names of the weights that moved."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        warmup_steps=0,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=PAIRS, loss=loss_of(loss, model)).train()
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("reader", ["sempa", "native"])
@pytest.mark.parametrize("loss", ["plain", "cached", "matryoshka"])
def test_the_adapter_moves_and_the_base_does_not(adapter_folder: Path, tmp_path: Path, loss: str, reader: str) -> None:
    model = sempa_st.load(adapter_folder, reader=reader, dtype="float32", device="cpu", trainable=True)
    start = model.encode(TEXTS)
    adapter = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(adapter) == 2 * 3 * 7  # two factors of seven layers in each of three
    assert train(model, loss, tmp_path / "run") == adapter
    vectors = model.encode(TEXTS)
    assert abs(vectors - start).max() > 1e-2
    model.save_pretrained(str(tmp_path / "saved"))
    reopened = sempa_st.load(tmp_path / "saved", dtype="float32", device="cpu")
    assert reopened.encode(TEXTS) == pytest.approx(vectors, abs=1e-5)
    assert not any(parameter.requires_grad for parameter in reopened.parameters())


@pytest.mark.parametrize("reader", ["sempa", "native"])
def test_adapters_are_trained_in_float32_on_16_bits(adapter_folder: Path, tmp_path: Path, reader: str) -> None:
    model = sempa_st.load(adapter_folder, reader=reader, dtype="bfloat16", device="cpu", trainable=True)
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert len(train(model, "plain", tmp_path / "run")) == 2 * 3 * 7


def test_an_adapter_of_the_suffix_is_trained_too(tiny_base: Path, tmp_path: Path) -> None:
    template = "prompteol"
    tokenizer: Any = sempa_st.load(tiny_base, dtype="float32", device="cpu").tokenizer
    tokens = suffix_tokens(tokenizer, template)
    folder = finish_adapter(tmp_path / "a", tiny_base, make_llama(), format="custom", invocation=tokens)
    model = sempa_st.load(folder, dtype="float32", device="cpu", trainable=True)
    moved = train(model, "cached", tmp_path / "run")
    assert moved == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_a_frozen_model_is_not_trained_in_silence(adapter_folder: Path, tmp_path: Path) -> None:
    """A loss with a gradient cache would run to the end and move nothing."""
    model = sempa_st.load(adapter_folder, dtype="float32", device="cpu")
    with pytest.raises(SempaError, match=r"are frozen\. To train it: sempa_st\.load\(\.\.\., trainable=True\)"):
        train(model, "cached", tmp_path)
    assert model.encode(TEXTS).shape == (2, 32)


@pytest.mark.parametrize("options", [{"int8": True}, {"method": "mean"}])
def test_what_is_read_otherwise_is_not_trained(adapter_folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(SempaError, match=r"by a method, or in int8, cannot be trained"):
        sempa_st.load(adapter_folder, dtype="float32", device="cpu", trainable=True, **options)


def test_a_whole_model_is_trainable_as_it_is(tiny_base: Path) -> None:
    model = sempa_st.load(tiny_base, dtype="float32", device="cpu", trainable=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
