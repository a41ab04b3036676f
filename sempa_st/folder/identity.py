"""What tells an open model from others, and from itself before it was changed."""

from __future__ import annotations

import hashlib
import sys
from typing import TYPE_CHECKING, Any

from sempa_st.folder.digests import digest_in, digested_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_PART = 1 << 24
"""Numbers that are copied from a device at once."""


def vector_settings(model: SentenceTransformer) -> dict[str, Any]:
    """Return what of a model decides a vector, beside its files and how it was loaded; it may be changed at any time.

    Nothing of it differs between machines; only an "auto" dtype depends on the device.
    """
    return {
        "template": getattr(model[0], "template", None),
        "max_seq_length": model.max_seq_length,
        "truncate_dim": model.truncate_dim,
        "prompts": model.prompts,
        "default_prompt_name": model.default_prompt_name,
    }


def current_name(model: SentenceTransformer) -> str | None:
    """Return a name whose digest changes with the settings and the weights of a model that is open.

    Args:
        model: Any model.

    Returns:
        The name; None for a model that :func:`sempa_st.load` has not opened.
    """
    name = model.model_card_data.model_name or ""
    if not digest_in(name):
        return None
    now = {
        "name": name,
        "similarity": model.similarity_fn_name,
        "truncation": getattr(model.tokenizer, "truncation_side", None),
        "adapters": _adapters(model),
        "weights": _weights_digest(model),
    }
    return digested_name(name, vector_settings(model) | now)


def _adapters(model: SentenceTransformer) -> list[str]:
    """Return which adapters act in each of PEFT's layers, and how strongly."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    return [f"{each.active_adapters} {each.disable_adapters} {getattr(each, 'scaling', '')}" for each in layers]


def _weights_digest(model: SentenceTransformer) -> str:
    """Return a SHA-256 (hex) of all weights that training can change."""
    import torch

    digest = hashlib.sha256()
    for name, weight in model.named_parameters():  # tied ones once
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        for part in () if weight.is_meta else weight.detach().flatten().split(_PART):
            digest.update(memoryview(part.cpu().contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()
