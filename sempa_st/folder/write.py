"""Write the files that make a folder with a model or an adapter an embedding model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import CONFIG, read_settings
from sempa_st.errors import SempaError
from sempa_st.folder.layout import (
    ACTIVATED_MODEL_TYPE,
    CUSTOM_TYPES,
    MODULES,
    POOLING,
    POOLING_TYPE,
    SETTINGS,
    ST_CONFIG,
    TRANSFORMER_TYPE,
    check_format,
    is_activated,
)
from sempa_st.model.peft_models import ADAPTER_CONFIG
from sempa_st.model.prompt_eol import copy_sources, embedding_width, transformer_config, within_positions
from sempa_st.model.tokenizer import save_tokenizer
from sempa_st.utils.files import write_json
from sempa_st.utils.names import check_entry, inside

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def write_embedding_files(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str,
    max_seq_length: int,
    config: PreTrainedConfig,
    format: str,
) -> None:
    """Write into ``folder`` all that makes a model folder an embedding model: tokenizer, template, module list.

    Args:
        folder: Folder that holds (or will hold) the model or adapter.
        tokenizer: Tokenizer with the template installed.
        template: Name of the template.
        max_seq_length: Longest input in tokens, template included; cut to the positions that the decoder has.
        config: The decoder's own settings.
        format: One of :data:`FORMATS`.

    Raises:
        SempaError: If the format is unknown, or ``native`` for an activated adapter.
    """
    check_format(format)
    if is_activated(folder):
        if format != "custom":
            raise SempaError(
                f"The adapter for {folder.name} is an activated one, which plain sentence-transformers does not "
                "apply. Expected format custom."
            )
        # With this file beside the adapter, transformers refuses to open the folder, and quotes the reason.
        write_json(folder / CONFIG, {"model_type": ACTIVATED_MODEL_TYPE})
    save_tokenizer(tokenizer, folder)
    write_json(folder / SETTINGS, transformer_config(template, within_positions(max_seq_length, config)))
    modules = [{"idx": 0, "name": "0", "path": "", "type": TRANSFORMER_TYPE if format == "native" else CUSTOM_TYPES[0]}]
    if format == "native":
        modules.append({"idx": 1, "name": "1", "path": POOLING, "type": POOLING_TYPE})
        _write_pooling(folder, embedding_width(config))
    else:
        copy_sources(folder)
    write_json(folder / MODULES, modules)
    if not (folder / ST_CONFIG).exists():
        write_json(folder / ST_CONFIG, _sentence_transformers_config())


def _write_pooling(folder: Path, width: int) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    path = folder / POOLING
    path.mkdir(exist_ok=True)
    Pooling(width, pooling_mode="lasttoken").save(str(path))


def _sentence_transformers_config() -> dict[str, Any]:
    packages = {"sentence_transformers": "sentence-transformers", "transformers": "transformers", "pytorch": "torch"}
    return {
        "model_type": "SentenceTransformer",
        "__version__": {key: metadata.version(package) for key, package in packages.items()},
        "prompts": {"query": "", "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }


def set_base_reference(folder: Path, base_reference: str) -> None:
    """Rewrite the base that the adapter in ``folder`` names."""
    settings = read_settings(folder, ADAPTER_CONFIG)
    write_json(folder / ADAPTER_CONFIG, {**settings, "base_model_name_or_path": base_reference})


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy those of some files that are there; raises :class:`SempaError` on one that leads out of its folder."""
    for name in names:
        path = inside(source, name)
        if path.is_file():
            check_entry(source, path)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def set_invocation(folder: Path, tokens: Sequence[int] | None) -> None:
    """Let the adapter in ``folder`` act from these tokens on, or always."""
    settings = read_settings(folder, ADAPTER_CONFIG)
    write_json(folder / ADAPTER_CONFIG, {**settings, "alora_invocation_tokens": list(tokens) if tokens else None})
