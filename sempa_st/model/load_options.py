"""Check and apply what a model is loaded with: arguments of ``from_pretrained``, prompts, width, kind of attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedModel

from sempa_st.errors import SempaError
from sempa_st.model.patching import attention_implementation

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_OWN_ARGUMENTS = {
    **dict.fromkeys(("dtype", "torch_dtype"), "Pass dtype=... to load."),
    **dict.fromkeys(("token", "use_auth_token"), "Pass token=... to load."),
    "cache_dir": "Pass cache_folder=... to load.",
    "revision": "Pass revision=... to load.",
    "trust_remote_code": "Code in a model's folder is never run; leave it out.",
    "use_safetensors": "Weights are read from safetensors only; leave it out.",
    **dict.fromkeys(
        ("config", "state_dict", "ignore_mismatched_sizes", "output_loading_info"),
        "Weights are checked against the folder's config.json; leave it out.",
    ),
}
"""Arguments of ``from_pretrained`` that ``model_kwargs`` must not have, and what to do."""


def checked_model_kwargs(model_kwargs: Mapping[str, Any] | None, device: str | None) -> dict[str, Any]:
    """Return the further arguments of ``from_pretrained``.

    Args:
        model_kwargs: What the user gave.
        device: The user's device, which a ``device_map`` would contradict.

    Raises:
        SempaError: If an argument is one that :func:`sempa_st.load` sets.
    """
    arguments = dict(model_kwargs or {})
    for name in arguments:
        if name in _OWN_ARGUMENTS:
            raise SempaError(f"model_kwargs sets {name!r}, which sempa_st.load sets itself. {_OWN_ARGUMENTS[name]}")
    if device is not None and "device_map" in arguments:
        raise SempaError(f"Both device {device!r} and a device_map in model_kwargs are given. Give one of them.")
    return arguments


def set_encode_options(model: SentenceTransformer, truncate_dim: int | None, prompts: Mapping[str, str] | None) -> None:
    """Set the width of a model's vectors and more prompts, each unless None.

    Raises:
        SempaError: If the model has no vectors that wide, or a prompt is no text.
    """
    if truncate_dim is not None:
        model.truncate_dim = None
        width = model.get_embedding_dimension()
        if truncate_dim < 1 or (width is not None and truncate_dim > width):
            raise SempaError(f"truncate_dim is {truncate_dim}. Expected a number from 1 to {width}, the model's width.")
        model.truncate_dim = truncate_dim
    for name, prompt in (prompts or {}).items():
        if not isinstance(prompt, str):
            raise SempaError(f"The prompt {name!r} is {prompt!r}. Expected a text.")
        model.prompts[name] = prompt


def avoid_broken_sdpa(model: nn.Module, device: str) -> None:
    """Select eager attention where a device's faster attention gives wrong hidden states.

    Under a mask, CUDA's memory-efficient kernel is wrong for some numbers of keys (32 n + 1) if one key/value head is
    broadcast to all query heads, as in the small Gemma models (pytorch/pytorch issue 191937).

    Args:
        model: Any module that contains models of transformers.
        device: Device that it will run on.
    """
    if not device.startswith("cuda"):
        return
    for part in (part for part in model.modules() if isinstance(part, PreTrainedModel)):
        config = part.config.get_text_config()
        one_head = getattr(config, "num_key_value_heads", None) == 1 or bool(getattr(config, "multi_query", False))
        if one_head and attention_implementation(part.config) == "sdpa":
            part.set_attn_implementation("eager")
