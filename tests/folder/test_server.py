from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import sample_sentences
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

import sempa_st
from sempa_st.errors import SempaError
from sempa_st.folder.copying import copy_model

pytestmark = pytest.mark.names_dtype

TEXTS = [*sample_sentences()[:20], 'Who said "hello"?', "a\nb", "?", "ünï 😀", "  two  spaces"]


@pytest.fixture(scope="module")
def server(adapter_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_model(str(adapter_folder), tmp_path_factory.mktemp("server") / "served", format="server")


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_plain_readers_give_our_vectors_without_knowing_the_template(server: Path, adapter_folder: Path) -> None:
    expected = unit(sempa_st.load(adapter_folder, dtype="float32", device="cpu").encode(TEXTS))
    plain = SentenceTransformer(str(server), device="cpu").encode(TEXTS)
    np.testing.assert_allclose(plain, expected, atol=2e-6)
    np.testing.assert_allclose(sempa_st.load(server, dtype="float32", device="cpu").encode(TEXTS), expected, atol=2e-6)


def test_a_base_and_a_gemma_are_served(tiny_gemma: Path, tmp_path: Path) -> None:
    served = copy_model(str(tiny_gemma), tmp_path / "served", format="server", template="pretended-cot")
    ours = sempa_st.load(tiny_gemma, template="pretended-cot", dtype="float32", device="cpu")
    np.testing.assert_allclose(
        SentenceTransformer(str(served), device="cpu").encode(TEXTS), unit(ours.encode(TEXTS)), atol=2e-6
    )
    assert (served / "NOTICE").is_file()
    # What text-embeddings-inference's Gemma3Config has no default for.
    needed = (
        "attention_bias pad_token_id hidden_activation hidden_size intermediate_size max_position_embeddings "
        "num_attention_heads num_hidden_layers num_key_value_heads query_pre_attn_scalar rms_norm_eps "
        "rope_local_base_freq _sliding_window_pattern use_bidirectional_attention vocab_size rope_theta architectures"
    )
    config = json.loads((served / "config.json").read_text())
    assert not set(needed.split()) - {name for name, value in config.items() if value is not None}
    assert config["model_type"] == "gemma3_text"
    assert "rope_parameters" not in config  # it reads flat ones only
    from safetensors import safe_open

    with safe_open(served / "model.safetensors", "pt") as weights:
        assert "embed_tokens.weight" in weights.keys()  # noqa: SIM118 (not a dictionary)


def test_settings_are_those_that_servers_look_for(server: Path) -> None:
    pooling = json.loads((server / "1_Pooling" / "config.json").read_text())
    flags = {name: value for name, value in pooling.items() if name.startswith("pooling_mode_")}
    assert flags.pop("pooling_mode_lasttoken") is True
    assert {"pooling_mode_cls_token", "pooling_mode_mean_tokens"} <= set(flags) and not any(flags.values())
    assert pooling["pooling_mode"] == "lasttoken"
    settings = json.loads((server / "sentence_bert_config.json").read_text())
    assert settings == {"max_seq_length": 160, "do_lower_case": False}  # vLLM reads the two together or not at all
    types = [module["type"].rpartition(".") for module in json.loads((server / "modules.json").read_text())]
    assert [name for _, _, name in types] == ["Transformer", "Pooling", "Normalize"]
    assert {package for package, _, _ in types} == {"sentence_transformers.models"}


def test_the_card_says_what_the_folder_is_for(server: Path) -> None:
    card = (server / "README.md").read_text()
    assert 'This sentence : "{sentence}" means in one word:"' in card
    assert "only embeds" in card and "trust_remote_code" not in card and "generator" not in card.split("## Use")[1]


def test_a_long_text_keeps_the_suffix(server: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server)
    whole, cut = (tokenizer(text)["input_ids"] for text in ("word", "word " * 2000))
    rows = tokenizer("word " * 2000, truncation=True)["input_ids"]
    assert len(cut) > 160 and len(rows) == 160
    assert rows[0] == whole[0] == tokenizer.convert_tokens_to_ids("<bos>")
    assert rows[-8:] == cut[-8:]
    assert tokenizer.decode(rows).endswith('" means in one word:"')
    batch = tokenizer(["a", "b " * 9], padding=True)
    assert batch["attention_mask"][0][0] == 1 and batch["attention_mask"][0][-1] == 0


def test_an_empty_text_is_embedded(server: Path) -> None:
    assert np.isfinite(SentenceTransformer(str(server), device="cpu").encode(["", "a"])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "server", "activate": True}, "--activate cannot be applied"),
        ({"format": "server", "scale": 0.5}, "--scale 0.5 cannot be applied"),
        ({"format": "onnx"}, "server"),
    ],
)
def test_what_cannot_be_served_is_refused(options: dict, message: str, adapter_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SempaError, match=message):
        copy_model(str(adapter_folder), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_activated_adapter_is_served_by_its_plain_copy(server: Path, adapter_folder: Path, tmp_path: Path) -> None:
    activated = copy_model(str(adapter_folder), tmp_path / "activated", activate=True)
    with pytest.raises(SempaError, match="--format native"):
        copy_model(str(activated), tmp_path / "served", format="server")
    plain = copy_model(str(activated), tmp_path / "plain", format="native")
    again = copy_model(str(plain), tmp_path / "served", format="server")
    vectors = [SentenceTransformer(str(folder), device="cpu").encode(TEXTS) for folder in (server, again)]
    np.testing.assert_allclose(*vectors, atol=2e-6)
