"""Run the last layer for the pooled tokens only; other tokens contribute keys and values."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from sempa_st.model.patching import edited

_PER_TOKEN = ("position_ids", "position_embeddings")
"""Arguments of a layer that have one entry per token, in their second dimension."""
_OTHERS = ("hidden_states", "attention_mask", "cache_position")
"""Other arguments with tensors; the last one is for the cache alone."""
_DENSE_MASK_DIMS = 4
"""Dimensions of a mask of queries by keys."""


class _KeysValuesDone(Exception):  # noqa: N818 (it ends a call early and is no error)
    pass


class _RecordingCache:
    """A key/value cache that ends the layer's first call once it has the keys and values, and repeats them after."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._recorded: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._recorded is None:
            self._recorded = self._cache.update(keys, values, *args, **kwargs)
            raise _KeysValuesDone
        return self._recorded


def last_layer_only_at(layer: nn.Module, index: Tensor) -> AbstractContextManager[None]:
    """Let a decoder's last layer return the hidden states of some tokens only, within a block and in this thread.

    Nothing reads the other tokens' output, so the layer runs twice: up to the attention for all tokens, and whole for
    the pooled ones. For six tokens of which 2 and 5 are pooled::

        first call    keys and values      k0 k1 k2 k3 k4 k5      ends in the cache's update
        second call   queries                    q2       q5      attend to all keys above
                      output                     h2       h5      attention output, MLP

    A layer that is called in another way than Llama's (a cache and a mask of queries by keys, both by name, and no
    tensors besides Llama's) runs whole, and its output is cut.

    Args:
        layer: The last layer, without gradient checkpointing.
        index: Indices of the pooled tokens, of shape (batch, pooled).
    """
    narrowed = False

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal narrowed
        narrowed = False
        states = args[0] if args else kwargs.get("hidden_states")
        caches = {name: _RecordingCache(value) for name, value in kwargs.items() if isinstance(value, Cache)}
        mask = kwargs.get("attention_mask")
        if len(args) > 1 or states is None or len(caches) != 1 or mask is None or mask.dim() != _DENSE_MASK_DIMS:
            return args, kwargs
        if any(_has_tensors(value) for name, value in kwargs.items() if name not in (*_PER_TOKEN, *_OTHERS)):
            return args, kwargs  # they may have an entry per token, as the scales of queries in BEAM
        try:
            layer.forward(*args, **{**kwargs, **caches})
        except _KeysValuesDone:
            narrowed = True
        if not narrowed:  # the layer has no keys and values
            return args, kwargs
        chosen = {key: _at(kwargs[key], index) for key in _PER_TOKEN if kwargs.get(key) is not None}
        chosen["attention_mask"] = mask.gather(2, index[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
        if not args:
            chosen["hidden_states"] = _at(states, index)
        return ((_at(states, index),) if args else args), {**kwargs, **chosen, **caches}

    def after(output: Any) -> Any:
        if narrowed:
            return output
        return (_at(output[0], index), *output[1:]) if isinstance(output, tuple) else _at(output, index)

    return edited(layer, before=before, after=after)


def _has_tensors(value: Any) -> bool:
    return any(isinstance(item, Tensor) for item in (value if isinstance(value, tuple) else (value,)))


def _at(tensors: Any, index: Tensor) -> Any:
    """Select tokens of a tensor (batch or 1, seq_len, ...), or of each tensor of a tuple."""
    if isinstance(tensors, tuple):
        return tuple(_at(tensor, index) for tensor in tensors)
    tensors = tensors.expand(len(index), *tensors.shape[1:])
    index = index.view(*index.shape, *[1] * (tensors.dim() - 2))
    return tensors.gather(1, index.expand(-1, -1, *tensors.shape[2:]))
