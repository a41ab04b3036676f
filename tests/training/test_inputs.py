"""What a run starts with: what belongs to it, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import make_llama, make_tokenizer, save_base

from sempa_st.errors import SempaError
from sempa_st.training.config import TrainConfig
from sempa_st.training.inputs import load_inputs

pytestmark = pytest.mark.names_dtype


def test_a_run_goes_on_with_the_same_base_and_dev_pairs_only(tiny_base: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    dev = tmp_path / "dev.csv"
    dev.write_text("sentence1,sentence2,score\nA cat.,A dog.,1\nA cat.,A cat sat.,4\n")
    settings: dict[str, Any] = {"base": str(base), "data": "sample", "dev": str(dev), "output": str(tmp_path / "model")}

    def identity() -> dict[str, Any]:
        return load_inputs(TrainConfig(**settings, max_triplets=4, dtype="float32"), "cpu").identity

    first = identity()
    assert identity() == first
    dev.write_text("sentence1,sentence2,score\nA cat.,A dog.,4\nA cat.,A cat sat.,1\n")
    assert {name for name, value in identity().items() if first[name] != value} == {"dev_sha256"}
    save_base(base, make_llama(seed=3), make_tokenizer())
    assert {name for name, value in identity().items() if first[name] != value} == {"dev_sha256", "base_sha256"}


def test_answers_in_plain_text_need_an_end(tiny_base: Path, tmp_path: Path) -> None:
    """They would end with the word "None"."""
    tokenizer = make_tokenizer(chat=None)
    tokenizer.eos_token = None
    base = save_base(tmp_path / "base", make_llama(), tokenizer)
    config = TrainConfig(base=str(base), data="sample", dev="sample", output=str(tmp_path / "model"), max_triplets=4)
    with pytest.raises(SempaError, match="has no end-of-sequence token"):
        load_inputs(replace(config, dtype="float32"), "cpu")
