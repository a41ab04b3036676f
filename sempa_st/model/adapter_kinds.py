"""Kinds of adapters: find what goes beyond low-rank updates of linear layers, and refuse the copies it rules out."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import read_settings, tensor_shapes
from sempa_st.checks.library_errors import readable
from sempa_st.errors import SempaError
from sempa_st.model.base_model import Base, load_config, named_decoder
from sempa_st.model.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, full_names
from sempa_st.utils.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOW_RANK_SETTINGS = {
    "alora_invocation_tokens", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_rslora",
}  # fmt: skip
"""Settings with which an adapter consists of low-rank updates s B A only."""
_PLAIN_INITS = (None, True, "gaussian", "orthogonal", "eva")
"""Initialisations that do not change the base's weights."""
_EMBEDDING = "an update of an embedding"
_NATIVE_EXTRAS = {"modules_to_save", "bias", "trainable_token_indices", "lora_bias", "init_lora_weights", _EMBEDDING}
"""Extras that plain sentence-transformers applies correctly."""
_UP = ("lora_B", "lora_embedding_B")


def extras(folder: Path) -> list[str]:
    """Return the sorted names of what an adapter has beyond low-rank updates of linear layers, mostly settings."""
    settings = read_json(folder / ADAPTER_CONFIG)
    names = {name for name, value in settings.items() if value and name not in _LOW_RANK_SETTINGS}
    if settings.get("bias") == "none":
        names.discard("bias")
    if settings.get("init_lora_weights") in _PLAIN_INITS:
        names.discard("init_lora_weights")
    if any("lora_embedding" in name for name in tensor_shapes(folder / ADAPTER_WEIGHTS)):
        names.add(_EMBEDDING)
    return sorted(names)


def check_scaled(name: str, folder: Path) -> None:
    """Refuse to scale an adapter whose effect is not proportional to its B matrices; see :func:`refuse_extras`."""
    refuse_extras(name, folder, "be scaled", {"lora_bias", _EMBEDDING})


def check_activated(base: Base, name: str, folder: Path) -> None:
    """Refuse an activated copy of an adapter unless all of it acts from the invocation tokens on only.

    Args:
        base: Base of the adapter.
        name: Name of the model, for the message.
        folder: Folder of the activated adapter.

    Raises:
        SempaError: If it would also act on other text, or adapts layers that PEFT has no activated form for.
    """
    refuse_extras(name, folder, "be activated, since other text would not get the base's exact output")
    config = _lora_settings(folder)
    try:
        _tensors_on(skeleton(base), config)
    except (ValueError, RuntimeError) as error:
        raise SempaError(
            f"The adapter of {name} cannot be activated: PEFT has no activated form for all of its layers ({error}). "
            "Leave out --activate."
        ) from error


def check_native(base: Base, name: str, folder: Path) -> None:
    """Refuse the native format unless plain sentence-transformers applies all of the adapter.

    Plain sentence-transformers loads the adapter onto the decoder without its LM head.

    Args:
        base: Base of the adapter.
        name: Name of the model, for the message.
        folder: Adapter folder.

    Raises:
        SempaError: If the adapter is of an unsupported kind, or its settings do not match its layers there.
    """
    purpose = "have the format native, in which plain sentence-transformers would misread it"
    refuse_extras(name, folder, purpose, _NATIVE_EXTRAS, "--format custom")
    model, config = skeleton(base), _lora_settings(folder)
    prefix, shapes = f"base_model.model.{model.base_model_prefix}.", tensor_shapes(folder / ADAPTER_WEIGHTS)
    expected = {key.replace(prefix, "base_model.model.", 1): shape for key, shape in shapes.items()}
    head = model.get_output_embeddings()
    heads = tuple(f"base_model.model.{key}." for key, module in model.named_modules() if module is head)
    try:
        tensors = _tensors_on(model.base_model, config)
    except ValueError:  # the settings match no layer
        tensors = {}
    lost = {key for key, shape in expected.items() if not key.startswith(heads) and _is_lost(tensors, key, shape)}
    if lost:
        raise SempaError(
            f"The adapter of {name} cannot have the format native: its settings do not match {len(lost)} of its "
            f"tensors (first: {min(lost)}) in a decoder without the LM head, which plain sentence-transformers loads. "
            "Expected --format custom."
        )


def _is_lost(tensors: dict[str, Any], key: str, shape: list[int]) -> bool:
    # PEFT saves a copy of the base's embedding next to an update of it, and loads it into the base.
    return not key.endswith(".base_layer.weight") and (key not in tensors or list(tensors[key].shape) != shape)


