"""The table of architectures in docs, against what is found on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.architectures import ARCHITECTURES, COLUMNS, INTRODUCTION, TABLE, find, line
from helpers.families import make_causal_lm
from helpers.tiny import make_config, make_tokenizer, save_base

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.model.adapter import linear_suffixes, lora_config
from sempa_st.training.run import train

pytestmark = pytest.mark.names_dtype


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_the_table_says_what_is_found(family: str, tmp_path: Path) -> None:
    assert line(find(family, tmp_path)) in TABLE.read_text(encoding="utf-8").splitlines()


def test_the_table_holds_every_architecture_once() -> None:
    text = TABLE.read_text(encoding="utf-8")
    assert text.startswith(INTRODUCTION)
    rows = text.removeprefix(INTRODUCTION).splitlines()
    assert rows[0] == line(list(COLUMNS))
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows[2:]] == list(ARCHITECTURES.values())


@pytest.mark.parametrize(
    ("family", "layers"),
    [
        ("gpt2", ["c_attn", "c_fc", "c_proj"]),
        ("mamba", ["in_proj"]),
        ("gpt_neo", ["c_fc", "c_proj", "k_proj", "out_proj", "q_proj", "v_proj"]),
    ],
)
def test_linear_layers_of_every_make_are_adapted(family: str, layers: list[str]) -> None:
    model = make_causal_lm(family)
    assert linear_suffixes(model) == layers
    assert lora_config(model).fan_in_fan_out is (family == "gpt2")


@pytest.mark.parametrize("family", ["gpt2", "mamba"])
def test_a_run_from_data_to_vectors(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_causal_lm(family), make_tokenizer())
    record = train(make_config(base, tmp_path / "model", max_triplets=8, objective="contrastive")).record
    assert len(record["training"]) == 2
    assert sempa_st.load(tmp_path / "model", device="cpu", dtype="float32").encode(["A cat."]).shape == (1, 32)


def test_what_hides_its_tokens_from_peft_is_not_activated(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", make_causal_lm("opt"), make_tokenizer())
    train(make_config(base, tmp_path / "model", max_triplets=8, objective="contrastive"))
    with pytest.raises(SempaError, match=r"cannot be activated: the layers of OPTForCausalLM hide from PEFT"):
        copy_model(str(tmp_path / "model"), tmp_path / "activated", activate=True)
    assert not (tmp_path / "activated").exists()
