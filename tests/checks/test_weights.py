"""Checkpoints with missing or unexpected tensors: they are refused, and never completed with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.families import make_causal_lm
from helpers.tiny import finish_adapter, make_llama, make_tokenizer, save_base
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model
from sempa_st.model.base_model import load_causal_lm, load_config

pytestmark = pytest.mark.names_dtype

TEXTS = ["A cat sleeps.", "Why?"]


def load(folder: Path, **options: Any) -> Any:
    return sempa_st.load(folder, **{"dtype": "float32", "device": "cpu", **options})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", make_llama(), make_tokenizer())


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 4}, r"9 missing \(model\.layers\.3\.input_layernorm\.weight, .*, \.\.\.\)\."),
        ({"num_hidden_layers": 2}, r"9 left over \(model\.layers\.2\.input_layernorm\.weight, "),
        ({"vocab_size": 700}, r"2 of another size \(lm_head\.weight, model\.embed_tokens\.weight\)\."),
        ({"attention_bias": True}, r"12 missing \(model\.layers\.0\.self_attn\.k_proj\.bias, "),
    ],
)
def test_a_foreign_checkpoint_is_refused(base: Path, change: dict[str, Any], message: str) -> None:
    native = copy_model(str(base), base.parent / "native")
    for folder in (base, native):
        change_config(folder, **change)
        with pytest.raises(SempaError, match=f"^The weights in .*LlamaForCausalLM.*{message}"):
            load(folder)
    with pytest.raises(SempaError, match=r"^The weights in .*LlamaModel"):
        load(native, reader="native")


@pytest.mark.parametrize(
    "change", [{"vocab_size": 4_000_000}, {"intermediate_size": 1_000_000}, {"num_hidden_layers": 200}]
)
def test_no_memory_is_taken_for_weights_that_are_not_there(
    base: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was made")

    change_config(base, **change)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(SempaError, match=r"one that has [\d,]+ weights, and the \.safetensors files have room for"):
        load_causal_lm(base, torch.float32)


@pytest.mark.parametrize("key", ["text_config", "decoder"])
def test_settings_inside_that_the_type_does_not_read_are_refused(base: Path, key: str) -> None:
    change_config(base, **{key: {"hidden_size": 8}})
    for read in (load_config, load):
        with pytest.raises(SempaError, match=r"a text model inside \({'hidden_size': 8}\), and the type llama has"):
            read(base)


def test_what_lies_beside_the_layers_is_left_alone(base: Path) -> None:
    expected = load(base).encode(TEXTS)
    change_weights(base, lambda tensors: tensors.update({"v_head.weight": torch.ones(3)}))
    np.testing.assert_array_equal(load(base).encode(TEXTS), expected)


BUFFERS = {
    "gpt2": ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
    "gpt_neo": ["transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"],
    "gptj": ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"],
    "codegen": ["transformer.h.0.attn.causal_mask"],
    "gpt_neox": [f"gpt_neox.layers.0.attention.{name}" for name in ("bias", "masked_bias", "rotary_emb.inv_freq")],
    "falcon": ["transformer.h.0.self_attention.rotary_emb.inv_freq"],
    "llama": ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "model.inv_freq"],
    "opt": ["model.decoder.position_ids"],
}
"""Buffers that old versions of transformers saved, by model type."""


@pytest.mark.parametrize("family", BUFFERS)
def test_buffers_that_old_versions_saved_are_left_alone_and_parameters_are_not(tmp_path: Path, family: str) -> None:
    base = save_base(tmp_path / "base", make_causal_lm(family, vocab_size=600), make_tokenizer())
    expected = load_causal_lm(base, torch.float32).state_dict()
    change_weights(base, lambda tensors: tensors.update({name: torch.zeros(2) for name in BUFFERS[family]}))
    read = load_causal_lm(base, torch.float32).state_dict()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())
    layer = BUFFERS[family][0].rsplit(".", 1)[0]
    change_weights(base, lambda tensors: tensors.update({f"{layer}.of_its_own.bias": torch.zeros(2)}))
    with pytest.raises(SempaError, match=r"1 left over \(.*of_its_own\.bias\)"):
        load_causal_lm(base, torch.float32)


@pytest.mark.parametrize("name", ["c_attn.bias", "c_proj.bias", "o_proj.inv_freq_scale"])
def test_a_parameter_is_not_taken_for_a_buffer(base: Path, name: str) -> None:
    change_weights(base, lambda tensors: tensors.update({f"model.layers.0.self_attn.{name}": torch.zeros(2)}))
    with pytest.raises(SempaError, match=rf"1 left over \(.*{name}\)"):
        load_causal_lm(base, torch.float32)


def test_an_encoder_with_missing_layers_is_refused(tmp_path: Path) -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    save_base(tmp_path / "bert", BertForMaskedLM(BertConfig(vocab_size=600, **small)), make_tokenizer())
    assert load(tmp_path / "bert", method="bert-avg").encode(TEXTS).shape == (2, 16)
    change_config(tmp_path / "bert", num_hidden_layers=2)
    with pytest.raises(SempaError, match=r"16 missing \(encoder\.layer\.1\."):
        load(tmp_path / "bert", method="bert-avg")


def test_a_model_that_plain_readers_saved_without_its_head_embeds_and_does_not_generate(
    adapter_folder: Path, tmp_path: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    merged = copy_model(str(adapter_folder), tmp_path / "merged", merge=True)
    headless = tmp_path / "headless"
    SentenceTransformer(str(merged), device="cpu").save_pretrained(str(headless))
    model = load(headless)
    np.testing.assert_allclose(model.encode(TEXTS), load(merged).encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(load(headless, method="mean").encode(TEXTS), load(merged, method="mean").encode(TEXTS))
    for use in (
        lambda: model[0].model.generate(torch.tensor([[1, 5]]), max_new_tokens=2),
        lambda: load_causal_lm(headless, torch.float32),
        lambda: copy_model(str(headless), tmp_path / "copy"),
    ):
        with pytest.raises(SempaError, match=r"^The weights in .*headless hold .* no LM head[^\n]*$"):
            use()
    assert not (tmp_path / "copy").exists()
    model.save_pretrained(str(tmp_path / "again"))
    np.testing.assert_allclose(load(tmp_path / "again").encode(TEXTS), model.encode(TEXTS), atol=1e-6)


def test_an_adapter_that_plain_readers_saved_is_read_and_mended(adapter_folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    SentenceTransformer(str(adapter_folder), device="cpu").save_pretrained(str(saved))
    names = load_file(saved / "adapter_model.safetensors")
    assert not any(".model.model." in name for name in names)
    expected = load(adapter_folder).encode(TEXTS)
    np.testing.assert_array_equal(load(saved).encode(TEXTS), expected)
    np.testing.assert_allclose(load(saved, reader="native").encode(TEXTS), expected, atol=1e-4)
    for format in ("native", "custom"):
        mended = copy_model(str(saved), tmp_path / format, format=format)
        assert (
            load_file(mended / "adapter_model.safetensors").keys()
            == load_file(adapter_folder / "adapter_model.safetensors").keys()
        )
        np.testing.assert_array_equal(load(mended).encode(TEXTS), expected)
        plain = SentenceTransformer(str(mended), device="cpu", trust_remote_code=format == "custom")
        np.testing.assert_allclose(plain.encode(TEXTS), expected, atol=1e-4)
        tuned, kept = (AutoPeftModelForCausalLM.from_pretrained(folder) for folder in (mended, adapter_folder))
        ids = torch.tensor([[1, 9, 200, 31]])
        assert torch.equal(tuned(ids).logits, kept(ids).logits)
    activated = copy_model(str(saved), tmp_path / "activated", activate=True)
    np.testing.assert_allclose(load(activated).encode(TEXTS), expected, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_named(base: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    change_weights(base, spoil)
    with pytest.raises(SempaError, match=r"1 value\(s\) .* in the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(base)


def test_weights_that_float16_cannot_hold_are_named(base: Path) -> None:
    change_weights(base, lambda tensors: tensors["model.norm.weight"].fill_(1e5))
    with pytest.raises(SempaError, match=r"model\.norm\.weight \(read as float16\).*choose --dtype float32"):
        load(base, dtype="float16")
    assert np.isfinite(load(base).encode(TEXTS)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["lora_A", "lora_B"])
def test_an_adapter_that_holds_no_number_is_refused(tiny_base: Path, tmp_path: Path, place: str, value: float) -> None:
    folder = finish_adapter(tmp_path / "model", tiny_base, make_llama())
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = f"base_model.model.model.layers.0.mlp.up_proj.{place}.weight"
    tensors[name][0, 0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    for use in (lambda: load(folder), lambda: copy_model(str(folder), tmp_path / "copy")):
        with pytest.raises(SempaError, match=rf"infinite or NaN values \(first: {name}"):
            use()
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_quantised_bases_say_what_they_need(base: Path, method: str) -> None:
    change_config(base, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(SempaError, match=r"^The model in .* quantised[^\n]*$"):
        load(base)
