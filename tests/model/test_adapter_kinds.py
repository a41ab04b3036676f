"""Copies of all kinds of PEFT adapters: every reader returns the source's vectors, or the copy is refused."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny import make_tokenizer, save_base
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.averaging import average_models
from sempa_st.folder.copying import copy_model
from sempa_st.folder.write import write_embedding_files
from sempa_st.model.adapter import linear_suffixes, lora_config
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template, load_tokenizer

pytestmark = pytest.mark.names_dtype

TEXTS = ["A cat sleeps.", "Why?"]
OTHER_TEXT = "The best thing about rain is that"
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
}
NATIVE, CUSTOM, MERGED, ACTIVATED, SCALED = "native", "custom", "merged", "activated", "scaled"
ALL = {NATIVE, CUSTOM, MERGED, ACTIVATED, SCALED}
# Base, settings, and the copies that are refused; all other copies must be equivalent.
KINDS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "plain": ("plain", {}, set()),
    "dora": ("plain", {"use_dora": True}, {NATIVE, ACTIVATED, SCALED}),
    "rslora": ("plain", {"use_rslora": True}, set()),
    "rank_pattern": ("plain", {"rank_pattern": {"q_proj": 2, "layers.0.mlp.up_proj": 3}}, set()),
    "rank_pattern by path": ("plain", {"rank_pattern": {"model.layers.0.self_attn.q_proj": 2}}, set()),
    "alpha_pattern": ("plain", {"alpha_pattern": {"model.layers.1.mlp.up_proj": 2}}, set()),
    "a saved norm": ("plain", {"modules_to_save": ["norm"]}, {ACTIVATED, SCALED}),
    "a saved embedding": ("plain", {"modules_to_save": ["embed_tokens"]}, {ACTIVATED, SCALED}),
    "a saved head": ("plain", {"modules_to_save": ["lm_head"]}, {ACTIVATED, SCALED}),
    "a saved tied embedding": ("tied", {"modules_to_save": ["embed_tokens"]}, {ACTIVATED, SCALED}),
    "embed_tokens": ("plain", {"target_modules": ["q_proj", "embed_tokens"]}, {ACTIVATED}),
    "embed_tokens alone": ("plain", {"target_modules": ["embed_tokens"]}, {ACTIVATED}),
    "tied embed_tokens": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}, {MERGED, ACTIVATED}),
    "lm_head": ("plain", {"target_modules": ["q_proj", "lm_head"]}, set()),
    "tied lm_head": ("tied", {"target_modules": ["q_proj", "lm_head"]}, {MERGED}),
    "tokens": ("plain", {"trainable_token_indices": [5, 6, 7]}, {ACTIVATED, SCALED}),
    "bias": ("biased", {"bias": "all"}, {ACTIVATED, SCALED}),
    "lora_bias": ("biased", {"lora_bias": True}, {ACTIVATED}),
    "lora_bias without a bias": ("plain", {"lora_bias": True}, {MERGED, ACTIVATED}),
    "some layers": ("plain", {"layers_to_transform": [1]}, set()),
    "paths": ("plain", {"target_modules": ["model.layers.0.self_attn.q_proj"]}, set()),
    "a pattern": ("plain", {"target_modules": r".*\.(q|v)_proj"}, set()),
    "a pattern with the head's names": ("plain", {"target_modules": r"model\.layers\..*\.q_proj"}, {NATIVE}),
    "all-linear": ("plain", {"target_modules": "all-linear"}, set()),
    "parameters": ("plain", {"target_parameters": ["q_proj.weight"], "target_modules": ["v_proj"]}, {ACTIVATED}),
    "pissa": ("plain", {"init_lora_weights": "pissa"}, {ACTIVATED, SCALED}),
}


def make_base_model(base: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=600, initializer_range=0.2, max_position_embeddings=512, **sizes, **BASES[base])
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: save_base(root / name, make_base_model(name), tokenizer()) for name in BASES}


def save_adapter(folder: Path, base: Path, model: Any, settings: dict[str, Any], **saving: Any) -> Any:
    """Write a custom folder with an adapter with random tensors, and return the model in memory."""
    torch.manual_seed(3)
    plain = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": linear_suffixes(model)}
    tuned = get_peft_model(model, LoraConfig(**{**plain, **settings}))
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad and "magnitude" in name:
            parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
        elif parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
    tuned.save_pretrained(folder, **{"save_embedding_layers": False, **saving})
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    own = load_tokenizer(base)
    install_template(own, EMBEDDING_TEMPLATES["prompteol"])
    write_embedding_files(folder, own, template="prompteol", max_seq_length=160, config=model.config, format="custom")
    return tuned.eval()


@cache
def tokenizer() -> Any:
    return make_tokenizer()


def outputs(model: Any, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the last hidden state (hidden,), of norm 1, and the logits (seq_len, vocab_size) of a model."""
    with torch.no_grad():
        found = model(**tokenizer()(text, return_tensors="pt"), output_hidden_states=True)
    return normalize(found.hidden_states[-1][0, -1], dim=0).numpy(), found.logits[0].numpy()


