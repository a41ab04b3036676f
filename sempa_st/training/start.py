"""What a run starts from: its base and, with ``--from``, a trained adapter on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.resolve import Source, adapter_base, embedding_tokenizer, find_model
from sempa_st.folder.shipped import shipped_names
from sempa_st.model.adapter import check_adapter
from sempa_st.model.base_model import Base, resolve_base
from sempa_st.model.embedded import EMBEDDED_BASE, EMBEDDED_BASES
from sempa_st.model.templates import EMBEDDING_TEMPLATES, embedding_template
from sempa_st.model.tokenizer import install_template, load_tokenizer, prefix_tokens, suffix_tokens
from sempa_st.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DEFAULTS = {item.name: item.default for item in fields(TrainConfig)}


@dataclass(frozen=True)
class Start:
    """An adapter to go on from.

    Args:
        folder: Its model folder.
        decided: The settings of the run that it decides, by name.
    """

    folder: ModelFolder
    decided: Mapping[str, Any]


def find_start(config: TrainConfig) -> tuple[Base, Source | None]:
    """Return the base of a run, and the model of ``--from``.

    Args:
        config: Settings; with ``from_`` a base other than the default is another copy of the adapter's.

    Raises:
        SempaError: If one of them is not found, the base is an adapter, or the model of ``--from`` is none.
    """
    if not config.from_:
        if config.base in shipped_names() or _is_adapter(config.base):
            raise SempaError(f"--base {config.base} is an adapter. To go on from it: --from {config.base}.")
        return resolve_base(config.base), None
    source = find_model(config.from_)
    if source.kind != "sempa" or not source.folder.is_adapter:
        raise SempaError(
            f"--from {config.from_} is no adapter that `sempa train` or `sempa copy` wrote. Expected one; a whole "
            "model is given as --base."
        )
    other = None if config.base == EMBEDDED_BASE else config.base
    return adapter_base(source.folder, other), source


def _is_adapter(name: str) -> bool:
    return name not in EMBEDDED_BASES and ModelFolder(Path(name)).is_adapter


def open_start(config: TrainConfig) -> tuple[TrainConfig, Base, PreTrainedTokenizerBase, Start | None]:
    """Return the settings of a run with those that its start decides, the base, the tokenizer and the start.

    Args:
        config: Settings as they were asked for. A setting at its default is the start's.

    Returns:
        The tokenizer has the embedding template installed; the start is None without ``--from``.

    Raises:
        SempaError: As :func:`find_start`, and if the adapter does not match the base or a setting contradicts it.
    """
    base, source = find_start(config)
    if source is None:
        tokenizer = load_tokenizer(base.folder)
        install_template(tokenizer, embedding_template(config.template))
        return config, base, tokenizer, None
    check_adapter(base, source.folder.path)
    tokenizer, template, length = embedding_tokenizer(source, base, None)
    decided = _decided(source, base, tokenizer, template)
    config = replace(config, lora_layers=_listed(config.adapted_layers))
    for name, value in decided.items():
        asked = getattr(config, name)
        if name != "base" and asked not in (_DEFAULTS[name], value):
            raise SempaError(
                f"{name} is {asked!r}, and the adapter of --from {config.from_} has {value!r}. Leave the setting out."
            )
    if config.max_seq_length == _DEFAULTS["max_seq_length"]:
        decided["max_seq_length"] = length
    return replace(config, **decided), base, tokenizer, Start(source.folder, decided)


def _decided(source: Source, base: Base, tokenizer: PreTrainedTokenizerBase, template: str) -> dict[str, Any]:
    """Return the settings that an adapter decides."""
    settings, invocation = source.folder.adapter_settings or {}, source.folder.invocation
    activations: dict[str, list[int]] = {"always": []}
    if template in EMBEDDING_TEMPLATES and invocation:
        activations |= {"sentence": prefix_tokens(tokenizer, template), "template": suffix_tokens(tokenizer, template)}
    activation = next((name for name, tokens in activations.items() if tokens == invocation), None)
    if template not in EMBEDDING_TEMPLATES or activation is None:
        raise SempaError(
            f"--from {source.name} has a template of its own, {template!r}, or acts from other tokens on than a "
            f"template's. Expected an adapter under one of: {', '.join(EMBEDDING_TEMPLATES)}."
        )
    layers = settings.get("layers_to_transform")
    return {
        "base": base.name,
        "template": template,
        "activation": activation,
        "lora_r": settings.get("r", 8),
        "lora_alpha": settings.get("lora_alpha", 8),
        "lora_layers": _listed([layers] if isinstance(layers, int) else layers),
    }


def _listed(layers: Sequence[int] | None) -> str:
    return ",".join(map(str, layers or []))
