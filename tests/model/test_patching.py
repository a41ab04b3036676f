"""What our patches rely on in other libraries: each test fails when the library changes underneath."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from types import FunctionType
from typing import Any

import gguf
import lm_eval.api.task
import pytest
import torch
import trl.trainer.utils
from helpers.tiny import add_random_adapter, make_llama, make_tokenizer
from peft.tuners.lora import LoraModel
from peft.tuners.lora.variants import ALoraLinearVariant
from torch import nn
from transformers import AutoTokenizer, modeling_gguf_pytorch_utils

import sempa_st
from sempa_st.model.patching import (
    EVERY_TOKEN,
    OVERRIDDEN,
    alora_acting_on,
    attention_implementation,
    completion_tokens_only,
    edited,
    gguf_parsed_once,
    linear_int8,
    pack_int8,
    patch_alora,
    replaced,
    tokenizer_as_saved,
    unpack_int8,
    without_harness_bars,
)

pytestmark = pytest.mark.names_dtype

IDS = torch.tensor([[1, 7, 30, 8, 12]])


def parameters(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_a_base_class_still_has_the_method_that_is_overridden(name: str) -> None:
    kind, _, method = name.rpartition(".")
    module, _, kind = kind.rpartition(".")
    assert parameters(getattr(getattr(import_module(module), kind), method)) == list(OVERRIDDEN[name])


def test_no_other_private_method_is_overridden() -> None:
    names = [module.name for module in walk_packages(sempa_st.__path__, "sempa_st.")]
    classes = {
        kind
        for name in names
        if not name.endswith("__main__")
        for kind in vars(import_module(name)).values()
        if isinstance(kind, type) and kind.__module__.startswith("sempa_st.")
    }
    found = {
        name
        for kind in classes
        for name, value in vars(kind).items()
        if name.startswith("_") and not name.startswith("__") and isinstance(value, FunctionType | classmethod)
        if any(name in vars(base) for base in kind.__mro__[1:] if not base.__module__.startswith("sempa_st."))
    }
    assert found == {name.rpartition(".")[2] for name in OVERRIDDEN}


def test_edits_change_arguments_and_output_and_end_with_the_block() -> None:
    module = nn.Identity()
    with edited(module, before=lambda args, kwargs: ((args[0] + 1,), kwargs), after=lambda output: output * 10):
        with edited(module, after=lambda output: output + 5):
            assert module(torch.tensor(1)) == 25
        assert module(torch.tensor(1)) == 20
    assert module(torch.tensor(1)) == 1
    assert len(module._forward_hooks) == len(module._forward_pre_hooks) == 1


def test_peft_asks_the_methods_that_are_patched() -> None:
    assert "alora_offsets" in inspect.getsource(LoraModel._enable_peft_forward_hooks)
    assert parameters(ALoraLinearVariant.forward)[:4] == ["module", "active_adapter", "x", "result"]
    model = add_random_adapter(make_llama(), invocation=[30, 8]).eval()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert type(layer.lora_variant["default"]) is ALoraLinearVariant
    for by_adapter in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.scaling):
        assert list(by_adapter.keys()) == ["default"]
    with torch.no_grad():
        hooks: list[int] = []
        layer.register_forward_hook(lambda layer, *_: hooks.append(len(layer._forward_pre_hooks)))
        by_peft, decoder = model(input_ids=IDS).logits, model.get_base_model().model
        patch_alora(model)
        assert torch.equal(model(input_ids=IDS).logits, by_peft)
        assert hooks == [1, 0]  # PEFT's way, and ours
        head, told = model.get_output_embeddings(), {}
        for name, tokens in {"last three": [3], "all": EVERY_TOKEN, "none": [0]}.items():
            with alora_acting_on(tokens):
                told[name] = head(decoder(input_ids=IDS).last_hidden_state)
        with model.disable_adapter():
            base = model(input_ids=IDS).logits
    # PEFT finds the invocation tokens third from the end, and acts from there.
    found = torch.tensor([torch.allclose(states, by_peft, atol=1e-5) for states in told.values()])
    assert found.tolist() == [True, False, False]
    torch.testing.assert_close(told["none"], base)


def test_attention_is_told_by_the_config() -> None:
    model = make_llama()
    assert attention_implementation(model.config) == "sdpa"
    model.set_attn_implementation("eager")
    assert attention_implementation(model.config) == attention_implementation(model.config.get_text_config()) == "eager"


def test_an_attribute_is_replaced_and_is_again_what_it_was() -> None:
    plain, with_own = nn.Identity(), nn.Identity()
    with_own.forward = abs
    for owner, name in ((plain, "forward"), (with_own, "forward"), (trl.trainer.utils, "selective_log_softmax")):
        before, own = getattr(owner, name), vars(owner).get(name)
        with pytest.raises(KeyError), replaced(owner, name, lambda value: [value]):
            with replaced(owner, name, lambda value: [value]):
                assert getattr(owner, name) == [[before]]
            assert getattr(owner, name) == [before]
            raise KeyError
        assert getattr(owner, name) == before
        assert vars(owner).get(name) == own


def test_trl_asks_the_function_that_is_replaced() -> None:
    original = trl.trainer.utils._use_triton
    assert parameters(original) == ["device"]
    source = inspect.getsource(trl.trainer.utils)
    assert "compact = _use_triton(hidden_states.device)" in source
    assert "hidden_states[mask] if compact" in source
    assert not original(torch.device("cpu"))
    with completion_tokens_only():
        assert trl.trainer.utils._use_triton(torch.device("cpu"))
    assert trl.trainer.utils._use_triton is original


def test_a_gguf_file_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # Imported from the package when it is called, so that replacing the name there has an effect.
    assert "from gguf import GGUFReader" in inspect.getsource(modeling_gguf_pytorch_utils.load_gguf_checkpoint)
    paths: list[str] = []
    monkeypatch.setattr(gguf, "GGUFReader", lambda path: paths.append(path) or object())
    with gguf_parsed_once():
        assert gguf.GGUFReader("a") is gguf.GGUFReader("a")
    assert paths == ["a"]
    assert gguf.GGUFReader("a") is not gguf.GGUFReader("a")


def test_the_harness_asks_for_the_bar_that_is_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    assert "tqdm" in lm_eval.api.task.Task.build_all_requests.__code__.co_names
    original = lm_eval.api.task.tqdm
    with without_harness_bars():
        assert list(lm_eval.api.task.tqdm([1, 2], total=2)) == [1, 2]
    assert capsys.readouterr().err == ""
    assert lm_eval.api.task.tqdm is original


def test_a_tokenizer_is_read_as_it_was_saved(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    found = tokenizer_as_saved(tmp_path, "GemmaTokenizer")
    assert type(found).__name__ == "GemmaTokenizer"
    assert found("A cat sleeps.")["input_ids"] == plain("A cat sleeps.")["input_ids"]
    assert found.added_tokens_decoder.keys() == plain.added_tokens_decoder.keys()
    for other in ("GPT2TokenizerWithout", "BertJapaneseTokenizer", "PreTrainedTokenizerFast"):
        assert tokenizer_as_saved(tmp_path, other) is None


def test_int8_weights_survive_packing_and_products_are_close() -> None:
    torch.manual_seed(0)
    weight, states = torch.randn(8, 16), torch.randn(3, 16)
    scales = weight.abs().amax(1).double() / 127
    packed = pack_int8(weight, scales)
    integers, found = unpack_int8(packed)
    torch.testing.assert_close(found, scales)
    assert torch.equal(integers, (weight / scales[:, None].float()).round().to(torch.int8))
    exact = states @ weight.T
    assert 0 < float((linear_int8(states, packed) - exact).norm() / exact.norm()) < 0.02
