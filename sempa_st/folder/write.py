"""Write the files that turn a folder with a model or an adapter into an embedding model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import CONFIG, LICENCE_FILE, read_settings
from sempa_st.errors import SempaError
from sempa_st.folder.formats import (
    ACTIVATED_MODEL_TYPE,
    CUSTOM_TYPES,
    MODULES,
    NORMALIZE,
    NORMALIZE_TYPE,
    POOLING,
    POOLING_TYPE,
    SETTINGS,
    ST_CONFIG,
    TRANSFORMER_TYPE,
    check_format,
)
from sempa_st.folder.layout import ModelFolder
from sempa_st.model.base_model import Base
from sempa_st.model.embedded import EMBEDDED_BASES
from sempa_st.model.gemma import TERMS_FILE, write_notice
from sempa_st.model.peft_models import ADAPTER_CONFIG
from sempa_st.model.prompt_eol import copy_sources, embedding_width, transformer_config, within_positions
from sempa_st.model.tokenizer import padding_side, save_tokenizer
from sempa_st.utils.files import write_json
from sempa_st.utils.names import check_entry, inside
from sempa_st.utils.portable import portable_name

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
    normalize: bool = True,
) -> None:
    """Write the tokenizer, the template, the settings and the module list of an embedding model.

    Args:
        folder: Folder to write to. An adapter must be in it already; a whole model may be added later.
        tokenizer: Tokenizer with the template installed.
        template: Name of the template.
        max_seq_length: Longest input in tokens, template included; reduced to the decoder's number of positions.
        config: Configuration of the decoder.
        format: One of :data:`FORMATS`.
        normalize: End in a module that divides vectors by their norm, so that dot products are cosines.

    Raises:
        SempaError: If the format is unknown, or ``native`` for an activated adapter.
    """
    check_format(format)
    if ModelFolder(folder).is_activated:
        if format != "custom":
            raise SempaError(
                f"The adapter for {folder.name} is an activated one, which plain sentence-transformers does not "
                "apply. Expected format custom."
            )
        # Because of this file transformers refuses to open the folder, and its error quotes the model type.
        write_json(folder / CONFIG, {"model_type": ACTIVATED_MODEL_TYPE})
    save_tokenizer(tokenizer, folder, padding_side(config))
    write_json(folder / SETTINGS, transformer_config(template, within_positions(max_seq_length, config)))
    modules = [("", TRANSFORMER_TYPE if format == "native" else CUSTOM_TYPES[0])]
    if format == "native":
        modules.append((POOLING, POOLING_TYPE))
        _write_pooling(folder / POOLING, embedding_width(config))
    else:
        copy_sources(folder)
    if normalize:
        modules.append((NORMALIZE[len(modules) - 1], NORMALIZE_TYPE))
        _write_normalize(folder / modules[-1][0])
    write_modules(folder, modules)
    if not (folder / ST_CONFIG).exists():
        write_json(folder / ST_CONFIG, _sentence_transformers_config())


def write_modules(folder: Path, modules: Sequence[tuple[str, str]]) -> None:
    """Write the list of modules that sentence-transformers loads, each with its folder and its type."""
    write_json(
        folder / MODULES,
        [{"idx": index, "name": str(index), "path": path, "type": kind} for index, (path, kind) in enumerate(modules)],
    )


def _write_pooling(folder: Path, width: int) -> None:
    from sentence_transformers.sentence_transformer.modules import Pooling

    folder.mkdir(exist_ok=True)
    Pooling(width, pooling_mode="lasttoken").save(str(folder))


def _write_normalize(folder: Path) -> None:
    from sentence_transformers.base.modules import Normalize

    folder.mkdir(exist_ok=True)
    Normalize().save(str(folder))


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
    """Make the adapter in ``folder`` name another base, by path or Hub id."""
    _set_in_adapter(folder, "base_model_name_or_path", base_reference)


def set_invocation(folder: Path, tokens: Sequence[int] | None) -> None:
    """Make the adapter in ``folder`` act from these token ids on only; always when None."""
    _set_in_adapter(folder, "alora_invocation_tokens", list(tokens) if tokens else None)


def _set_in_adapter(folder: Path, name: str, value: Any) -> None:
    settings = read_settings(folder, ADAPTER_CONFIG)
    write_json(folder / ADAPTER_CONFIG, {**settings, name: value})


def write_notices(base: Base, folder: Path) -> None:
    """Write the files that a base's licence requires: Gemma's notice and terms; of another base, copies of its own.

    Args:
        base: Base that the model was derived from.
        folder: Model folder.
    """
    if base.is_gemma:
        embedded = EMBEDDED_BASES.get(base.name)
        write_notice(folder, embedded.origin if embedded else portable_name(base.name), base.folder / TERMS_FILE)
    else:
        copy_files(base.folder, folder, licence_files(base.folder))


def licence_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that say under which terms its content may be used."""
    return sorted(path.name for path in folder.iterdir() if LICENCE_FILE.match(path.name) and path.is_file())


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy the files of these names, as far as they exist.

    Raises:
        SempaError: If a name, or a link, leads out of ``source``.
    """
    for name in names:
        path = inside(source, name)
        if path.is_file():
            check_entry(source, path)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)
