"""A decoder's properties and layers, and forward passes that stop early or continue from a key/value cache."""

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

_LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Settings that a decoder multiplies its logits by, as TRL reads them: Cohere's, Muse Glimmer's, Falcon-H1's."""
_ATTENTION = {"full_attention", "sliding_attention", "attention"}


class EndedEarly(Exception):  # noqa: N818 (it ends a forward pass early and is no error)
    """Ends a forward pass before its last layer; ``states`` are the hidden states so far."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


def last_hidden_states(decoder: Any, **inputs: Any) -> Tensor:
    """Run a decoder and return its last hidden states, or those at which :class:`EndedEarly` ended the pass."""
    try:
        return decoder(**inputs).last_hidden_state
    except EndedEarly as ended:
        return ended.states


def forward_with_cache(
    decoder: Any, cache: DynamicCache, input_ids: Tensor, attention_mask: Tensor, positions: Tensor
) -> Tensor:
    """Run tokens that follow those in the cache, and add them to the cache.

    Args:
        decoder: Layers without the LM head.
        cache: Keys and values of the ``cached`` tokens so far; empty at first.
        input_ids: Token ids of shape (batch, seq_len).
        attention_mask: 0 on padding, which may stand in the middle, of shape (batch, cached + seq_len). Or an additive
            attention mask, of shape (batch, 1, seq_len, cached + seq_len).
        positions: Positions of the tokens, padding not counted, of shape (batch, seq_len) or (1, seq_len).

    Returns:
        Last hidden states of shape (batch, seq_len, hidden).
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
    """Return the name of a model's argument for the key/value cache: ``cache`` since transformers 5.24."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def can_cache(decoder: Any) -> bool:
    """Whether keys and values are all that a decoder keeps of the tokens so far."""
    return attention_only(decoder) and cache_argument(decoder) in inspect.signature(decoder.forward).parameters


def reads_mask_and_positions(decoder: Any) -> bool:
    """Whether a token sees what the mask allows, at the position given, whatever its index in the row.

    This holds where the attention is one of transformers' attention functions. An attention of another kind may count
    in indices, as the local attention of GPT-Neo counts its window, and the chunked attention of Llama 4 its scale.
    """
    return accepts_position_ids(decoder) and attention_only(decoder) and decoder.is_backend_compatible()


def within_sliding_window(decoder: Any, width: int) -> bool:
    """Whether no sliding window of the masks that transformers builds is shorter than ``width`` tokens.

    Such a window counts indices of the row: padding in the middle too.
    """
    window = getattr(decoder.config.get_text_config(), "sliding_window", None)
    return window is None or width <= window


def accepts_position_ids(decoder: Any) -> bool:
    """Whether a decoder takes positions; without them, padding or another sequence in front would shift a token."""
    return "position_ids" in inspect.signature(decoder.forward).parameters


def final_logits(config: Any, logits: Tensor) -> Tensor:
    """Return the logits of an LM head as the decoder gives them: scaled, then soft-capped, where it does so.

    Args:
        config: Settings of the model.
        logits: What its LM head computes, of any shape.
    """
    text = config.get_text_config()
    scales = [value for name in _LOGIT_SCALES if (value := getattr(text, name, None)) is not None]
    scale = scales[0] if scales else None
    divisor = getattr(text, "logits_scaling", None)
    if scale is None and divisor is not None:
        scale = divisor if text.model_type == "hyperclovax" else 1 / divisor
    logits = logits if scale is None else logits * scale
    cap = getattr(text, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def attention_only(decoder: Any) -> bool:
    """Whether all layers attend: convolution or recurrence would mix the sequences of a pack."""
    config = decoder.config.get_text_config()
    kinds = {kind for name in ("layer_types", "layers_block_type") for kind in getattr(config, name, None) or ()}
    return kinds <= _ATTENTION


def gradient_checkpointing_enabled(decoder: Any) -> bool:
    """Whether layers run again for their gradients (gradient checkpointing), which rules out a cache."""
    return any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.modules())


def layers_of(decoder: Any) -> nn.ModuleList:
    """Return the list of a decoder's layers.

    Raises:
        SempaError: If there is no ``layers``, the name in Llama, Gemma, OPT, GPT-NeoX and most others.
    """
    layers = _layers(decoder)
    if layers is None:
        raise SempaError(f"{type(decoder).__name__} has no list of layers. Expected a decoder such as Llama or Gemma.")
    return layers


def last_layer_of(decoder: Any) -> nn.Module | None:
    """Return the last layer.

    None for a decoder that names its layers differently (GPT-2), or runs a layer more than once (HRM-Text).
    """
    layers = _layers(decoder)
    depth = getattr(decoder.config.get_text_config(), "num_hidden_layers", None)
    return None if layers is None or len(layers) != depth else layers[-1]


def _layers(decoder: Any) -> nn.ModuleList | None:
    # The list belongs to one of the first modules, so the search is short unless there is none.
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
    projection = next((getattr(attention, name) for name in _PROJECTION if hasattr(attention, name)), None)
    if not isinstance(projection, nn.Module):
        raise SempaError(
            f"The attention of {type(layer).__name__} has no output projection by a known name. Expected "
            f"{' or '.join(_ATTENTION_NAMES)} with {', '.join(_PROJECTION)}, as in Llama, Gemma, OPT or GPT-NeoX."
        )
    return projection


def states_after_layers(decoder: Any, num_layers: int, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the hidden states after ``num_layers`` layers, of shape (batch, seq_len, hidden).

    Args:
        decoder: Layers without the LM head.
        num_layers: Number of layers to run; the final norm is applied only after the last layer.
        input_ids: Token ids of shape (batch, seq_len).
        attention_mask: 0 on padding, of the same shape. Or an additive attention mask of shape (batch, 1, seq_len,
            seq_len).
    """
    padding = attention_mask if attention_mask.dim() == 2 else (attention_mask[:, 0].amax(dim=1) == 0).long()
    # Positions count real tokens only, so that padding on the left does not shift learned position embeddings.
    positions = {"position_ids": (padding.cumsum(-1) - 1).clamp(min=0)} if accepts_position_ids(decoder) else {}
    with truncated(decoder, num_layers):
        return last_hidden_states(
            decoder, input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
        )


def truncated(decoder: Any, num_layers: int) -> AbstractContextManager[None]:
    """End this thread's calls of :func:`last_hidden_states` after ``num_layers`` layers, within a block.

    Args:
        decoder: Layers without the LM head.
        num_layers: Number of layers to run; the final norm is applied only after the last layer.
    """
    layers = layers_of(decoder)
    if num_layers == len(layers):
        return nullcontext()

    def end(output: Any) -> Any:
        raise EndedEarly(states_in(output))

    return edited(layers[num_layers - 1], after=end)


def edit_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> AbstractContextManager[None]:
    """Change the hidden states that a module receives, within a block and in this thread only.

    Args:
        module: A layer, or a part of one.
        change: Takes the states, of shape (batch, seq_len, width), and returns those to use instead.
    """

    def before(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return edited(module, before=before)


def at_tokens(states: Tensor, marked: Tensor, new: Tensor) -> Tensor:
    """Return a copy of the states in which the marked token of each sequence has the new state.

    Args:
        states: Hidden states of shape (batch, seq_len, width).
        marked: 1 on one token per sequence, of shape (batch, seq_len).
        new: New states of shape (batch, width).
    """
    return torch.where(marked.bool()[:, :, None], new[:, None].to(states.dtype), states)


def states_in(output: Any) -> Tensor:
    """Return the hidden states in a layer's output: the output itself, or the first item of a tuple."""
    return output[0] if isinstance(output, tuple) else output
