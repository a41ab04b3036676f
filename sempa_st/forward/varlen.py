"""Rows one behind another in one long row, without padding, each attending to itself by FlashAttention: on CUDA."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from sempa_st.forward.decoder import accepts_position_ids, attention_only, last_hidden_states
from sempa_st.model.patching import attention_implementation

ATTENTIONS = {"sdpa": "sempa_st_sdpa", "eager": "sempa_st_eager"}
"""Attention functions of transformers, and those of ours that do the same for any pass but one of rows by edges."""
_OF_ROWS = ("cu_seq_lens_q", "max_length_q")
"""What transformers calls the rows' edges and the longest row's tokens, on their way to an attention function."""
_UNSUPPORTED_KWARGS = ("softcap", "s_aux", "position_bias")
"""What some models ask of an attention function beyond its scale and window."""
_LARGEST_HEAD, _HEAD_STEP = 256, 8
_CAPABILITY = (8, 0)
"""Oldest GPUs that have the kernel (Ampere)."""


class VarlenUnsupported(Exception):  # noqa: N818 (another way is taken then)
    """A decoder's attention asks for something that FlashAttention does not do here."""


def supports_varlen(decoder: Any) -> bool:
    """Whether a decoder is where the kernel is (CUDA, 16-bit floating point) and asks no more of it than it does."""
    return (
        decoder.device.type == "cuda"
        and decoder.dtype in {torch.bfloat16, torch.float16}
        and torch.cuda.get_device_capability(decoder.device) >= _CAPABILITY
        and torch.backends.cuda.is_flash_attention_available()
        and attention_is_exchangeable(decoder)
    )


def attention_is_exchangeable(decoder: Any) -> bool:
    """Whether a decoder's attention can be exchanged for one that knows a scale and a window and nothing else."""
    config = decoder.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        decoder.is_backend_compatible()
        and attention_implementation(config) in {*ATTENTIONS, *ATTENTIONS.values()}
        and accepts_position_ids(decoder)
        and attention_only(decoder)
        and width <= _LARGEST_HEAD
        and getattr(config, "attn_logit_softcapping", None) is None
    )


def last_states_varlen(decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the states at the rows' last tokens, of shape (rows, hidden).

    Args:
        decoder: Layers without the LM head, for which :func:`supports_varlen` holds. Its attention becomes ours of
            :data:`ATTENTIONS` for good, with which any other pass, of another thread too, is what it was.
        input_ids: Token ids of shape (rows, tokens).
        attention_mask: 0 on padding, which may stand anywhere, of the same shape.

    Raises:
        VarlenUnsupported: If the decoder's attention asks for more than a scale, a window and the rows' edges.
    """
    kept = attention_mask.bool()
    lengths = kept.sum(dim=1)
    ends = lengths.cumsum(0)
    rows = dict(zip(_OF_ROWS, (nn.functional.pad(ends, (1, 0)).int(), int(lengths.max())), strict=True))
    _use_ours(decoder)
    states = last_hidden_states(
        decoder,
        input_ids=input_ids[kept][None],
        position_ids=(kept.cumsum(dim=1) - 1)[kept][None],
        # Transformers takes a mask of four dimensions for a finished one; this one is never looked at.
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=decoder.dtype, device=decoder.device),
        use_cache=False,
        **rows,
    )
    return states[0, ends - 1]


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Attend within rows, each token to those before it and itself, by FlashAttention.

    Args:
        queries: Shape (tokens, heads, size).
        keys: Of the same shape.
        values: Of the same shape.
        starts: Where each row starts and the last one ends, of shape (rows + 1,), int32.
        longest: Tokens of the longest row.
        scale: Of the scores.
        window: Tokens that one sees, itself among them; None for all.
    """
    from torch.nn.attention.varlen import varlen_attn

    seen = (-1 if window is None else window - 1, 0)
    states = varlen_attn(queries, keys, values, starts, starts, longest, longest, scale=scale, window_size=seen)
    assert isinstance(states, Tensor)
    return states


def _attention(
    plain: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> Any:
    """Run :func:`attend` where rows are told by their edges, and else ``plain``, as one of transformers' functions."""
    if any(kwargs.get(name) is None for name in _OF_ROWS):
        return plain(module, query, key, value, attention_mask, **kwargs)
    size, further = query.shape[-1], [name for name in _UNSUPPORTED_KWARGS if kwargs.get(name) is not None]
    if further or size % _HEAD_STEP or value.shape[-1] != size:
        raise VarlenUnsupported(type(module).__name__)
    groups = query.shape[1] // key.shape[1]
    keys, values = (states[0].transpose(0, 1).repeat_interleave(groups, dim=1) for states in (key, value))
    scale = kwargs.get("scaling") or size**-0.5
    starts, longest = (kwargs[name] for name in _OF_ROWS)
    states = attend(query[0].transpose(0, 1), keys, values, starts, longest, scale, kwargs.get("sliding_window"))
    return states[None], None


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the eager attention of a module's architecture, which transformers has under this name in its file."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _use_ours(decoder: Any) -> None:
    name = attention_implementation(decoder.config.get_text_config())
    if name in ATTENTIONS:
        decoder.set_attn_implementation(ATTENTIONS[name])


# On import, since a model may come from another process with the names in its settings.
AttentionInterface.register(ATTENTIONS["sdpa"], partial(_attention, sdpa_attention_forward))
AttentionInterface.register(ATTENTIONS["eager"], partial(_attention, _eager))
AttentionMaskInterface.register(ATTENTIONS["sdpa"], cast(Callable[..., Any], sdpa_mask))
AttentionMaskInterface.register(ATTENTIONS["eager"], cast(Callable[..., Any], eager_mask))
