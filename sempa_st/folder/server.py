"""Write a model folder for servers of embeddings, which know no embedding template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import CONFIG
from sempa_st.errors import SempaError
from sempa_st.folder.formats import NORMALIZE, POOLING, POOLING_CONFIG, SETTINGS
from sempa_st.folder.write import write_modules
from sempa_st.model.prompt_eol import embedding_width, within_positions
from sempa_st.model.server_tokenizer import tokenizer_with_template
from sempa_st.model.templates import embedding_template
from sempa_st.utils.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MODULES = {
    "": "sentence_transformers.models.Transformer",
    POOLING: "sentence_transformers.models.Pooling",
    NORMALIZE[1]: "sentence_transformers.models.Normalize",
}
"""Modules by folder, under their names before sentence-transformers 6, which servers look for and it still reads."""


def write_server_files(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_seq_length: int,
) -> None:
    """Write the layers, a tokenizer that knows the template, and settings that servers read.

    Plain sentence-transformers, text-embeddings-inference and vLLM open the folder. It cannot generate: it has no LM
    head, and its tokenizer puts every text under the template. The vectors have the norm 1. A text that is too long is
    cut on the left, so that the template's suffix stays.

    Args:
        folder: Folder to write to.
        model: Causal language model, with its adapter merged.
        tokenizer: Its tokenizer, with the template installed.
        template: Name of the template.
        max_seq_length: Longest input in tokens, template included; reduced to the decoder's number of positions.

    Raises:
        SempaError: If the template cannot be moved into the tokenizer, or the model has no layers apart from its head.
    """
    length = within_positions(max_seq_length, model.config)
    moved = tokenizer_with_template(tokenizer, embedding_template(template))
    if model.base_model is model:
        raise SempaError(f"{type(model).__name__} has no layers apart from its LM head. Use another format.")
    layers: Any = model.base_model
    layers.save_pretrained(folder)
    write_json(folder / CONFIG, _config_for_servers(read_json(folder / CONFIG)))
    moved.save(str(folder / "tokenizer.json"), pretty=False)
    pad = tokenizer.pad_token or tokenizer.eos_token
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "padding_side": "right",
        "truncation_side": "left",
        "model_max_length": length,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / SETTINGS, {"max_seq_length": length, "do_lower_case": False})
    for path in _MODULES:
        (folder / path).mkdir(exist_ok=True)
    write_json(folder / POOLING_CONFIG, _pooling(embedding_width(model.config)))
    write_modules(folder, list(_MODULES.items()))


def _pooling(width: int) -> dict[str, Any]:
    """Return the settings of the pooling in both styles: servers read the flags, sentence-transformers the mode."""
    flags = {f"pooling_mode_{mode}": False for mode in ("cls_token", "mean_tokens", "max_tokens")}
    return {
        "word_embedding_dimension": width,
        **flags,
        "pooling_mode_lasttoken": True,
        "pooling_mode": "lasttoken",
        "include_prompt": True,
    }


def _config_for_servers(config: dict[str, Any]) -> dict[str, Any]:
    """Return a model's settings with the rotary ones in the old form, which text-embeddings-inference reads.

    transformers 5 nests them by kind of layer (Gemma 3). It reads the old form as well.
    """
    rope = config.get("rope_parameters") or {}
    kinds = rope if "full_attention" in rope else {"full_attention": rope}
    if not rope or any(kind.get("rope_type") != "default" for kind in kinds.values()):
        return config  # a scaled one has no old form that all readers know
    config = {key: value for key, value in config.items() if key != "rope_parameters"}
    config["rope_theta"] = kinds["full_attention"]["rope_theta"]
    if "sliding_attention" in kinds:
        config["rope_local_base_freq"] = kinds["sliding_attention"]["rope_theta"]
    return config
