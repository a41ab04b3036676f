"""Tokenizers with token ids outside the embedding matrix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import finish_adapter, make_config, make_llama, make_tokenizer, save_base
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.model.tokenizer import load_tokenizer
from sempa_st.utils.files import read_json

ROWS = 600
SENTENCES = ["A cat sleeps.", "A much longer sentence, so that the first one is padded."]


def base_with(folder: Path, **special: str) -> Path:
    """Save a base whose tokenizer has added special tokens with ids from 600, outside the matrix."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(special)
    return save_base(folder, make_llama(), tokenizer)


def test_a_pad_token_beyond_the_matrix_gives_way_to_a_spare_one(tmp_path: Path) -> None:
    base = base_with(tmp_path / "base", pad_token="[PAD]")
    assert AutoTokenizer.from_pretrained(base).pad_token_id == ROWS
    assert load_tokenizer(base).pad_token == "<pad>"
    expected = sempa_st.load(
        save_base(tmp_path / "sound", make_llama(), make_tokenizer()), dtype="float32", device="cpu"
    )
    loaded = sempa_st.load(base, dtype="float32", device="cpu").encode(SENTENCES)
    assert loaded == pytest.approx(expected.encode(SENTENCES), abs=1e-5)
    copied = copy_model(str(base), tmp_path / "copied")
    assert SentenceTransformer(str(copied), device="cpu").encode(SENTENCES) == pytest.approx(loaded, abs=1e-4)


def test_a_trained_folder_pads_with_it_too(tmp_path: Path) -> None:
    from sempa_st.training.run import train

    base = base_with(tmp_path / "base", pad_token="[PAD]")
    train(make_config(base, tmp_path / "trained", max_triplets=8))
    native = SentenceTransformer(str(tmp_path / "trained"), device="cpu")
    assert native.tokenizer.pad_token_id < ROWS
    assert native.encode(SENTENCES).shape == (2, 32)


def test_an_adapter_folder_is_held_against_its_base(tmp_path: Path) -> None:
    """An adapter folder has no ``config.json`` with the size of the matrix."""
    base = save_base(tmp_path / "base", make_llama(), make_tokenizer())
    folder = finish_adapter(tmp_path / "sempa", base, make_llama())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    assert sempa_st.load(folder, dtype="float32", device="cpu")[0].tokenizer.pad_token_id < ROWS
    copied = copy_model(str(folder), tmp_path / "copied")
    assert SentenceTransformer(str(copied), device="cpu").encode(SENTENCES).shape == (2, 32)


@pytest.mark.parametrize("token", ["bos_token", "eos_token", "plain"])
@pytest.mark.parametrize("route", ["load", "train", "copy"])
def test_another_token_beyond_it_is_refused(tmp_path: Path, token: str, route: str) -> None:
    from sempa_st.training.run import train

    if token == "plain":
        tokenizer = make_tokenizer()
        tokenizer.add_tokens(["kitten"])
        base = save_base(tmp_path / "base", make_llama(), tokenizer)
    else:
        base = base_with(tmp_path / "base", **{token: "<new>"})
    routes: dict[str, Callable[[], Any]] = {
        "load": lambda: sempa_st.load(base, dtype="float32", device="cpu"),
        "train": lambda: train(make_config(base, tmp_path / "out")),
        "copy": lambda: copy_model(str(base), tmp_path / "out"),
    }
    with pytest.raises(SempaError, match=r"does not fit the model: '(<new>|kitten)' is 600, and .* has 600 rows"):
        routes[route]()
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_another_model_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "config.json").write_text(json.dumps({**read_json(base / "config.json"), "vocab_size": 500}))
    with pytest.raises(SempaError, match="it has 600 tokens, and the embedding matrix has 500 rows"):
        load_tokenizer(base)


def test_a_special_token_that_no_text_needs_may_lie_beyond(tmp_path: Path) -> None:
    """Like the image token of Gemma 3 in its text-only decoders."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    base = save_base(tmp_path / "base", make_llama(), tokenizer)
    assert max(load_tokenizer(base).added_tokens_decoder) == ROWS


@pytest.mark.parametrize(
    "settings", [{"objective": "dpo"}, {"objective": "listwise"}, {"objective": "contrastive", "kl": 1.0}], ids=str
)
def test_a_text_may_spell_it_out(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Training on it goes on with the unknown token in its place, as embedding does."""
    from sempa_st.training.run import train

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    base = save_base(tmp_path / "base", make_llama(), tokenizer)
    rows = [[f"An <image> of {what}.", f"A picture <image> of {what}.", f"No <image>, {what}."] for what in "abcdefgh"]
    lines = ["sent0,sent1,hard_neg", *(",".join(f'"{text}"' for text in row) for row in rows)]
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    train(make_config(base, tmp_path / "trained", data=str(tmp_path / "data.csv"), **settings))
    assert (tmp_path / "trained" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("pieces", "ids", "steps", "made"),
    [
        ("<x> $A <x>", 60, 1, 121),
        ("$A <x>", 90, 2, 181),
        ("$A $A", 1, 7, 128),
        ("$A $A <x>", 1, 1, None),
        ("<x> $A", 99, 1, None),
    ],
)
def test_a_post_processor_that_makes_much_of_little_is_refused(
    pieces: str, ids: int, steps: int, made: int | None, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", make_llama(), make_tokenizer())
    content = read_json(base / "tokenizer.json")
    parts: dict[str, Any] = {
        "<x>": {"SpecialToken": {"id": "<x>", "type_id": 0}},
        "$A": {"Sequence": {"id": "A", "type_id": 0}},
    }
    template = {
        "type": "TemplateProcessing",
        "single": [parts[piece] for piece in pieces.split()],
        "pair": [],
        "special_tokens": {"<x>": {"id": "<x>", "ids": [5] * ids, "tokens": ["a"] * ids}},
    }
    content["post_processor"] = {"type": "Sequence", "processors": [template] * steps}
    (base / "tokenizer.json").write_text(json.dumps(content))
    if made is None:
        assert len(load_tokenizer(base)("a")["input_ids"]) <= 200
    else:
        with pytest.raises(
            SempaError, match=f"post-processor makes {made} tokens or more of one. Expected at most 100"
        ):
            load_tokenizer(base)


@pytest.mark.parametrize("count", [1, 2])
def test_a_tokenizer_that_lets_texts_swell_is_refused(count: int, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_llama(), make_tokenizer())
    content = read_json(base / "tokenizer.json")
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50} for _ in range(count)]
    content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "_"}, *steps]}
    (base / "tokenizer.json").write_text(json.dumps(content))
    if count == 1:
        assert len(load_tokenizer(base)("a")["input_ids"]) > 10
    else:
        with pytest.raises(SempaError, match="replaces one character by up to 2500"):
            load_tokenizer(base)
