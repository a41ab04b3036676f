"""A decoder's layers, and runs that go on from a key/value cache, with padding in the middle of a row."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from sempa_st.errors import SempaError

_ATTENTION = {"full_attention", "sliding_attention", "attention"}


class EndedEarly(Exception):  # noqa: N818 (it ends a pass early and is no error)
    """A forward pass is over before its last layer; ``states`` are what it came to."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def last_hidden_states(decoder: Any, **inputs: Any) -> Tensor:
    """Run a decoder and return its last hidden states, or those at which the pass was ended (:class:`EndedEarly`)."""
    try:
        states: Tensor = decoder(**inputs).last_hidden_state
    except EndedEarly as ended:
        return ended.states
    return states


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
    return last_hidden_states(
        decoder,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=True,
        **{cache_argument(decoder): cache},
    )


def cache_argument(model: Any) -> str:
    """Return what a model's ``forward`` calls its key/value cache: ``cache`` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


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


def layers_of(decoder: Any) -> nn.ModuleList:
    """Return the list of a decoder's layers.

    Raises:
        SempaError: If it has none by the name that Llama, Gemma, OPT, GPT-NeoX and most others have for it.
    """
    layers = _layers(decoder)
    if layers is None:
        raise SempaError(f"{type(decoder).__name__} has no list of layers. Expected a decoder such as Llama or Gemma.")
    return layers


def last_layer_of(decoder: Any) -> nn.Module | None:
    """Return the last layer, or None for a decoder of another build (GPT-2)."""
    layers = _layers(decoder)
    return None if layers is None else layers[-1]


def _layers(decoder: Any) -> nn.ModuleList | None:
    # Its holder is among the first modules; all of them are gone through only where there is none.
    lists = (getattr(module, "layers", None) for module in decoder.modules())
    return next((layers for layers in lists if isinstance(layers, nn.ModuleList)), None)
