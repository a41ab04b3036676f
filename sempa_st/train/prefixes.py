"""What the rows of a group begin with is run once: a request with several answers, a prompt with two completions."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from sempa_st.cached import run_on, window_covers


def grouped_states(decoder: Any, input_ids: Tensor, attention_mask: Tensor, group: int) -> Tensor:
    """Return the last hidden states of rows, the beginning that a group's rows share run once, with its gradients.

    Args:
        decoder: Layers without the LM head.
        input_ids: Rows padded on the right, of shape (rows, tokens).
        attention_mask: 0 on padding, of the same shape.
        group: Size of a group, which stand next to each other; rows is a multiple of it.

    Returns:
        States of shape (rows, tokens, hidden); those of padding hold anything.
    """
    width = input_ids.shape[1]
    places = torch.arange(width, device=input_ids.device)
    grouped, lengths = input_ids.view(-1, group, width), attention_mask.sum(dim=1)
    same = (grouped == grouped[:, :1]).all(dim=1) & (places < lengths.view(-1, group).amin(dim=1)[:, None] - 1)
    shared = same.long().cumprod(dim=1).sum(dim=1)
    if not int(shared.min()) or not _can_share(decoder, width):
        output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states
    start = int(shared.max())
    beginning = (places[:start] < shared[:, None]).to(attention_mask.dtype)
    cache = DynamicCache()
    once = run_on(decoder, cache, input_ids[::group, :start], beginning, places[None, :start])
    cache.batch_repeat_interleave(group)

    shared = shared.repeat_interleave(group)[:, None]
    present = shared + places[: int((lengths - shared[:, 0]).max())] < lengths[:, None]
    positions = (shared + places[: present.shape[1]]).clamp(max=width - 1)
    mask = torch.cat([beginning.repeat_interleave(group, dim=0), present.to(beginning.dtype)], dim=1)
    each = run_on(decoder, cache, input_ids.gather(1, positions), mask, positions)

    both = torch.cat([once.repeat_interleave(group, dim=0), each], dim=1)
    source = torch.where(places < shared, places, places - shared + start).clamp(max=both.shape[1] - 1)
    return both.gather(1, source[..., None].expand(-1, -1, both.shape[2]))


def _can_share(decoder: Any, width: int) -> bool:
    if any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.modules()):
        return False  # layers that are run again for their gradients keep no cache
    # Padding stands between a short beginning and the rest, so positions must be told.
    return "position_ids" in inspect.signature(decoder.forward).parameters and window_covers(decoder, width)


@contextmanager
def pairs_together(decoder: Any) -> Iterator[None]:
    """Make a decoder run a batch of pairs, all first rows before all second ones, by :func:`grouped_states`.

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
            rows = torch.arange(len(kwargs["input_ids"])).view(2, -1).T.flatten()
            states = grouped_states(decoder, kwargs["input_ids"][rows], kwargs["attention_mask"][rows], 2)
            return BaseModelOutputWithPast(last_hidden_state=states[rows.argsort()])
        finally:
            decoder.forward = run

    decoder.forward = run
    try:
        yield
    finally:
        restore()
