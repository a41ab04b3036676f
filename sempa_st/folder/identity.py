"""What tells an open model from others, and from itself before it was changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sempa_st.folder.digests import digest_in, digested_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


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
    return digested_name(name, {**vector_settings(model), "name": name, "weights": _bit_sums(model)})


def _bit_sums(model: SentenceTransformer) -> list[int]:
    """Return the sum of the numbers of each tensor, their bits read as integers: exact, and changed by training."""
    import torch

    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    weights = [tensor.detach().flatten() for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta]
    return [int(tensor.view(integers[tensor.element_size()]).sum(dtype=torch.int64)) for tensor in weights]