def under_template(model: Any) -> np.ndarray:
    return np.stack([outputs(model, EMBEDDING_TEMPLATES["prompteol"].text(text))[0] for text in TEXTS])


def generator(folder: Path) -> Any:
    kind: Any = AutoPeftModelForCausalLM if (folder / "adapter_config.json").is_file() else AutoModelForCausalLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def by_plain_readers(folder: Path, copy: str) -> list[np.ndarray]:
    """Return the vectors by plain sentence-transformers, and by transformers or PEFT."""
    embedder = SentenceTransformer(str(folder), device="cpu", trust_remote_code=copy in (CUSTOM, ACTIVATED))
    return [embedder.encode(TEXTS), under_template(generator(folder))]


def by_ours(folder: Path) -> np.ndarray:
    vectors: np.ndarray = sempa_st.load(folder, dtype="float32", device="cpu").encode(TEXTS)
    return vectors


ARGUMENTS: dict[str, dict[str, Any]] = {
    NATIVE: {"format": "native"},
    CUSTOM: {"format": "custom"},
    MERGED: {"merge": True, "format": "native"},
    ACTIVATED: {"activate": True},
    SCALED: {"scale": 0.5, "format": "custom"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_right_or_refused(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, settings, refused = KINDS[kind]
    live = save_adapter(tmp_path / "source", bases[base], make_base_model(base), settings)
    expected = under_template(live)
    ordinary = outputs(live, OTHER_TEXT)[1]
    assert abs(expected - under_template(make_base_model(base))).max() > 0.02 or kind == "a saved head"
    np.testing.assert_allclose(by_ours(tmp_path / "source"), expected, atol=1e-4)
    for copy, arguments in ARGUMENTS.items():
        folder = tmp_path / copy
        if copy in refused:
            with pytest.raises(SempaError, match=r"^The adapter (of|in) .*cannot (have|be) [^\n]*$"):
                copy_model(str(tmp_path / "source"), folder, **arguments)
            assert not folder.exists()
            continue
        copy_model(str(tmp_path / "source"), folder, **arguments)
        if copy == SCALED:
            np.testing.assert_allclose(by_ours(folder), scaled(live, 0.5), atol=1e-4)
            continue
        for vectors in by_plain_readers(folder, copy):
            np.testing.assert_allclose(vectors, expected, atol=1e-4, err_msg=copy)
        logits = outputs(generator(folder), OTHER_TEXT)[1]
        if copy == ACTIVATED:
            assert np.array_equal(logits, outputs(make_base_model(base), OTHER_TEXT)[1])
        else:
            np.testing.assert_allclose(logits, ordinary, atol=1e-3, err_msg=copy)
    check_mean(tmp_path / "source", tmp_path / "mean", expected)


def check_mean(source: Path, folder: Path, expected: np.ndarray) -> None:
    """Assert that the mean of an adapter with itself is that adapter, or is refused."""
    try:
        average_models([str(source)] * 2, folder)
    except SempaError as error:
        assert re.fullmatch(r"The adapter of .* cannot be averaged\. Expected .*", str(error))
        assert not folder.exists()
        return
    np.testing.assert_allclose(by_ours(folder), expected, atol=1e-4)


def scaled(live: Any, scale: float) -> np.ndarray:
    """Return the vectors with all B matrices scaled."""
    for name, parameter in live.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data *= scale
    return under_template(live)


def test_an_embedding_that_peft_saved_beside_its_update_is_the_bases(bases: dict[str, Path], tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj", "embed_tokens"]}
    folder = tmp_path / "source"
    live = save_adapter(folder, bases["plain"], make_base_model("plain"), settings, save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.base_layer.weight" in load_file(folder / "adapter_model.safetensors")
    for copy in (NATIVE, CUSTOM, MERGED):
        copy_model(str(folder), tmp_path / copy, **ARGUMENTS[copy])
        for vectors in by_plain_readers(tmp_path / copy, copy):
            np.testing.assert_allclose(vectors, under_template(live), atol=1e-4)
    other = save_base(tmp_path / "other", make_base_model("biased"), tokenizer())
    changed = LlamaForCausalLM.from_pretrained(other)
    changed.get_input_embeddings().weight.data += 1
    changed.save_pretrained(other)
    with pytest.raises(SempaError, match="It carries another embedding than the base has"):
        sempa_st.load(folder, base=str(other), dtype="float32")


def test_plain_readers_find_adapters_on_some_layers(bases: dict[str, Path], tmp_path: Path) -> None:
    """Adapters as `--lora-layers` trains them, directly in the native format."""
    model = make_base_model("plain")
    settings = lora_config(model, layers=[1]).to_dict()
    chosen = {name: settings[name] for name in ("layers_to_transform", "layers_pattern")}
    live = save_adapter(tmp_path / "source", bases["plain"], model, chosen)
    write_embedding_files(
        tmp_path / "source", load_tokenizer(tmp_path / "source"), template="prompteol", max_seq_length=160,
        config=model.config,
        format="native",
    )  # fmt: skip
    for vectors in by_plain_readers(tmp_path / "source", NATIVE):
        np.testing.assert_allclose(vectors, under_template(live), atol=1e-4)


def test_the_native_reader_refuses_what_it_would_misread(bases: dict[str, Path], tmp_path: Path) -> None:
    model = make_base_model("plain")
    save_adapter(tmp_path / "source", bases["plain"], model, {"use_dora": True})
    write_embedding_files(
        tmp_path / "source", load_tokenizer(tmp_path / "source"), template="prompteol", max_seq_length=160,
        config=model.config,
        format="native",
    )  # fmt: skip
    with pytest.raises(SempaError, match=r"\(use_dora\) cannot have the format native"):
        sempa_st.load(tmp_path / "source", reader="native", dtype="float32")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"peft_type": "x"}, "is of type x. Expected LORA."),
        ({"peft_type": "PREFIX_TUNING"}, "is of type PREFIX_TUNING. Expected LORA."),
        ({"eva_config": "x"}, "cannot be read (TypeError: "),
    ],
)
@pytest.mark.parametrize("reader", ["sempa", "native"])
def test_settings_that_are_no_loras_are_refused_by_both_readers(
    adapter_folder: Path, tmp_path: Path, setting: dict[str, Any], told: str, reader: str
) -> None:
    folder = shutil.copytree(adapter_folder, tmp_path / "odd")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **setting}))
    with pytest.raises(SempaError, match=re.escape(told) if reader == "native" else "Expected LORA|EvaConfig"):
        sempa_st.load(folder, reader=reader, dtype="float32", device="cpu")
