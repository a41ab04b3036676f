"""The model folder: one folder that sentence-transformers, sempa_st and transformers or PEFT all open."""

from __future__ import annotations

import shutil
import string
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.bases import EMBEDDED_BASE, load_tokenizer, save_tokenizer
from sempa_st.errors import SempaError
from sempa_st.files import write_json
from sempa_st.inspection import read_settings
from sempa_st.names import check_entry, inside
from sempa_st.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sempa_st.prompt_eol import (
    DEFAULT_MAX_SEQ_LENGTH,
    PromptEOL,
    copy_sources,
    embedding_width,
    transformer_config,
    within_positions,
)
from sempa_st.prompts import EmbeddingTemplate
from sempa_st.token_rows import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

FORMATS = ("native", "custom")
"""``native``: built-in modules only, opens with no flag. ``custom``: our module, opens with trust_remote_code=True."""
RUN_RECORD = "sempa_run.json"
MODULES = "modules.json"
SETTINGS = PromptEOL.config_file_name
ST_CONFIG = "config_sentence_transformers.json"
POOLING = "1_Pooling"
_POOLING_CONFIG = f"{POOLING}/config.json"
CONFIG = "config.json"
ACTIVATED_MODEL_TYPE = (
    "activated adapter: embed with sempa_st.load or SentenceTransformer(..., trust_remote_code=True), generate with "
    "peft.AutoPeftModelForCausalLM"
)
"""Model type of a folder whose adapter transformers' own Auto classes would load and never apply."""
CUSTOM_TYPES = (f"prompt_eol.{PromptEOL.__name__}", f"{PromptEOL.__module__}.{PromptEOL.__name__}")
"""How modules.json names our module: in a ``custom`` folder, and as ``SentenceTransformer.save_pretrained`` has it."""
_TRANSFORMER_TYPE = "sentence_transformers.base.modules.transformer.Transformer"
_POOLING_TYPE = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
_ENDINGS = ("It ends.", "Really?", "Stop!", "And so on ...", "and so on...", "(he said)", "70%", "it's me'", "a.b.")
_BEGINNINGS = ("...", "....", "''", "--", "((", "?!", " A", "\n", '""', "«", "“Yes", "2", "ö")
_PROBES = ("", "A cat sleeps", 'She said "no"?', "Ünïcode — 12 °C 😀", "it's")


def install_template(tokenizer: PreTrainedTokenizerBase, template: EmbeddingTemplate) -> None:
    """Add ``template`` to the tokenizer's named chat templates, leaving the base's own one as the default.

    Raises:
        SempaError: If the template and plain tokenisation of its text give different tokens.
    """
    own = tokenizer.chat_template or {}
    named = dict(own) if isinstance(own, dict) else {"default": own}
    expected = [_plain_ids(tokenizer, template.text(sentence)) for sentence in _PROBES]
    has_bos = tokenizer.bos_token_id is not None and expected[0][:1] == [tokenizer.bos_token_id]
    bos = str(tokenizer.bos_token) if has_bos else ""
    # Some SentencePiece tokenizers mark a word's start at the start of the text, but not right after BOS.
    for start in (bos, bos + " "):
        tokenizer.chat_template = {**named, template.name: template.jinja(start=start)}
        rendered = [_template_ids(tokenizer, template.name, sentence) for sentence in _PROBES]
        if rendered == expected:
            return
    tokenizer.chat_template = own or None
    raise SempaError(
        f"The template {template.name!r} gives other tokens through this tokenizer's chat template than as plain text: "
        f"{rendered[0]} against {expected[0]}. This tokenizer ({type(tokenizer).__name__}) is not supported."
    )


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    # An EOS that the tokenizer adds ends a text; the template's last token is where the text goes on.
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def _template_ids(tokenizer: PreTrainedTokenizerBase, name: str, sentence: str) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": sentence}], chat_template=name, tokenize=True, return_dict=True
    )
    ids: list[int] = encoded["input_ids"]
    return ids


def opening_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Return the token ids that every sentence under ``template`` begins with, whatever its own first character.

    Args:
        tokenizer: Tokenizer with the template installed.
        template: Name of the template.

    Raises:
        SempaError: If there are none but the start token.
    """
    sentences = [*_PROBES, *string.punctuation, *_BEGINNINGS]
    rows = [_template_ids(tokenizer, template, sentence) for sentence in sentences]
    shared = rows[0][: common_prefix(rows)]
    if not set(shared) - {tokenizer.bos_token_id}:
        raise SempaError(f"Sentences under the template {template!r} do not begin alike with this tokenizer.")
    return shared


def closing_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Return the token ids that every sentence under ``template`` ends in, whatever its own last character.

    Args:
        tokenizer: Tokenizer with the template installed.
        template: Name of the template.

    Raises:
        SempaError: If there are none.
    """
    sentences = [*_PROBES, *_ENDINGS]
    rows = [_template_ids(tokenizer, template, sentence)[::-1] for sentence in sentences]
    shared = rows[0][: common_prefix(rows)]
    if not shared:
        raise SempaError(f"Sentences under the template {template!r} do not end in the same token with this tokenizer.")
    return shared[::-1]


