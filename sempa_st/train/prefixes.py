"""What rows begin with alike is run once: a request with several answers, a prompt with two completions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from sempa_st.packing import can_pack, packed_states, unpadded


def shared_states(decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last hidden states of rows, the beginning that some of them share run once, with its gradients.

    Args:
        decoder: Layers without the LM head.
        input_ids: Rows padded on the right, of shape (rows, tokens).
        attention_mask: 0 on padding, of the same shape.

    Returns:
        States of shape (rows, tokens, hidden); those of padding hold anything.
    """
    kept = attention_mask.bool()
    if not can_pack(decoder, int(kept.sum(dim=1).max())):
        output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states
    packed = packed_states(decoder, unpadded(input_ids, attention_mask))
    places = torch.zeros_like(input_ids)
    places[kept] = torch.cat(packed.places).to(places.device)
    return packed.states.index_select(0, places.flatten()).view(*places.shape, -1)


@contextmanager
def pairs_together(decoder: Any) -> Iterator[None]:
    """Make a decoder run a batch of pairs by :func:`shared_states`, in all threads: for training, which has one.

    Args:
        decoder: Layers without the LM head, called as TRL's DPO trainer calls them: rows padded on the right, and
            nothing read of the output but the last hidden states. Any other call is left as it is.
    """
    shadowed = decoder.__dict__.get("forward")

    def restore() -> None:
        if shadowed is None:
            del decoder.forward
        else:
            decoder.forward = shadowed

    def run(*args: Any, **kwargs: Any) -> Any:
        restore()
        try:
            asked = {name for name, value in kwargs.items() if value is not None and value is not False}
            if args or asked - {"return_dict"} != {"input_ids", "attention_mask"}:
                return decoder.forward(*args, **kwargs)
            states = shared_states(decoder, kwargs["input_ids"], kwargs["attention_mask"])
            return BaseModelOutputWithPast(last_hidden_state=states)
        finally:
            decoder.forward = run

    decoder.forward = run
    try:
        yield
    finally:
        restore()
