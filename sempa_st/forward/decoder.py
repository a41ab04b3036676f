"""A decoder's layers, and runs that go on from a key/value cache, with padding in the middle of a row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from sempa_st.errors import SempaError
from sempa_st.model.patching import edited

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


def forward_with_cache(
    decoder: Any, cache: DynamicCache, input_ids: Tensor, attention_mask: Tensor, positions: Tensor
) -> Tensor:
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


def within_sliding_window(decoder: Any, width: int) -> bool:
    """Whether rows of ``width`` tokens may hold padding in their middle: a sliding window counts it as distance."""
    window = getattr(decoder.config.get_text_config(), "sliding_window", None)
    return window is None or width <= window


def accepts_position_ids(decoder: Any) -> bool:
    """Whether a decoder can be told positions, which padding or another row before a token would shift."""
    return "position_ids" in inspect.signature(decoder.forward).parameters


def attention_only(decoder: Any) -> bool:
    """Whether all layers attend: convolution or recurrence would carry one row's tokens over into the next row."""
    config = decoder.config.get_text_config()
    kinds = {kind for name in ("layer_types", "layers_block_type") for kind in getattr(config, name, None) or ()}
    return kinds <= _ATTENTION


def gradient_checkpointing_enabled(decoder: Any) -> bool:
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


_ATTENTION_NAMES = ("self_attn", "attention")
_PROJECTION = ("o_proj", "out_proj", "dense")


def attention_output(layer: nn.Module) -> nn.Module:
    """Return the projection from the concatenated heads to the hidden state.

    Raises:
        SempaError: If the layer's architecture has it under an unknown name.
    """
    attention = next((getattr(layer, name) for name in _ATTENTION_NAMES if hasattr(layer, name)), None)
    found = next((getattr(attention, name) for name in _PROJECTION if hasattr(attention, name)), None)
    if not isinstance(found, nn.Module):
        raise SempaError(
            f"The attention of {type(layer).__name__} has no output projection by a known name. Expected "
            f"{' or '.join(_ATTENTION)} with {', '.join(_PROJECTION)}, as in Llama, Gemma, OPT or GPT-NeoX."
        )
    return found


def states_after_layers(decoder: Any, run: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the states after some of the layers, of shape (rows, tokens, hidden); later layers are not run.

    Args:
        decoder: Layers without the LM head.
        run: Number of layers to run; the final norm is applied after the last one only.
        input_ids: Token ids of shape (rows, tokens).
        attention_mask: 0 on padding, of the same shape; or what is added to the scores, of shape (rows, 1, tokens,
            tokens), all positions then counting.
    """
    padding = attention_mask if attention_mask.dim() == 2 else (attention_mask[:, 0].amax(dim=1) == 0).long()
    # Positions count real tokens only, so that padding on the left moves no learned position embedding.
    positions = {"position_ids": (padding.cumsum(-1) - 1).clamp(min=0)} if accepts_position_ids(decoder) else {}
    with truncated(decoder, run):
        return last_hidden_states(
            decoder, input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
        )


def truncated(decoder: Any, run: int) -> AbstractContextManager[None]:
    """Let this thread's passes by :func:`last_hidden_states` end after some of a decoder's layers.

    Args:
        decoder: Layers without the LM head.
        run: Number of layers to run; the final norm is applied after the last one only.
    """
    layers = layers_of(decoder)
    if run == len(layers):
        return nullcontext()

    def end(output: Any) -> Any:
        raise EndedEarly(states_in(output))

    return edited(layers[run - 1], after=end)


def entering(module: nn.Module, change: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """Change the states that enter a module, for the time of a block and in this thread only.

    Args:
        module: A layer, or a part of one.
        change: Called with the states, of shape (rows, tokens, width); what it returns takes their place.
    """

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return edited(module, before=before)


def at_tokens(states: Tensor, marked: Tensor, new: Tensor) -> Tensor:
    """Return a copy of states in which each row's marked token has the row's new state.

    Args:
        states: Of shape (rows, tokens, width).
        marked: 1 on one token a row, of shape (rows, tokens).
        new: Of shape (rows, width).
    """
    return torch.where(marked.bool()[:, :, None], new[:, None].to(states.dtype), states)


def states_in(output: Any) -> Tensor:
    """Return the states in what a layer returns: that, or the first of several things."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states
