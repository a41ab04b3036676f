"""PEFT's models: an activated adapter acts on the end of rows, and in each thread on that thread's own.

This file needs nothing else of sempa_st; see ``prompt_eol.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

from torch import Tensor

_EVERY_TOKEN = -1
_ACTS_ON: ContextVar[list[int] | int | None] = ContextVar("sempa_st_activated", default=None)
"""How many tokens at each row's end an activated adapter acts on in this thread's pass, or all (_EVERY_TOKEN)."""


def is_peft_model(model: Any) -> bool:
    """Whether a model is one of PEFT's around another, and not one that transformers put an adapter into."""
    return hasattr(model, "get_base_model")


def invocation_tokens(model: Any) -> list[int]:
    """Return the template's tokens from which on a model's activated adapter acts; none for any other model."""
    if not is_peft_model(model):
        return []
    return getattr(model.active_peft_config, "alora_invocation_tokens", None) or []


@contextmanager
def activated(model: Any, tokens: list[int] | None) -> Iterator[None]:
    """Let an activated adapter act on the end of each row, and nowhere else, in this thread's forward passes.

    PEFT looks for invocation tokens in what passes through the PEFT model; the decoder alone is run here, and what it
    reads is always under the template.

    Args:
        model: Any model; without an activated adapter nothing is done.
        tokens: Number of tokens of each row that the adapter acts on, padding on the right included. None for every
            token, as a plain adapter does and at its price: on rows under the template, an adapter that acts from the
            template's opening on does so.
    """
    if not invocation_tokens(model):
        yield
        return
    with _acting_on(_EVERY_TOKEN if tokens is None else tokens):
        yield


@contextmanager
def _acting_on(tokens: list[int] | int) -> Iterator[None]:
    token = _ACTS_ON.set(tokens)
    try:
        yield
    finally:
        _ACTS_ON.reset(token)


def keep_activation_apart(model: Any) -> None:
    """Make a model's activated adapter read from the thread's context which tokens it acts on.

    PEFT tells the layers by hooks, which the passes of all threads run while they are there, and which an exception
    leaves behind. Nothing is done to a model without such an adapter.
    """
    if not invocation_tokens(model):
        return
    for name, config in model.peft_config.items():
        if not getattr(config, "alora_invocation_tokens", None):
            continue
        for layer in model.modules():
            variant = getattr(layer, "lora_variant", {}).get(name)
            if variant is not None:
                variant.forward = partial(_forward_in_context, type(variant).forward)
    lora = model.base_model
    # PEFT has no public way to say where an activated adapter acts. Seen in PEFT 0.21.
    lora._enable_peft_forward_hooks = partial(_offsets_in_context, lora)


def _forward_in_context(
    forward: Callable[..., Tensor],
    layer: Any,
    *,
    active_adapter: str,
    x: Tensor,
    result: Tensor,
    alora_offsets: list[int | None] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Add what an activated adapter adds to a layer's output; ``forward`` and the arguments are PEFT's."""
    acts_on = _ACTS_ON.get()
    if isinstance(acts_on, int):
        dropped = layer.lora_dropout[active_adapter](x)
        update: Tensor = layer.lora_B[active_adapter](layer.lora_A[active_adapter](dropped))
        return result + update * layer.scaling[active_adapter]
    offsets = alora_offsets if acts_on is None else acts_on
    return forward(layer, active_adapter=active_adapter, x=x, result=result, alora_offsets=offsets, **kwargs)


@contextmanager
def _offsets_in_context(lora: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Take the place of PEFT's hooks; ``lora`` and the arguments are those of PEFT's own method."""
    offsets = kwargs.get("alora_offsets")
    # Layers that are run again for their gradients are so when the context is gone, and beam search is refused there.
    own = offsets is None or (kwargs.get("num_beams") or 1) > 1
    own = own or any(getattr(layer, "gradient_checkpointing", False) for layer in lora.modules())
    if not own:
        kwargs["alora_offsets"] = None
    context = nullcontext() if own else _acting_on(offsets or [])
    with type(lora)._enable_peft_forward_hooks(lora, *args, **kwargs), context:
        yield
