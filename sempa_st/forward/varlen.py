"""Varlen attention: all sequences of a batch in one row without padding, by FlashAttention on CUDA.

``README.md`` in this folder draws it.
"""

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

from sempa_st.forward.decoder import last_hidden_states, reads_mask_and_positions
from sempa_st.model.patching import attention_implementation

ATTENTIONS = {"sdpa": "sempa_st_sdpa", "eager": "sempa_st_eager"}
"""Attention functions of transformers, and ours that run the same code unless a pass gives sequence boundaries."""
_BOUNDARIES = ("cu_seq_lens_q", "max_length_q")
"""Transformers' names for the cumulative sequence lengths and the longest length, as passed to attention functions."""
_UNSUPPORTED_KWARGS = ("softcap", "s_aux", "position_bias")
"""Arguments of some models' attention beyond a scale and a window."""
_LARGEST_HEAD, _HEAD_STEP = 256, 8
_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs that have the kernel (Ampere)."""


class VarlenUnsupported(Exception):  # noqa: N818 (the caller then takes another way)
    """A decoder's attention needs something that the varlen kernel does not offer."""


def supports_varlen(decoder: Any) -> bool:
    """Whether the kernel runs a decoder: on CUDA, in 16 bits, with an attention that it can replace."""
    return (
        decoder.device.type == "cuda"
        and decoder.dtype in {torch.bfloat16, torch.float16}
        and torch.cuda.get_device_capability(decoder.device) >= _CAPABILITY
        and torch.backends.cuda.is_flash_attention_available()
        and attention_is_exchangeable(decoder)
    )


def attention_is_exchangeable(decoder: Any) -> bool:
    """Whether a decoder's attention can be replaced by one that knows a scale and a window and nothing else."""
    config = decoder.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        reads_mask_and_positions(decoder)
        and attention_implementation(config) in {*ATTENTIONS, *ATTENTIONS.values()}
        and width <= _LARGEST_HEAD
        and getattr(config, "attn_logit_softcapping", None) is None
    )


def last_states_varlen(decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last tokens' hidden states, of shape (batch, hidden), by varlen attention.

    Args:
        decoder: Layers without the LM head, for which :func:`supports_varlen` holds. It keeps our attention function of
            :data:`ATTENTIONS`, which leaves all other passes as they were, also in other threads.
        input_ids: Token ids of shape (batch, seq_len).
        attention_mask: 0 on padding, which may stand anywhere, of the same shape.

    Raises:
        VarlenUnsupported: If the decoder's attention needs more than a scale, a window and sequence boundaries.
    """
    kept = attention_mask.bool()
    lengths = kept.sum(dim=1)
    ends = lengths.cumsum(0)
    boundaries = dict(zip(_BOUNDARIES, (nn.functional.pad(ends, (1, 0)).int(), int(lengths.max())), strict=True))
    _select_varlen(decoder)
    states = last_hidden_states(
        decoder,
        input_ids=input_ids[kept][None],
        position_ids=(kept.cumsum(dim=1) - 1)[kept][None],
        # Transformers builds no mask of its own if it gets one of four dimensions; nothing reads this one.
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=decoder.dtype, device=decoder.device),
        use_cache=False,
        **boundaries,
    )
    return states[0, ends - 1]


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, starts: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Run causal attention within each sequence, by FlashAttention.

    Args:
        queries: Of shape (tokens, heads, head_dim), all sequences one after another.
        keys: Of the same shape.
        values: Of the same shape.
        starts: Cumulative sequence lengths from 0, of shape (batch + 1,), int32.
        longest: Length of the longest sequence in tokens.
        scale: Factor of the scores.
        window: Number of tokens that a token sees, itself included; None for all before it.
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
    """Run :func:`attend` if the pass gives sequence boundaries, else ``plain``, a function of transformers."""
    if any(kwargs.get(name) is None for name in _BOUNDARIES):
        return plain(module, query, key, value, attention_mask, **kwargs)
    size, unsupported = query.shape[-1], [name for name in _UNSUPPORTED_KWARGS if kwargs.get(name) is not None]
    if unsupported or size % _HEAD_STEP or value.shape[-1] != size:
        raise VarlenUnsupported(type(module).__name__)
    groups = query.shape[1] // key.shape[1]
    keys, values = (states[0].transpose(0, 1).repeat_interleave(groups, dim=1) for states in (key, value))
    scale = kwargs.get("scaling") or size**-0.5
    starts, longest = (kwargs[name] for name in _BOUNDARIES)
    states = attend(query[0].transpose(0, 1), keys, values, starts, longest, scale, kwargs.get("sliding_window"))
    return states[None], None


def _eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the eager attention of a module's architecture, which has this name in the architecture's file."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)


def _select_varlen(decoder: Any) -> None:
    name = attention_implementation(decoder.config.get_text_config())
    if name in ATTENTIONS:
        decoder.set_attn_implementation(ATTENTIONS[name])


# On import: a model unpickled from another process has these names in its config.
AttentionInterface.register(ATTENTIONS["sdpa"], partial(_attention, sdpa_attention_forward))
AttentionInterface.register(ATTENTIONS["eager"], partial(_attention, _eager))
AttentionMaskInterface.register(ATTENTIONS["sdpa"], cast(Callable[..., Any], sdpa_mask))
AttentionMaskInterface.register(ATTENTIONS["eager"], cast(Callable[..., Any], eager_mask))
