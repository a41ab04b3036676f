"""The last layer for the tokens that are read: of all others it computes no more than what these attend to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Cache

_OF_TOKENS = ("position_ids", "position_embeddings")
"""What a layer is given that has one entry a token, in its second dimension."""


_QUERIES_BY_KEYS = 4
"""Dimensions of a mask that has a row for each query."""


class _EnoughComputed(Exception):  # noqa: N818 (it ends a call early and is no error)
    pass


class _Kept:
    """Stands for a key/value cache: takes up what a layer adds, and gives it back to the same layer run again."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._found: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._found is None:
            self._found = self._cache.update(keys, values, *args, **kwargs)
            raise _EnoughComputed
        return self._found


@contextmanager
def read_at(layer: nn.Module, places: Tensor) -> Iterator[None]:
    """Let a decoder's last layer return the states at some tokens alone, for the time of a forward pass with a cache.

    The others' attention, output projection and MLP are left out: nothing would read what comes of them. A layer that
    is called in another way than Llama's (with a cache and a mask of queries by keys, by name) is run whole.

    Args:
        layer: The last layer, not checkpointed; no other thread may run it meanwhile (:func:`sempa_st.cached.alone`).
        places: Of the tokens that are read, of shape (rows, tokens read).
    """
    original, shadowed = layer.forward, layer.__dict__.get("forward")

    def forward(states: Tensor, *args: Any, **kwargs: Any) -> Any:
        caches = {name: _Kept(value) for name, value in kwargs.items() if isinstance(value, Cache)}
        mask = kwargs.get("attention_mask")
        if args or len(caches) != 1 or mask is None or mask.dim() != _QUERIES_BY_KEYS:
            return _output_at(original(states, *args, **kwargs), places)
        try:
            return _output_at(original(states, **{**kwargs, **caches}), places)  # it has no keys and values
        except _EnoughComputed:
            chosen = {key: _at(kwargs[key], places) for key in _OF_TOKENS if kwargs.get(key) is not None}
        chosen["attention_mask"] = mask.gather(2, places[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
        return original(_at(states, places), **{**kwargs, **chosen, **caches})

    layer.forward = forward
    try:
        yield
    finally:
        if shadowed is None:
            del layer.forward
        else:
            layer.forward = shadowed


def _output_at(output: Any, places: Tensor) -> Any:
    return (_at(output[0], places), *output[1:]) if isinstance(output, tuple) else _at(output, places)


def _at(tensors: Any, places: Tensor) -> Any:
    if isinstance(tensors, tuple):
        return tuple(_at(tensor, places) for tensor in tensors)
    tensors = tensors.expand(len(places), *tensors.shape[1:])
    index = places.view(*places.shape, *[1] * (tensors.dim() - 2))
    return tensors.gather(1, index.expand(-1, -1, *tensors.shape[2:]))
