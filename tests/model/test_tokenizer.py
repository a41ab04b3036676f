"""Padding: a token of its own for it, and on the left for whoever opens a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.families import make_causal_lm
from helpers.tiny import finish_adapter, make_config, make_llama, make_tokenizer, make_tokenizer_of_one, save_base
from peft import AutoPeftModelForCausalLM
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.model.tokenizer import load_tokenizer, padding_side
from sempa_st.training.run import train

pytestmark = pytest.mark.names_dtype

TEXTS = ["A cat sleeps on the", "Why", "Two dogs run over the wet grass after a"]
SENTENCES = ["A cat.", "Two dogs run over the wet grass after a ball.", "Snow"]


@pytest.mark.parametrize("merge", [False, True])
def test_batches_generate_as_single_texts(merge: bool, adapter_folder: Path, tiny_base: Path, tmp_path: Path) -> None:
    """The base pads on the right, which gives a batch other texts than each of its members alone."""
    assert AutoTokenizer.from_pretrained(tiny_base).padding_side == "right"
    folder = copy_model(str(adapter_folder), tmp_path / "merged", merge=True) if merge else adapter_folder
    kind = AutoModelForCausalLM if merge else AutoPeftModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()

    def generate(texts: list[str], **side: str) -> list[str]:
        tokenizer = AutoTokenizer.from_pretrained(folder, **side)
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    single = [generate([text])[0] for text in TEXTS]
    assert generate(TEXTS) == single
    assert generate(TEXTS, padding_side="right") != single


@pytest.mark.parametrize(("rows", "pad"), [(640, "<|pad|>"), (600, "ÿ")])
def test_a_tokenizer_of_one_special_token_gets_a_pad_token(rows: int, pad: str, tmp_path: Path) -> None:
    """A row beyond the vocabulary where there is one; else that of a byte which no text holds."""
    own = make_tokenizer_of_one()
    base = save_base(tmp_path / "base", make_causal_lm("llama", vocab_size=rows), own)
    tokenizer = load_tokenizer(base)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (pad, "<|endoftext|>")
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id}) == 2
    assert tokenizer.pad_token_id < rows
    assert [tokenizer(text)["input_ids"] for text in SENTENCES] == [own(text)["input_ids"] for text in SENTENCES]

    train(make_config(base, tmp_path / "model", max_triplets=8, objective="dpo"))
    ours = sempa_st.load(tmp_path / "model", dtype="float32", device="cpu")
    expected = np.concatenate([ours.encode([text]) for text in SENTENCES])
    for model in (ours, SentenceTransformer(str(tmp_path / "model"), device="cpu")):
        np.testing.assert_allclose(model.encode(SENTENCES), expected, rtol=0, atol=1e-5)
    tuned = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert torch.equal(tuned.get_input_embeddings().weight, before.get_input_embeddings().weight)


def test_one_without_any_row_to_pad_with_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer_of_one()
    tokenizer.add_tokens(["ÿ"])  # the text of this letter is then that token
    base = save_base(tmp_path / "base", make_llama(), tokenizer)
    with pytest.raises(SempaError, match="no token other than EOS to pad with, and the embedding matrix no row beyond"):
        load_tokenizer(base)


def test_a_folder_keeps_its_side(tiny_base: Path, tmp_path: Path) -> None:
    folder = finish_adapter(tmp_path / "model", tiny_base, make_llama(), format="custom")
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again").padding_side == "left"


def test_a_folder_with_learned_positions_pads_right(tmp_path: Path) -> None:
    """Plain sentence-transformers would count the positions of a sentence from the padding on its left."""
    folder = finish_adapter(
        tmp_path / "model",
        save_base(tmp_path / "base", make_causal_lm("gpt2"), make_tokenizer()),
        make_causal_lm("gpt2"),
    )
    assert AutoTokenizer.from_pretrained(folder).padding_side == "right"
    plain = SentenceTransformer(str(folder), device="cpu")
    single = np.concatenate([plain.encode([text]) for text in SENTENCES])
    np.testing.assert_allclose(plain.encode(SENTENCES), single, rtol=0, atol=1e-5)
    plain.tokenizer.padding_side = "left"
    assert abs(plain.encode(SENTENCES) - single).max() > 1e-3


@pytest.mark.parametrize("family", ["llama", "bloom", "falcon", "gptj", "mamba", "phi"])
def test_other_positions_leave_the_side_to_generation(family: str) -> None:
    assert padding_side(AutoConfig.for_model(family)) == "left"
