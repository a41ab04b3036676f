from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.tiny import make_gemma, make_llama, save_random_adapter
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from sempa_st.errors import SempaError
from sempa_st.model.adapter import attach_adapter, linear_suffixes, lora_config, merged_model
from sempa_st.model.base_model import Base

IDS = torch.tensor([[1, 5, 9, 200, 31, 77]])
LLAMA_LAYERS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def adapter(tmp_path: Path, tiny_base: Path) -> Path:
    return save_random_adapter(tmp_path / "adapter", tiny_base, make_llama())


def test_all_linear_layers_but_the_head_are_adapted() -> None:
    assert linear_suffixes(make_llama()) == LLAMA_LAYERS
    assert linear_suffixes(make_gemma()) == LLAMA_LAYERS
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    assert linear_suffixes(neox) == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    config = lora_config(make_llama())
    assert (config.r, config.lora_alpha, config.task_type) == (8, 32, "CAUSAL_LM")


def test_a_loaded_adapter_is_the_saved_one(adapter: Path) -> None:
    tuned = attach_adapter(make_llama(), adapter, "tiny")
    reference = PeftModel.from_pretrained(make_llama(), adapter)
    with torch.no_grad():
        assert torch.equal(tuned(IDS).logits, reference(IDS).logits)
        assert not torch.allclose(tuned(IDS).logits, make_llama()(IDS).logits)
        with tuned.disable_adapter():
            assert torch.equal(tuned(IDS).logits, make_llama()(IDS).logits)


def test_merging_keeps_the_logits_and_the_head(adapter: Path, tiny_base: Path) -> None:
    tuned = attach_adapter(make_llama(), adapter, "tiny")
    merged = merged_model(Base("tiny", tiny_base), adapter, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(IDS).logits, tuned(IDS).logits, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name, _ in merged.named_parameters())


def test_an_adapter_of_another_base_is_refused(adapter: Path) -> None:
    with pytest.raises(SempaError, match=r"on the base 'wide'.*of another shape.*tiny-llama"):
        attach_adapter(make_llama(hidden=64), adapter, "wide")
    with pytest.raises(SempaError, match=r"unexpected \(first: base_model.model.model.layers.2"):
        attach_adapter(make_llama(layers=2), adapter, "short")
    with pytest.raises(SempaError, match=r"missing \(first: base_model.model.model.layers.3"):
        attach_adapter(make_llama(layers=4), adapter, "tall")


def test_lost_keys_are_noticed(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({name.replace(".self_attn.", "."): tensor for name, tensor in tensors.items()}, weights)
    with pytest.raises(SempaError, match=r"\d+ missing .*\d+ unexpected"):
        attach_adapter(make_llama(), adapter, "tiny")


def test_an_untrained_adapter_is_refused(tmp_path: Path, tiny_base: Path) -> None:
    model = make_llama()
    get_peft_model(model, lora_config(model)).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(SempaError, match="changes nothing"):
        attach_adapter(make_llama(), tmp_path, "tiny")


def test_corrupted_and_pickled_files_are_refused(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(SempaError, match=r"adapter_model.safetensors is corrupted"):
        attach_adapter(make_llama(), adapter, "tiny")
    weights.unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(SempaError, match="never loaded; expected safetensors"):
        attach_adapter(make_llama(), adapter, "tiny")
    broken = shutil.copytree(adapter, tmp_path / "broken")
    (broken / "adapter_model.safetensors").touch()
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(SempaError, match="cannot be read as JSON"):
        attach_adapter(make_llama(), broken, "tiny")


def test_target_modules_are_stored_as_suffixes(adapter: Path) -> None:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert sorted(settings["target_modules"]) == LLAMA_LAYERS
