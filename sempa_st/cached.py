"""A decoder's layers, and runs that go on from a key/value cache, with padding in the middle of a row."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import DynamicCache

from sempa_st.errors import SempaError

_ATTENTION = {"full_attention", "sliding_attention", "attention"}
_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_LOCKS_LOCK = Lock()


def run_on(decoder: Any, cache: DynamicCache, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
    """Run tokens after those in the cache, which takes them up.

    Args:
        decoder: Layers without the LM head.
        cache: What was run before; empty at first.
        input_ids: Token ids of shape (rows, tokens).
        attention_mask: 0 on padding, of shape (rows, tokens in the cache + tokens); or what is added to the scores, of
            shape (rows, 1, tokens, tokens in the cache + tokens).
        positions: Of the tokens, padding not counted, of shape (rows, tokens) or (1, tokens).

    Returns:
        Last hidden states of shape (rows, tokens, hidden).
    """
    output = decoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    states: Tensor = output.last_hidden_state
    return states


def window_covers(decoder: Any, width: int) -> bool:
    """Whether rows of ``width`` tokens may hold padding in their middle: a sliding window counts it as distance."""
    window = getattr(decoder.config.get_text_config(), "sliding_window", None)
    return window is None or width <= window


def takes_positions(decoder: Any) -> bool:
    """Whether a decoder can be told positions, which padding or another row before a token would shift."""
    return "position_ids" in inspect.signature(decoder.forward).parameters


def only_attends(decoder: Any) -> bool:
    """Whether all layers attend: convolution or recurrence would carry one row's tokens over into the next row."""
    config = decoder.config.get_text_config()
    kinds = {kind for name in ("layer_types", "layers_block_type") for kind in getattr(config, name, None) or ()}
    return kinds <= _ATTENTION


def keeps_no_cache(decoder: Any) -> bool:
    """Whether layers are run again for their gradients (gradient checkpointing), with which no cache is kept."""
    return any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.modules())


@contextmanager
def alone(decoder: nn.Module) -> Iterator[None]:
    """Let one thread at a time run a decoder whose layers are changed for the time of a pass."""
    with _LOCKS_LOCK:
        lock = _LOCKS.setdefault(decoder, RLock())
    with lock:
        yield


def layers_of(decoder: Any) -> nn.ModuleList:
    """Return the list of a decoder's layers.

    Raises:
        SempaError: If it has none by the name that Llama, Gemma, OPT, GPT-NeoX and most others have for it.
    """
    layers: nn.ModuleList = layer_holder(decoder).layers
    return layers


def last_layer_of(decoder: Any) -> nn.Module | None:
    """Return the last layer, or None for a decoder of another build (GPT-2)."""
    holder = _holder(decoder)
    if holder is None:
        return None
    layers: nn.ModuleList = holder.layers
    return layers[-1]


def layer_holder(decoder: Any) -> Any:
    """Return the part of a decoder that has the list of layers as ``layers``.

    Raises:
        SempaError: If there is none.
    """
    holder = _holder(decoder)
    if holder is None:
        raise SempaError(f"{type(decoder).__name__} has no list of layers. Expected a decoder such as Llama or Gemma.")
    return holder


def _holder(decoder: Any) -> Any:
    # It is among the first modules; all of them are gone through only where there is none.
    holders = (module for module in decoder.modules() if isinstance(getattr(module, "layers", None), nn.ModuleList))
    return next(holders, None)
