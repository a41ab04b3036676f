"""The model folder: one folder that sentence-transformers, sempa_st and transformers or PEFT all open."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import CONFIG, read_settings, settings_if_any
from sempa_st.errors import SempaError
from sempa_st.model.chat_templates import check_embedding_template
from sempa_st.model.gemma import EMBEDDED_BASE
from sempa_st.model.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sempa_st.model.prompt_eol import DEFAULT_MAX_SEQ_LENGTH, PromptEOL
from sempa_st.model.templates import DEFAULT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("native", "custom")
"""``native``: built-in modules only, opens with no flag. ``custom``: our module, opens with trust_remote_code=True."""
RUN_RECORD = "sempa_run.json"
MODEL_SETTINGS = (CONFIG, "generation_config.json", ADAPTER_CONFIG)
"""Settings files of the model itself, beside its weights; a folder has those that apply to it."""
MODULES = "modules.json"
SETTINGS = PromptEOL.config_file_name
ST_CONFIG = "config_sentence_transformers.json"
POOLING = "1_Pooling"
_POOLING_CONFIG = f"{POOLING}/config.json"
ACTIVATED_MODEL_TYPE = (
    "activated adapter: embed with sempa_st.load or SentenceTransformer(..., trust_remote_code=True), generate with "
    "peft.AutoPeftModelForCausalLM"
)
"""Model type of a folder whose adapter transformers' own Auto classes would load and never apply."""
CUSTOM_TYPES = ("prompt_eol.PromptEOL", "sempa_st.model.prompt_eol.PromptEOL", "sempa_st.prompt_eol.PromptEOL")
"""How modules.json names our module: in a ``custom`` folder, and as
``SentenceTransformer.save_pretrained`` has it, of this version and of earlier ones."""
TRANSFORMER_TYPE = "sentence_transformers.base.modules.transformer.Transformer"
POOLING_TYPE = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"


def check_format(format: str) -> None:
    """Raise :class:`SempaError` unless ``format`` is one of :data:`FORMATS`."""
    if format not in FORMATS:
        raise SempaError(f"Unknown folder format {format!r}. Expected one of: {', '.join(FORMATS)}.")


def folder_format(folder: Path) -> str | None:
    """Return the format of a folder that this package wrote, or None for any other folder, more modules included."""
    if not (folder / MODULES).is_file() or not (folder / SETTINGS).is_file() or template_name(folder) is None:
        return None
    types = [module["type"] for module in read_settings(folder, MODULES)]
    if types == [TRANSFORMER_TYPE, POOLING_TYPE]:
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


def is_adapter_folder(folder: Path) -> bool:
    """Whether ``folder`` holds an adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def invocation_of(folder: Path) -> list[int]:
    """Return the tokens from which on the adapter in ``folder`` acts, if it is an activated one."""
    if not is_adapter_folder(folder):
        return []
    return read_settings(folder, ADAPTER_CONFIG).get("alora_invocation_tokens") or []


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


def embedding_settings(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """Return the name of a folder's embedding template and the longest input in tokens, checked against each other.

    Args:
        folder: Model folder.
        tokenizer: Its tokenizer.

    Raises:
        SempaError: If there is no such template, it is not fit or cannot be rendered, or leaves no room for a sentence.
    """
    name, length = template_name(folder) or DEFAULT_TEMPLATE, folder_max_seq_length(folder)
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name not in templates:
        raise SempaError(
            f"{folder / SETTINGS} names the template {name!r:.80}, and the tokenizer has only: "
            f"{', '.join(sorted(templates)) or 'none'}. Restore the folder from where it came."
        )
    check_embedding_template(f"The template {name!r} in {folder}", templates[name], tokenizer.special_tokens_map)
    try:
        rendered: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], chat_template=name, tokenize=True, return_dict=True
        )
    except Exception as error:  # a template is a program, and may raise anything
        raise SempaError(f"The template {name!r} in {folder} cannot be rendered ({error}). Mend it.") from error
    shortest = len(rendered["input_ids"]) + 1
    if length < shortest:
        raise SempaError(
            f"{folder / SETTINGS}: max_seq_length is {length}, which leaves no room for a sentence. Expected at least "
            f"{shortest}: the template and one token."
        )
    return name, length


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the run record of a folder, if it has one."""
    record: dict[str, Any] | None = settings_if_any(folder, RUN_RECORD)
    return record