def refuse_extras(
    name: str, folder: Path, purpose: str, allowed: Collection[str] = (), instead: str | None = None
) -> None:
    """Refuse a use of an adapter that has more than low-rank updates of linear layers.

    Args:
        name: Name of the model, for the message.
        folder: Adapter folder.
        purpose: What it then cannot do, such as ``be averaged``.
        allowed: Extras that do no harm; see :func:`extras`.
        instead: What the message advises.

    Raises:
        SempaError: If it has other extras, which the message names.
    """
    refused = [extra for extra in extras(folder) if extra not in allowed]
    if refused:
        raise SempaError(
            f"The adapter of {name} ({', '.join(refused)}) cannot {purpose}. Expected "
            f"{instead or 'only low-rank updates of linear layers'}."
        )


def check_lora(folder: Path) -> None:
    """Raise :class:`SempaError` unless an adapter is of PEFT's type LoRA."""
    kind = read_settings(folder, ADAPTER_CONFIG)["peft_type"]
    if kind != "LORA":
        raise SempaError(f"The adapter in {folder} is of type {kind}. Expected LORA.")


def _lora_settings(folder: Path) -> Any:
    """Return PEFT's settings of a LoRA; raises :class:`SempaError` if they are of another type or not readable."""
    from peft import PeftConfig

    check_lora(folder)
    with readable(folder, "adapter"):
        return PeftConfig.from_pretrained(str(folder))


def _tensors_on(model: Any, config: Any) -> dict[str, Any]:
    """Return the adapter tensors that PEFT's settings create on a model without weights, by name; both are changed."""
    from peft import PeftModel, get_peft_model_state_dict

    # Some initialisations would read the base's weights.
    config.inference_mode, config.init_lora_weights = True, True
    return get_peft_model_state_dict(PeftModel(model, config), save_embedding_layers=False)


def skeleton(base: Base) -> PreTrainedModel:
    """Return the model of a base on the meta device, without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with readable(base.folder), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(base.folder), trust_remote_code=False)
    return named_decoder(model)


def layers_pattern(model: PreTrainedModel) -> list[str]:
    """Return the name of the decoder's list of layers, such as ``["layers"]``, or an empty list if it has none.

    PEFT finds the layers by this name with the LM head and without.
    """
    from torch import nn

    count = model.config.get_text_config().num_hidden_layers
    lists = [(name, module) for name, module in model.base_model.named_modules() if isinstance(module, nn.ModuleList)]
    return [name.rpartition(".")[2] for name, module in lists if len(module) == count][:1]


def write_native_settings(base: Base, folder: Path) -> None:
    """Rewrite an adapter's settings so that they match the same layers with the LM head and without it."""
    settings = read_json(folder / ADAPTER_CONFIG)
    model = skeleton(base)
    prefix = f"{model.base_model_prefix}."
    for key in ("target_modules", "modules_to_save", "exclude_modules", "target_parameters"):
        if isinstance(settings.get(key), list):
            settings[key] = [name.removeprefix(prefix) for name in settings[key]]
    for key in ("rank_pattern", "alpha_pattern"):
        settings[key] = {name.removeprefix(prefix): value for name, value in (settings.get(key) or {}).items()}
    if settings.get("layers_to_transform") is not None and not settings.get("layers_pattern"):
        settings["layers_pattern"] = layers_pattern(model)
    write_json(folder / ADAPTER_CONFIG, settings)


def rewrite_tensors(base: Base, folder: Path, scale: float) -> None:
    """Scale an adapter, and rename its tensors to the names that they have in the model with its LM head.

    Args:
        base: Base of the adapter.
        folder: Adapter folder; its weight file is rewritten if anything changes.
        scale: Factor of the update.

    Raises:
        SempaError: If a scaled value overflows.
    """
    from safetensors.torch import load_file, save_file

    path = folder / ADAPTER_WEIGHTS
    saved = load_file(path)
    model = skeleton(base)
    tensors = full_names(saved, _tensors_on(model, _lora_settings(folder)), model.base_model_prefix)
    if scale == 1 and tensors.keys() == saved.keys():
        return
    scaled = {key: scale * tensor if any(up in key for up in _UP) else tensor for key, tensor in tensors.items()}
    if bad := [key for key, tensor in scaled.items() if not tensor.isfinite().all()]:
        raise SempaError(
            f"--scale {scale} takes the tensor {min(bad)} beyond what its type can hold. Choose a smaller one."
        )
    save_file(scaled, path, metadata={"format": "pt"})