def check_saved_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Save a tokenizer to an empty folder, load it from there and compare the two under ``template``.

    An adapter folder has no ``config.json`` (with one, the adapter would not be loaded), and with some bases that file
    has a say in which tokenizer class is loaded.

    Raises:
        SempaError: If a sentence gets other tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder)
        reloaded = load_tokenizer(folder)
    for sentence in _PROBES:
        if _template_ids(reloaded, template, sentence) != _template_ids(tokenizer, template, sentence):
            raise SempaError(
                f"The tokenizer {type(tokenizer).__name__} reads {sentence!r} otherwise once it is saved without its "
                f"model and loaded again, as {type(reloaded).__name__}. This base is not supported."
            )


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
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": _TRANSFORMER_TYPE if format == "native" else CUSTOM_TYPES[0]}
    ]
    if format == "native":
        modules.append({"idx": 1, "name": "1", "path": POOLING, "type": _POOLING_TYPE})
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


def check_format(format: str) -> None:
    """Raise :class:`SempaError` unless ``format`` is one of :data:`FORMATS`."""
    if format not in FORMATS:
        raise SempaError(f"Unknown folder format {format!r}. Expected one of: {', '.join(FORMATS)}.")


def folder_format(folder: Path) -> str | None:
    """Return the format of a folder that this package wrote, or None for any other folder, more modules included."""
    if not (folder / MODULES).is_file() or not (folder / SETTINGS).is_file() or template_name(folder) is None:
        return None
    types = [module["type"] for module in read_settings(folder, MODULES)]
    if types == [_TRANSFORMER_TYPE, _POOLING_TYPE]:
        return "native" if read_settings(folder, _POOLING_CONFIG).get("pooling_mode") == "lasttoken" else None
    return "custom" if len(types) == 1 and types[0] in CUSTOM_TYPES else None


def template_name(folder: Path) -> str | None:
    """Return the name of the embedding template that the folder's settings point to, if any."""
    processing = read_settings(folder, SETTINGS).get("processing_kwargs") or {}
    name: str | None = (processing.get("chat_template") or {}).get("chat_template")
    return name


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files that hold the model, and not other forms of it that may lie beside them."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [index.name, *sorted(set(read_settings(folder, index.name)["weight_map"].values()))]
    return ["model.safetensors", ADAPTER_WEIGHTS]


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy those of some files that are there; raises :class:`SempaError` on one that leads out of its folder."""
    for name in names:
        path = inside(source, name)
        if path.is_file():
            check_entry(source, path)
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name)


def is_adapter_folder(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def invocation_of(folder: Path) -> list[int]:
    """Return the tokens from which on the adapter in ``folder`` acts, if it is an activated one."""
    if not is_adapter_folder(folder):
        return []
    return read_settings(folder, ADAPTER_CONFIG).get("alora_invocation_tokens") or []


def set_invocation(folder: Path, tokens: Sequence[int] | None) -> None:
    """Let the adapter in ``folder`` act from these tokens on, or always."""
    settings = read_settings(folder, ADAPTER_CONFIG)
    write_json(folder / ADAPTER_CONFIG, {**settings, "alora_invocation_tokens": list(tokens) if tokens else None})


def is_activated(folder: Path) -> bool:
    """Whether the adapter in ``folder`` acts under the template only (an activated LoRA)."""
    return bool(invocation_of(folder))


def base_of_adapter(folder: Path) -> str:
    """Return the base that the adapter names; where that is a folder now gone, what the run record calls it.

    The record's name is that of the embedded base, a Hub id, or the last part of a folder, which is looked for beside
    ``folder``: the two may have moved together.
    """
    reference = str(read_settings(folder, ADAPTER_CONFIG).get("base_model_name_or_path"))
    record = folder / RUN_RECORD
    if not Path(reference).is_absolute() or Path(reference).is_dir() or not record.is_file():
        return reference
    name = str(read_settings(folder, RUN_RECORD).get("base") or reference)
    beside = folder.resolve().parent / name
    if "/" not in name and (beside / CONFIG).is_file():
        return str(beside)
    return name if "/" in name or name == EMBEDDED_BASE else reference


def folder_max_seq_length(folder: Path) -> int:
    """Return the longest input in tokens that the folder's settings allow."""
    return int(read_settings(folder, SETTINGS).get("max_seq_length") or DEFAULT_MAX_SEQ_LENGTH)
