"""What an adapter holds beside low-rank updates of linear layers, and which copies can be made of it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.library_errors import readable
from sempa_st.errors import SempaError
from sempa_st.model.base_model import Base, load_config
from sempa_st.model.peft_models import ADAPTER_CONFIG, ADAPTER_WEIGHTS, full_names
from sempa_st.utils.files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LOW_RANK = {
    "alora_invocation_tokens", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "use_rslora",
}  # fmt: skip
"""Settings under which an adapter is low-rank updates s B A and nothing else."""
_STARTS = (None, True, "gaussian", "orthogonal", "eva")
"""Ways to start the two factors that leave the base's weights as they are."""
_EMBEDDING = "an update of an embedding"
_READ_AS_THEY_ARE = {"modules_to_save", "bias", "trainable_token_indices", "lora_bias", "init_lora_weights", _EMBEDDING}
"""What plain sentence-transformers applies like PEFT."""
_UP = ("lora_B", "lora_embedding_B")


def extras(folder: Path) -> list[str]:
    """Return what the adapter in ``folder`` holds beside low-rank updates of linear layers, sorted; mostly settings."""
    settings = read_json(folder / ADAPTER_CONFIG)
    found = {name for name, value in settings.items() if value and name not in _LOW_RANK}
    if settings.get("bias") == "none":
        found.discard("bias")
    if settings.get("init_lora_weights") in _STARTS:
        found.discard("init_lora_weights")
    if any("lora_embedding" in name for name in _shapes(folder)):
        found.add(_EMBEDDING)
    return sorted(found)


def check_scaled(name: str, folder: Path) -> None:
    """Refuse the adapter of ``name`` in ``folder`` unless what it changes is proportional to its B matrices.

    Raises:
        SempaError: If it holds something else, which the message names.
    """
    _refuse(name, folder, "be scaled", {"lora_bias", _EMBEDDING})


def check_mean(name: str, folder: Path) -> None:
    """Refuse an adapter unless it is B A alone, of which a mean can be taken; otherwise as :func:`check_scaled`."""
    _refuse(name, folder, "be averaged", set())


def check_activated(base: Base, name: str, folder: Path) -> None:
    """Refuse an activated adapter, just made of a plain one, unless all of it acts from its tokens on.

    Raises:
        SempaError: If it would change other text, or lies on layers that PEFT does not activate it on.
    """
    _refuse(name, folder, "be activated, since other text would not get the base's exact output", set())
    try:
        _tensors_on(skeleton(base), folder)
    except (ValueError, RuntimeError) as error:
        raise SempaError(
            f"The adapter of {name} cannot be activated: PEFT has no activated form for all of its layers ({error}). "
            "Leave out --activate."
        ) from error


def check_native(base: Base, name: str, folder: Path) -> None:
    """Refuse an adapter unless plain sentence-transformers, which opens a decoder without its head, applies all of it.

    Raises:
        SempaError: If it is of a kind that is misread there, or its settings do not find its layers.
    """
    advice = "have the format native, in which plain sentence-transformers would misread it"
    _refuse(name, folder, advice, _READ_AS_THEY_ARE, "--format custom")
    model = skeleton(base)
    inner = f"base_model.model.{model.base_model_prefix}."
    expected = {key.replace(inner, "base_model.model.", 1): shape for key, shape in _shapes(folder).items()}
    head = model.get_output_embeddings()
    heads = tuple(f"base_model.model.{key}." for key, module in model.named_modules() if module is head)
    try:
        found = _tensors_on(model.base_model, folder)
    except ValueError:  # it finds no layer at all
        found = {}
    lost = {key for key, shape in expected.items() if not key.startswith(heads) and _other(found, key, shape)}
    if lost:
        raise SempaError(
            f"The adapter of {name} cannot have the format native: its settings do not find {len(lost)} of its tensors "
            f"(first: {min(lost)}) in a decoder without the LM head, which plain sentence-transformers opens. Expected "
            "--format custom."
        )


def _other(found: dict[str, Any], key: str, shape: list[int]) -> bool:
    # PEFT keeps a copy of a base's embedding beside an update of it, and reads it into the base.
    return not key.endswith(".base_layer.weight") and (key not in found or list(found[key].shape) != shape)


def _refuse(name: str, folder: Path, what: str, allowed: Collection[str], instead: str | None = None) -> None:
    odd = [extra for extra in extras(folder) if extra not in allowed]
    if odd:
        raise SempaError(
            f"The adapter of {name} ({', '.join(odd)}) cannot {what}. Expected "
            f"{instead or 'low-rank updates of linear layers and nothing else'}."
        )


def _shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _tensors_on(model: Any, folder: Path) -> dict[str, Any]:
    """Return the tensors that the settings in ``folder`` ask for on a model without weights."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    config: Any = PeftConfig.from_pretrained(str(folder))
    # Some ways to start would look at the base's weights.
    config.inference_mode, config.init_lora_weights = True, True
    tensors: dict[str, Any] = get_peft_model_state_dict(PeftModel(model, config), save_embedding_layers=False)
    return tensors


def skeleton(base: Base) -> PreTrainedModel:
    """Return a base without its weights (on the meta device)."""
    import torch
    from transformers import AutoModelForCausalLM

    with readable(base.folder), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(load_config(base.folder), trust_remote_code=False)
    return model


def layers_pattern(model: PreTrainedModel) -> list[str]:
    """Return what the list of a decoder's layers is called, by which PEFT finds it with the LM head and without."""
    from torch import nn

    count = model.config.get_text_config().num_hidden_layers
    lists = [(name, part) for name, part in model.base_model.named_modules() if isinstance(part, nn.ModuleList)]
    return [name.rpartition(".")[2] for name, part in lists if len(part) == count][:1]


def write_native_settings(base: Base, folder: Path) -> None:
    """Rewrite an adapter's settings so that they find the same layers with the LM head and without it."""
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
    """Scale the update of the adapter in ``folder``, and give its tensors the names that they have with the LM head."""
    from safetensors.torch import load_file, save_file

    path = folder / ADAPTER_WEIGHTS
    held = load_file(path)
    model = skeleton(base)
    layers = model.base_model_prefix
    tensors = full_names(held, _tensors_on(model, folder), layers)
    if scale == 1 and tensors.keys() == held.keys():
        return
    scaled = {key: scale * tensor if any(up in key for up in _UP) else tensor for key, tensor in tensors.items()}
    if bad := [key for key, tensor in scaled.items() if not tensor.isfinite().all()]:
        raise SempaError(f"--scale {scale} takes the tensor {min(bad)} beyond what its type can hold. Choose less.")
    save_file(scaled, path, metadata={"format": "pt"})
