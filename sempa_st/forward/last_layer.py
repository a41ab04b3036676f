"""The last layer for the tokens that are read: of all others it computes no more than what these attend to."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from sempa_st.model.patching import edited

_OF_TOKENS = ("position_ids", "position_embeddings")
"""What a layer is given that has one entry a token, in its second dimension."""
_QUERIES_BY_KEYS = 4
"""Dimensions of a mask that has a row for each query."""


class _KeysValuesDone(Exception):  # noqa: N818 (it ends a call early and is no error)
    pass


class _RecordingCache:
    """Stands for a key/value cache: takes up what a layer adds, and gives it back to the same layer run again."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._found: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._found is None:
            self._found = self._cache.update(keys, values, *args, **kwargs)
            raise _KeysValuesDone
        return self._found


def last_layer_only_at(layer: nn.Module, places: Tensor) -> AbstractContextManager[None]:
    """Let a decoder's last layer return the states at some tokens alone, in this thread's forward pass with a cache.

    The others' attention, output projection and MLP are left out: nothing would read what comes of them. A layer that
    is called in another way than Llama's (with a cache and a mask of queries by keys, by name) is run whole.

    Args:
        layer: The last layer, not checkpointed.
        places: Of the tokens that are read, of shape (rows, tokens read).
    """
    narrowed = False

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        nonlocal narrowed
        narrowed = False
        states = args[0] if args else kwargs.get("hidden_states")
        caches = {name: _RecordingCache(value) for name, value in kwargs.items() if isinstance(value, Cache)}
        mask = kwargs.get("attention_mask")
        if len(args) > 1 or states is None or len(caches) != 1 or mask is None or mask.dim() != _QUERIES_BY_KEYS:
            return args, kwargs
        try:
            # Keys and values of all tokens; the call ends where the attention would begin.
            layer.forward(*args, **{**kwargs, **caches})
        except _KeysValuesDone:
            narrowed = True
        if not narrowed:  # it has no keys and values
            return args, kwargs
        chosen = {key: _at(kwargs[key], places) for key in _OF_TOKENS if kwargs.get(key) is not None}
        chosen["attention_mask"] = mask.gather(2, places[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
        if not args:
            chosen["hidden_states"] = _at(states, places)
        return ((_at(states, places),) if args else args), {**kwargs, **chosen, **caches}

    def after(output: Any) -> Any:
        return output if narrowed else _output_at(output, places)

    return edited(layer, before=before, after=after)


def _output_at(output: Any, places: Tensor) -> Any:
    return (_at(output[0], places), *output[1:]) if isinstance(output, tuple) else _at(output, places)


def _at(tensors: Any, places: Tensor) -> Any:
    if isinstance(tensors, tuple):
        return tuple(_at(tensor, places) for tensor in tensors)
    tensors = tensors.expand(len(places), *tensors.shape[1:])
    index = places.view(*places.shape, *[1] * (tensors.dim() - 2))
    return tensors.gather(1, index.expand(-1, -1, *tensors.shape[2:]))
