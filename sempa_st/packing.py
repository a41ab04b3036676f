"""Rows of tokens run one behind another, what they begin with once, so that next to nothing that is run is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from sempa_st.cached import alone, keeps_no_cache, last_layer_of, run_on, takes_positions, window_covers
from sempa_st.last_layer import read_at
from sempa_st.prompt_eol import PromptEOL, embed_rows, invocation_tokens

_WIDTH, _STEP = 128, 16
"""Tokens of a pack and how finely it is varied: some sentences, so few that the masked keys of others cost little."""
_EVEN = 3000
_ATTENTION = {"full_attention", "sliding_attention", "attention"}
OWN_MASKS = ("sdpa", "eager")
"""Implementations of attention that take a mask of queries by keys."""


class Packed(NamedTuple):
    """States of shape (places, hidden) and, for each row, the places of its tokens (on the CPU)."""

    states: Tensor
    places: list[Tensor]


class _Layout(NamedTuple):
    """Tensors of shape (packs, tokens), and for each row the places of its tokens among all of these.

    ``owners`` holds the number of each token's group, -1 on padding, and ``parts`` the number of its row in the group
    from 1, or 0 where all rows of the group begin with it.
    """

    ids: Tensor
    positions: Tensor
    owners: Tensor
    parts: Tensor
    places: list[Tensor]


class _Begun(NamedTuple):
    """Rows laid out, the cache of what all of them begin with, and its states, of shape (tokens, hidden)."""

    layout: _Layout
    cache: DynamicCache
    opening: Tensor


def packed_states(decoder: Any, rows: Sequence[Tensor], group: int = 1) -> Packed:
    """Run a decoder on rows in packs, with gradients.

    What all rows begin with is run once, into a key/value cache; what the rows of a group begin with beyond that, once
    for the group. Positions and a mask make each token see its own row and no other.

    Args:
        decoder: Layers without the LM head, for which :func:`can_pack` holds.
        rows: Token ids of each row, of shape (tokens,), without padding, on the CPU, where packs are laid out.
        group: Number of rows of a group, which stand next to each other.
    """
    begun = _begin(decoder, rows, group)
    states = _run_packs(decoder, begun)
    opening = len(begun.opening)
    there = torch.arange(opening)
    return Packed(
        torch.cat([begun.opening, states.flatten(0, 1)]),
        [torch.cat([there, opening + places]) for places in begun.layout.places],
    )


def last_packed_states(decoder: Any, rows: Sequence[Tensor]) -> Tensor:
    """Return the states at the rows' last tokens, of shape (rows, hidden); arguments as for :func:`packed_states`."""
    begun = _begin(decoder, rows, 1)
    width = begun.layout.ids.shape[1]
    packs: list[list[int]] = [[] for _ in begun.layout.ids]
    found = []
    for last in (int(places[-1]) for places in begun.layout.places):
        found.append((last // width, len(packs[last // width])))
        packs[last // width].append(last % width)
    read = pad_sequence([torch.tensor(pack) for pack in packs], batch_first=True).to(decoder.device)
    last_layer = last_layer_of(decoder)
    if last_layer is None or keeps_no_cache(decoder):
        states = _run_packs(decoder, begun)
        states = states.gather(1, read[:, :, None].expand(-1, -1, states.shape[-1]))
    else:
        with read_at(last_layer, read):
            states = _run_packs(decoder, begun)
    return states.flatten(0, 1)[torch.tensor([pack * read.shape[1] + number for pack, number in found]).to(read.device)]


def embed_packed(module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return what :func:`sempa_st.prompt_eol.embed_rows` returns, in packs where the model can be run so.

    Equal rows are run once, except in training, where dropout makes two views of them.
    """
    rows = unpadded(input_ids, attention_mask)
    # PEFT finds the closing tokens by their place in a row of its own.
    if module.closing_only or not can_pack(module.decoder, max(len(row) for row in rows)):
        return embed_rows(module, input_ids, attention_mask)
    keys = [tuple(row.tolist()) for row in rows]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    with alone(module.decoder), acting_everywhere(module.model):
        if module.training or len(numbers) == len(rows):
            return last_packed_states(module.decoder, rows)
        states = last_packed_states(module.decoder, [torch.tensor(key) for key in numbers])
    return states[torch.tensor([numbers[key] for key in keys], device=states.device)]


def unpadded(input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Return the token ids of each row, without padding and on the CPU."""
    return [row[kept] for row, kept in zip(input_ids.cpu(), attention_mask.bool().cpu(), strict=True)]


@contextmanager
def acting_everywhere(model: Any) -> Iterator[None]:
    """Let an activated adapter act on every token, as a plain one and at its price, for the time of a forward pass.

    An adapter that acts from the template's opening on does so on rows under the template.
    """
    if not invocation_tokens(model):
        yield
        return
    variants = [layer.lora_variant for layer in model.modules() if hasattr(layer, "lora_variant")]
    kept = [dict(variant) for variant in variants]
    for variant in variants:
        variant.clear()
    try:
        yield
    finally:
        for variant, content in zip(variants, kept, strict=True):
            variant.update(content)


def can_pack(decoder: Any, longest: int) -> bool:
    """Whether a decoder can be told rows in one pack apart.

    Args:
        decoder: Layers without the LM head.
        longest: Tokens of the longest row.
    """
    config = decoder.config.get_text_config()
    # Any other kind of layer (convolution, recurrence) would carry one row's tokens over into the next row.
    kinds = {kind for name in ("layer_types", "layers_block_type") for kind in getattr(config, name, None) or ()}
    return (
        takes_positions(decoder)
        and kinds <= _ATTENTION
        and config._attn_implementation in OWN_MASKS
        and window_covers(decoder, longest)
    )


def fill_packs(sizes: Sequence[int]) -> tuple[list[list[int]], int]:
    """Return what goes into each pack, by number, and the width of the packs: the one that leaves little room.

    A wider pack costs more attention: at :data:`_EVEN` tokens as much as the rest of a small decoder.

    Args:
        sizes: Tokens of each thing to pack.

    >>> fill_packs([100, 50, 60])
    ([[0], [2, 1]], 110)
    """
    longest = max(sizes)
    found = [_fill(sizes, width) for width in range(longest, max(_WIDTH, 2 * longest) + 1, _STEP)]
    return min(found, key=lambda filled: len(filled[0]) * filled[1] * (_EVEN + filled[1]))


def _begin(decoder: Any, rows: Sequence[Tensor], group: int) -> _Begun:
    """Run what all rows begin with, and lay out the rest."""
    opening = 0 if keeps_no_cache(decoder) else _shared_tokens(rows)
    layout = _lay_out([row[opening:] for row in rows], group)
    cache = DynamicCache()
    states = torch.empty(0, dtype=decoder.dtype, device=decoder.device)
    if opening:
        beginning = rows[0][None, :opening].to(decoder.device)
        there = torch.arange(opening, device=decoder.device)[None]
        states = run_on(decoder, cache, beginning, torch.ones_like(beginning), there)[0]
        cache.batch_repeat_interleave(len(layout.ids))
    return _Begun(layout, cache, states)


def _run_packs(decoder: Any, begun: _Begun) -> Tensor:
    layout, opening, device = begun.layout, len(begun.opening), decoder.device
    mask = _own_keys(layout.owners.to(device), layout.parts.to(device), opening, decoder.dtype)
    return run_on(decoder, begun.cache, layout.ids.to(device), mask, (opening + layout.positions).to(device))


def _lay_out(rows: list[Tensor], group: int) -> _Layout:
    groups = [rows[start : start + group] for start in range(0, len(rows), group)]
    shared = [_shared_tokens(members) if group > 1 else 0 for members in groups]
    packs, width = fill_packs(
        [begin + sum(len(row) - begin for row in members) for begin, members in zip(shared, groups, strict=True)]
    )
    ids = rows[0].new_zeros(len(packs), width)
    layout = _Layout(ids, torch.zeros_like(ids), torch.full_like(ids, -1), torch.zeros_like(ids), list(rows))
    for number, pack in enumerate(packs):
        end = 0
        for index in pack:
            begin, start = shared[index], end
            for part, row in enumerate(groups[index]):
                new = row[begin:] if part else row  # the first row brings what the group begins with
                here = torch.arange(end, end + len(new))
                layout.ids[number, here] = new
                layout.positions[number, here] = here - end + len(row) - len(new)
                layout.owners[number, here] = index
                layout.parts[number, here] = part + 1
                places = torch.cat([torch.arange(start, start + begin), here[begin - len(row) :]])
                layout.places[index * group + part] = number * width + places
                end += len(new)
            layout.parts[number, start : start + begin] = 0
    return layout


def _fill(sizes: Sequence[int], most: int) -> tuple[list[list[int]], int]:
    """Fill packs of at most ``most`` tokens: the longest first, each where it leaves the least room."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for thing in sorted(range(len(sizes)), key=lambda thing: -sizes[thing]):
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= sizes[thing]]
        if not fitting:
            packs.append([])
            rooms.append(most)
        number = min(fitting)[1] if fitting else len(packs) - 1
        packs[number].append(thing)
        rooms[number] -= sizes[thing]
    return packs, most - min(rooms)


def _shared_tokens(rows: Sequence[Tensor]) -> int:
    """Return how many tokens all rows begin with, the last one of each row left out."""
    most = min(len(row) for row in rows) - 1
    beginnings = torch.stack([row[:most] for row in rows])
    return int((beginnings == beginnings[0]).all(dim=0).long().cumprod(0).sum())


def _own_keys(owners: Tensor, parts: Tensor, opening: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to the attention scores, of shape (packs, 1, tokens, opening + tokens).

    A token sees the opening, what its group begins with (part 0), and its own row up to itself; padding sees padding.
    """
    same_part = (parts[:, None] == 0) | (parts[:, :, None] == parts[:, None])
    own = ((owners[:, :, None] == owners[:, None]) & same_part).tril()
    seen = torch.cat([own.new_ones(*own.shape[:2], opening), own], dim=2)[:, None]
    return added_to_scores(seen, dtype)


def added_to_scores(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what an attention mask adds to the scores: 0 where a key is seen, and where not the least number."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
