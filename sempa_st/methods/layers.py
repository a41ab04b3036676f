"""A decoder's layers by the names that the architectures give them, and forward passes that end or look in early."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sempa_st.cached import EndedEarly, last_hidden_states, layers_of, takes_positions
from sempa_st.errors import SempaError
from sempa_st.patching import edited

_ATTENTION = ("self_attn", "attention")
_PROJECTION = ("o_proj", "out_proj", "dense")


def attention_output(layer: nn.Module) -> nn.Module:
    """Return the projection from the concatenated heads to the hidden state.

    Raises:
        SempaError: If the layer's architecture has it under an unknown name.
    """
    attention = next((getattr(layer, name) for name in _ATTENTION if hasattr(layer, name)), None)
    found = next((getattr(attention, name) for name in _PROJECTION if hasattr(attention, name)), None)
    if not isinstance(found, nn.Module):
        raise SempaError(
            f"The attention of {type(layer).__name__} has no output projection by a known name. Expected "
            f"{' or '.join(_ATTENTION)} with {', '.join(_PROJECTION)}, as in Llama, Gemma, OPT or GPT-NeoX."
        )
    return found


def states_after(decoder: Any, run: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
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
    positions = {"position_ids": (padding.cumsum(-1) - 1).clamp(min=0)} if takes_positions(decoder) else {}
    with ending_after(decoder, run):
        return last_hidden_states(
            decoder, input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
        )


def ending_after(decoder: Any, run: int) -> AbstractContextManager[None]:
    """Let this thread's passes by :func:`sempa_st.cached.last_hidden_states` end after some of a decoder's layers.

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
