"""Rows of tokens run one behind another, what they begin with once, so that next to nothing that is run is padding."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from sempa_st.forward.bin_packing import fill_packs
from sempa_st.forward.decoder import (
    accepts_position_ids,
    attention_only,
    forward_with_cache,
    gradient_checkpointing_enabled,
    last_layer_of,
    within_sliding_window,
)
from sempa_st.forward.last_layer import last_layer_only_at
from sempa_st.forward.varlen import ATTENTIONS
from sempa_st.model.patching import attention_implementation
from sempa_st.model.token_rows import common_prefix

DENSE_MASK_ATTENTION = (*ATTENTIONS, *ATTENTIONS.values())
"""Implementations of attention that take a mask of queries by keys."""


class Packed(NamedTuple):
    """States of shape (places, hidden) and, for each row, the places of its tokens (on the CPU)."""

    states: Tensor
    places: list[Tensor]


class _Layout(NamedTuple):
    """Tensors of shape (packs, tokens), and for each row the places of its tokens among all of these.

    What follows a token in a row stands behind it, and behind all of that stands what does not follow it: ``ends``
    holds the place in the pack where that begins, so that a token is seen from its own place up to there.
    """

    ids: Tensor
    positions: Tensor
    ends: Tensor
    places: list[Tensor]


class Packs(NamedTuple):
    """Rows laid out, the cache of what all of them begin with, and its states, of shape (tokens, hidden)."""

    layout: _Layout
    cache: DynamicCache
    opening: Tensor


def states_packed(decoder: Any, rows: Sequence[Tensor]) -> Packed:
    """Run a decoder on rows in packs, with gradients.

    What all rows begin with is run once, into a key/value cache; what some rows of a pack begin with beyond that, once
    for these. Positions and a mask make each token see its own row and no other. Equal rows are one, except in
    training, where dropout makes two views of them.

    Args:
        decoder: Layers without the LM head, for which :func:`can_pack` holds.
        rows: Token ids of each row, of shape (tokens,), without padding, on the CPU, where packs are laid out.
    """
    begun = prepare_packs(decoder, rows)
    states = run_packs(decoder, begun)
    opening = len(begun.opening)
    there = torch.arange(opening)
    return Packed(
        torch.cat([begun.opening, states.flatten(0, 1)]),
        [torch.cat([there, opening + places]) for places in begun.layout.places],
    )


def last_states_packed(decoder: Any, rows: Sequence[Tensor]) -> Tensor:
    """Return the states at the rows' last tokens, of shape (rows, hidden); arguments as for :func:`states_packed`."""
    begun = prepare_packs(decoder, rows)
    width = begun.layout.ids.shape[1]
    packs: list[list[int]] = [[] for _ in begun.layout.ids]
    found = []
    for last in torch.stack([places[-1] for places in begun.layout.places]).tolist():
        found.append((last // width, len(packs[last // width])))
        packs[last // width].append(last % width)
    read = pad_sequence([torch.tensor(pack) for pack in packs], batch_first=True).to(decoder.device)
    last_layer = last_layer_of(decoder)
    if last_layer is None or gradient_checkpointing_enabled(decoder):
        states = run_packs(decoder, begun)
        states = states.gather(1, read[:, :, None].expand(-1, -1, states.shape[-1]))
    else:
        with last_layer_only_at(last_layer, read):
            states = run_packs(decoder, begun)
    return states.flatten(0, 1)[torch.tensor([pack * read.shape[1] + number for pack, number in found]).to(read.device)]


def last_positions(begun: Packs) -> Tensor | None:
    """Return the rows' last tokens' places among all of the packs' tokens, of shape (rows,).

    None where another row goes on from one of them, so that no change to it would be the one row's own.
    """
    last = torch.stack([places[-1] for places in begun.layout.places])
    alone_there = begun.layout.ends.flatten()[last] == last % begun.layout.ids.shape[1] + 1
    return last if alone_there.all() else None


def unpadded(input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Return the token ids of each row, without padding and on the CPU."""
    mask = attention_mask.bool().cpu()
    return list(input_ids.cpu()[mask].split(mask.sum(dim=1).tolist()))


def can_pack(decoder: Any, longest: int) -> bool:
    """Whether a decoder can be told rows in one pack apart.

    Its attention must be one of transformers' attention functions, which see no more than the mask lets them. GPT-Neo's
    own, for one, counts its window in places of the pack.

    Args:
        decoder: Layers without the LM head.
        longest: Tokens of the longest row.
    """
    return (
        accepts_position_ids(decoder)
        and attention_only(decoder)
        and decoder.is_backend_compatible()
        and attention_implementation(decoder.config.get_text_config()) in DENSE_MASK_ATTENTION
        and within_sliding_window(decoder, longest)
    )


def prepare_packs(decoder: Any, rows: Sequence[Tensor]) -> Packs:
    """Run what all rows begin with, and lay out the rest; arguments as for :func:`states_packed`."""
    lists = [row.tolist() for row in rows]
    shortest = min(len(row) for row in lists)
    opening = 0 if gradient_checkpointing_enabled(decoder) else min(common_prefix(lists), shortest - 1)
    layout = plan_packs([row[opening:] for row in lists], views=decoder.training)
    cache = DynamicCache()
    states = torch.empty(0, dtype=decoder.dtype, device=decoder.device)
    if opening:
        beginning = rows[0][None, :opening].to(decoder.device)
        there = torch.arange(opening, device=decoder.device)[None]
        states = forward_with_cache(decoder, cache, beginning, torch.ones_like(beginning), there)[0]
        cache.batch_repeat_interleave(len(layout.ids))
    return Packs(layout, cache, states)


def run_packs(decoder: Any, begun: Packs) -> Tensor:
    """Return the states of packs that were begun, of shape (packs, tokens, hidden)."""
    layout, opening, device = begun.layout, len(begun.opening), decoder.device
    mask = prefix_tree_mask(layout.ends.to(device), opening, decoder.dtype)
    return forward_with_cache(
        decoder, begun.cache, layout.ids.to(device), mask, (opening + layout.positions).to(device)
    )


def plan_packs(rows: list[list[int]], *, views: bool) -> _Layout:
    """Lay out rows in packs; ``views`` keeps equal rows apart."""
    order = sorted(range(len(rows)), key=lambda row: rows[row])
    pairs = [(rows[one], rows[two]) for one, two in pairwise(order)]
    alike = [0, *(0 if views and pair[0] == pair[1] else common_prefix(pair) for pair in pairs)]
    packs, width = fill_packs([len(rows[row]) for row in order], alike)
    filled: list[list[list[int]]] = []
    found: list[list[int]] = [[]] * len(rows)
    for number, pack in enumerate(packs):
        tokens: list[int] = []
        along: list[int] = []
        until = [width] * width
        places: list[int] = []
        for place, same in pack:
            row = rows[order[place]]
            places = [*places[:same], *range(len(tokens), len(tokens) + len(row) - same)]
            tokens += row[same:]
            along += range(same, len(row))
            for there in places:
                until[there] = len(tokens)
            found[order[place]] = [number * width + there for there in places]
        padding = [0] * (width - len(tokens))
        filled.append([tokens + padding, along + padding, until])
    ids, positions, ends = torch.tensor(filled).unbind(1)
    places_of_all = torch.tensor(list(chain.from_iterable(found)))
    return _Layout(ids, positions, ends, list(places_of_all.split([len(places) for places in found])))


def prefix_tree_mask(ends: Tensor, opening: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the attention scores, of shape (packs, 1, tokens, opening + tokens).

    A token sees the opening and what leads to it in its own row; padding sees padding.
    """
    there = torch.arange(ends.shape[1], device=ends.device)
    own = (there[:, None] < ends[:, None]).tril()
    seen = torch.cat([own.new_ones(*own.shape[:2], opening), own], dim=2)[:, None]
    return additive_mask(seen, dtype)


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what an attention mask adds to the scores: 0 where a key is seen, and where not the least number."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
