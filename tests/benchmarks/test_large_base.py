"""The program that measures large bases, on a tiny one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.rows import write_rows
from helpers.tiny import make_llama, make_tokenizer, save_base

from benchmarks import large_base
from sempa_st.data.nli import load_nli

pytestmark = pytest.mark.names_dtype


@pytest.mark.parametrize("config", ["llama3-8b", "llama3-8b-contrastive"])
def test_a_step_an_encoding_and_the_whole_run(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nli").mkdir()
    rows = [{"sent0": t.premise, "sent1": t.entailed, "hard_neg": t.contradicted} for t in load_nli("sample").triplets]
    write_rows(tmp_path / "nli" / "triplets.parquet", rows)
    tokenizer = save_base(tmp_path / "tokenizer", make_llama(), make_tokenizer())
    output = tmp_path / "figures.json"
    words = f"x --shape tiny --config {config} --tokenizer {tokenizer} --device cpu --data-dir {tmp_path} --steps 3"
    monkeypatch.setattr(sys, "argv", f"{words} --batch-size 4 --sentences 16 --output {output}".split())
    large_base.main()
    found = json.loads(output.read_text())
    training = found["training"]
    assert training["objective"] == ("contrastive" if "contrastive" in config else "dpo")
    assert (training["reference seconds a triplet"] > 0) == (training["objective"] == "dpo")
    assert training["triplets a step"] == 4
    assert found["encoding"]["sentences"] == 16
    assert min(training["peak GiB"], found["encoding"]["sentences a second"], training["seconds a triplet"]) > 0
    seconds = training["seconds a triplet"] + training["reference seconds a triplet"]
    assert found["run"]["hours"] == pytest.approx(275_601 * seconds / 4 / 3600)


def test_the_shape_is_that_of_llama_3() -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**large_base.SHAPES["llama3-8b"]))
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_030_261_248
