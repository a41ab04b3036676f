"""Models with a LoRA adapter of PEFT: loading one, and where an activated one (aLoRA) acts.

This file needs ``patching.py`` and nothing else of sempa_st; see ``prompt_eol.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from .patching import EVERY_TOKEN, alora_acting_on, patch_alora

ADAPTER_CONFIG, ADAPTER_WEIGHTS = ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME
_START_AT_ZERO = ("lora_B", "lora_embedding_A")
"""Parts of the names of matrices that are zero before training."""


def is_peft_model(model: Any) -> bool:
    """Whether a model is PEFT's wrapper, and not a model that transformers itself added an adapter to."""
    return hasattr(model, "get_base_model")


def invocation_tokens(model: Any) -> list[int]:
    """Return the tokens from which on a model's activated adapter (aLoRA) acts; empty for any other model."""
    if not is_peft_model(model):
        return []
    return getattr(model.active_peft_config, "alora_invocation_tokens", None) or []


@contextmanager
def alora_on_last(model: Any, tokens: list[int] | None) -> Iterator[None]:
    """Let an activated adapter act on the last tokens of each sequence only, within a block and in this thread.

    PEFT searches the input of the PEFT model for the invocation tokens. This package runs the decoder alone, always on
    the template, so it knows where they are.

    Args:
        model: Any model; nothing happens without an activated adapter.
        tokens: For each sequence, the number of tokens at its end that the adapter acts on, padding on the right
            included. None for all tokens, at the price of a plain adapter; right for an adapter whose invocation tokens
            are the template's prefix.
    """
    if not invocation_tokens(model):
        yield
        return
    patch_alora(model)  # the adapter may have been added after the module was made
    with alora_acting_on(EVERY_TOKEN if tokens is None else tokens):
        yield


def load_adapter(model: PreTrainedModel, folder: str | Path, **settings: Any) -> Any:
    """Add the LoRA adapter in ``folder`` to a causal language model, and check that all of it took effect.

    Args:
        model: The base model with its LM head; its linear layers are replaced in place. On the meta device names and
            shapes are compared, and nothing is loaded.
        folder: Local folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        **settings: PEFT settings to use instead of the folder's, such as ``lora_dropout``.

    Returns:
        The PEFT model, with the adapter active and all weights frozen.

    Raises:
        ValueError: If a tensor is missing, unexpected, of another shape or not finite, or if the adapter is all zero.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    for name, value in settings.items():
        setattr(config, name, value)
    if on_meta := model.device.type == "meta":
        config.init_lora_weights = True  # some initialisations read the base's weights
    tensors = load_file(Path(folder, ADAPTER_WEIGHTS))
    tuned = PeftModel(model, config)
    expected = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    tensors = full_names(tensors, expected, model.base_model_prefix)
    own = tuned.state_dict()
    # PEFT saves the base's embedding beside an update of it.
    copies = {name: own[name] for name in tensors if name.endswith(".base_layer.weight") and name in own}
    _check_fit(expected | copies, tensors)
    if on_meta:
        return tuned
    if any(not torch.allclose(weight.float(), tensors[name].float(), rtol=0.01) for name, weight in copies.items()):
        raise ValueError(f"It carries another embedding than the base has, in the tensor {min(copies)}.")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in copies}
    set_peft_model_state_dict(tuned, tensors)
    live = get_peft_model_state_dict(tuned, save_embedding_layers=False)
    if any(not torch.equal(live[name].to(saved.dtype), saved) for name, saved in tensors.items()):
        raise ValueError("Its tensors were read but did not reach the model. Check the peft version.")
    moved = [bool(tensor.any()) for name, tensor in tensors.items() if any(zero in name for zero in _START_AT_ZERO)]
    if moved and not any(moved) and all("lora_" in name for name in tensors):
        raise ValueError("It changes nothing: its B matrices are all zero, as before training.")
    return tuned.eval()


def full_names(tensors: dict[str, Tensor], expected: Collection[str], layers: str) -> dict[str, Tensor]:
    """Return an adapter's tensors under their names in a model with an LM head.

    ``SentenceTransformer.save_pretrained`` saves from the layers alone, without the name of these (``layers``).
    """
    outer = "base_model.model."
    renamed = {f"{outer}{layers}.{name.removeprefix(outer)}": tensor for name, tensor in tensors.items()}
    return renamed if renamed.keys() == set(expected) else tensors


def _check_fit(expected: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    faults = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "of another shape": {name for name in expected.keys() & tensors if expected[name].shape != tensors[name].shape},
    }
    descriptions = [f"{len(names)} {fault} (first: {min(names)})" for fault, names in faults.items() if names]
    if descriptions:
        raise ValueError(f"It does not fit this base; tensors: {'; '.join(descriptions)}.")
    if bad := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"{len(bad)} of its tensors hold infinite or NaN values (first: {min(bad)}), as after a training that "
            "diverged or a damaged download."
        )
