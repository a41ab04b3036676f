"""The model folder: one folder that sentence-transformers, sempa_st and transformers or PEFT all open."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import CONFIG, read_settings, settings_if_any
from sempa_st.errors import SempaError
from sempa_st.folder.digests import folder_digest
from sempa_st.folder.formats import (
    CUSTOM_TYPES,
    MODULES,
    NORMALIZE,
    NORMALIZE_TYPE,
    POOLING_CONFIG,
    POOLING_TYPE,
    RUN_RECORD,
    SETTINGS,
    TRANSFORMER_TYPE,
)
from sempa_st.model.chat_templates import check_embedding_template
from sempa_st.model.embedded import EMBEDDED_BASES, embedded_called
from sempa_st.model.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sempa_st.model.prompt_eol import DEFAULT_MAX_SEQ_LENGTH
from sempa_st.model.templates import DEFAULT_TEMPLATE
from sempa_st.model.tokenizer import template_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WEIGHT_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ModelFolder:
    """What the settings of a model folder say. Each settings file is read at most once, when it is first needed.

    An object does not see later changes: after writing into the folder, make a new one.

    Args:
        path: Any folder with a model or an adapter; it need not be one of this package.

    Raises:
        SempaError: From any property, if a settings file cannot be read or departs from its schema.
    """

    path: Path

    @cached_property
    def format(self) -> str | None:
        """One of :data:`FORMATS`, or None if this package did not write the folder, or modules were added to it."""
        if not self.modules or not (self.path / SETTINGS).is_file() or self.template is None:
            return None
        types = [module["type"] for module in self.modules]
        types = types[:-1] if self.normalizes else types
        if types == [TRANSFORMER_TYPE, POOLING_TYPE]:
            return "native" if read_settings(self.path, POOLING_CONFIG).get("pooling_mode") == "lasttoken" else None
        return "custom" if len(types) == 1 and types[0] in CUSTOM_TYPES else None

    @cached_property
    def normalizes(self) -> bool:
        """Whether the last module divides vectors by their norm; that of folders of earlier versions does not."""
        last = self.modules[-1] if self.modules else {"type": None}
        if last["type"] != NORMALIZE_TYPE or last["path"] not in NORMALIZE:
            return False
        settings = settings_if_any(self.path, f"{last['path']}/config.json") or {}
        names = (settings.get(f"module_{side}_name") for side in ("input", "output"))
        return all(name in (None, "sentence_embedding") for name in names)

    @property
    def template(self) -> str | None:
        """Name of the embedding template."""
        processing = self._settings.get("processing_kwargs") or {}
        return (processing.get("chat_template") or {}).get("chat_template")

    @property
    def max_seq_length(self) -> int:
        """Longest input in tokens, template included."""
        return int(self._settings.get("max_seq_length") or DEFAULT_MAX_SEQ_LENGTH)

    @cached_property
    def adapter_settings(self) -> dict[str, Any] | None:
        """PEFT's settings of the adapter; None for a whole model."""
        return settings_if_any(self.path, ADAPTER_CONFIG)

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter and not a whole model."""
        return self.adapter_settings is not None

    @property
    def invocation(self) -> list[int]:
        """Ids of the tokens that activate the aLoRA; empty for a plain adapter or a whole model."""
        return (self.adapter_settings or {}).get("alora_invocation_tokens") or []

    @property
    def is_activated(self) -> bool:
        """Whether the adapter acts under the template only (an activated LoRA)."""
        return bool(self.invocation)

    @cached_property
    def base(self) -> str:
        """Name or folder of the adapter's base; empty for a whole model.

        The adapter's settings may name a folder that is gone, as on another machine. The run record then has a portable
        name: that of an embedded base, a Hub id, or the last part of the folder's path, which counts without a record
        too. A folder of that name beside this one is taken, since the two may have been moved together.
        """
        if self.adapter_settings is None:
            return ""
        reference = str(self.adapter_settings.get("base_model_name_or_path"))
        if not Path(reference).is_absolute() or Path(reference).is_dir():
            return reference
        last = Path(reference).name
        name = str((self.record or {}).get("base") or embedded_called(last) or last)
        beside = self.path.resolve().parent / name
        if "/" not in name and (beside / CONFIG).is_file():
            return str(beside)
        return name if "/" in name or name in EMBEDDED_BASES else reference

    @cached_property
    def record(self) -> dict[str, Any] | None:
        """The run record of a trained model."""
        return settings_if_any(self.path, RUN_RECORD)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of all files that decide the model; see :func:`sempa_st.folder.digests.folder_digest`."""
        return folder_digest(self.path, self.module_folders)

    @cached_property
    def modules(self) -> list[dict[str, Any]]:
        """The modules that sentence-transformers would load, in order; empty if the folder lists none."""
        return settings_if_any(self.path, MODULES) or []

    @property
    def module_folders(self) -> list[str]:
        """Names of the folders that modules have of their own."""
        return [module["path"] for module in self.modules if module["path"].strip("./")]

    @cached_property
    def weight_files(self) -> list[str]:
        """Names of the files that may hold the weights; a whole model, in one file or several, or an adapter."""
        index = settings_if_any(self.path, _WEIGHT_INDEX)
        if index is not None:
            return [_WEIGHT_INDEX, *sorted(set(index["weight_map"].values()))]
        return ["model.safetensors", ADAPTER_WEIGHTS]

    @property
    def model_files(self) -> list[str]:
        """Names of the files that may hold the model: its settings and weights, without tokenizer or modules."""
        return [CONFIG, "generation_config.json", ADAPTER_CONFIG, *self.weight_files]

    def embedding_settings(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
        """Return the name of the embedding template and the longest input in tokens, checked against each other.

        Args:
            tokenizer: The folder's tokenizer.

        Raises:
            SempaError: If there is no such template, it is not fit or cannot be rendered, or leaves no room for a
                sentence.
        """
        name, length = self.template or DEFAULT_TEMPLATE, self.max_seq_length
        settings = self.path / SETTINGS
        templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
        if name not in templates:
            raise SempaError(
                f"{settings} names the template {name!r:.80}, and the tokenizer has only: "
                f"{', '.join(sorted(templates)) or 'none'}. Restore the folder from where it came."
            )
        where = f"The template {name!r} in {self.path}"
        check_embedding_template(where, templates[name], tokenizer.special_tokens_map)
        try:
            shortest = len(template_ids(tokenizer, name, "")) + 1
        except Exception as error:  # a template is a program, and may raise anything
            raise SempaError(f"{where} cannot be rendered ({error}). Mend it.") from error
        if length < shortest:
            raise SempaError(
                f"{settings}: max_seq_length is {length}, which leaves no room for a sentence. Expected at least "
                f"{shortest}: the template and one token."
            )
        return name, length

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return read_settings(self.path, SETTINGS)
