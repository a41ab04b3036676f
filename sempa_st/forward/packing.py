"""Sequence packing with prefix sharing: several sequences per row, common prefixes computed once.

``README.md`` in this folder draws a pack and says why packing gives the same vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from sempa_st.forward.bin_packing import cost, fill_packs
from sempa_st.forward.decoder import (
    forward_with_cache,
    gradient_checkpointing_enabled,
    last_layer_of,
    reads_mask_and_positions,
    within_sliding_window,
)
from sempa_st.forward.last_layer import last_layer_only_at
from sempa_st.forward.varlen import ATTENTIONS
from sempa_st.model.patching import attention_implementation
from sempa_st.model.token_rows import common_prefix

DENSE_MASK_ATTENTION = (*ATTENTIONS, *ATTENTIONS.values())
"""Attention implementations that take a mask of queries by keys."""
_PASS = 128
"""Tokens of packs that cost about as much as one more pass, which reads all weights again."""


class PackedStates(NamedTuple):
    """Hidden states (tokens, hidden) of all packs, and the indices into them of each sequence's tokens, on the CPU."""

    states: Tensor
    indices: list[Tensor]


class PackPlan(NamedTuple):
    """The tokens of all packs; see :func:`plan_packs`.

    Attributes:
        ids: Token ids, of shape (packs, width), on the CPU.
        positions: Position of each token in its own sequence, of the same shape.
        ends: End of the subtree of each token in the prefix tree, of the same shape.
        indices: For each sequence, the indices of its tokens in the flattened packs.
    """

    ids: Tensor
    positions: Tensor
    ends: Tensor
    indices: list[Tensor]


class Packs(NamedTuple):
    """Packs that are ready to run.

    Attributes:
        plan: Tokens of the packs, without the prefix that has run.
        cache: Keys and values of that prefix.
        shared_prefix: Hidden states of that prefix, of shape (tokens, hidden); it may be empty.
    """

    plan: PackPlan
    cache: DynamicCache
    shared_prefix: Tensor


def states_packed(decoder: Any, sequences: Sequence[Tensor]) -> PackedStates:
    """Run a decoder on packed sequences and return all hidden states, with gradients.

    The prefix that all sequences share runs once, into a key/value cache, unless packs that repeat it cost less. A
    longer prefix that some sequences of a pack share runs once for these. Positions and a mask let each token see its
    own sequence and no other. Equal sequences run once, except in training, where dropout makes two views of them.

    Args:
        decoder: Layers without the LM head, for which :func:`can_pack` holds.
        sequences: Token ids of each sequence, of shape (tokens,), without padding, on the CPU.
    """
    packs = prepare_packs(decoder, sequences)
    states = run_packs(decoder, packs)
    length = len(packs.shared_prefix)
    prefix = torch.arange(length)
    return PackedStates(
        torch.cat([packs.shared_prefix, states.flatten(0, 1)]),
        [torch.cat([prefix, length + indices]) for indices in packs.plan.indices],
    )


def last_states_packed(decoder: Any, sequences: Sequence[Tensor]) -> Tensor:
    """Return the last tokens' hidden states, of shape (batch, hidden); arguments as for :func:`states_packed`."""
    packs = prepare_packs(decoder, sequences)
    width = packs.plan.ids.shape[1]
    pooled: list[list[int]] = [[] for _ in packs.plan.ids]  # per pack, the indices of its last tokens
    slots = []  # per sequence, its pack and the number of its last token in ``pooled``
    for last in torch.stack([indices[-1] for indices in packs.plan.indices]).tolist():
        slots.append((last // width, len(pooled[last // width])))
        pooled[last // width].append(last % width)
    index = pad_sequence([torch.tensor(tokens) for tokens in pooled], batch_first=True).to(decoder.device)
    last_layer = last_layer_of(decoder)
    if last_layer is None or gradient_checkpointing_enabled(decoder):
        states = run_packs(decoder, packs)
        states = states.gather(1, index[:, :, None].expand(-1, -1, states.shape[-1]))
    else:
        with last_layer_only_at(last_layer, index):
            states = run_packs(decoder, packs)
    flat = torch.tensor([pack * index.shape[1] + number for pack, number in slots])
    return states.flatten(0, 1)[flat.to(index.device)]


def last_positions(packs: Packs) -> Tensor | None:
    """Return the index of each sequence's last token in the flattened packs, of shape (batch,).

    None if another sequence continues from one of them: a change of that token's state would reach both sequences.
    """
    last = torch.stack([indices[-1] for indices in packs.plan.indices])
    exclusive = packs.plan.ends.flatten()[last] == last % packs.plan.ids.shape[1] + 1
    return last if exclusive.all() else None


def unpadded(input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Return the token ids of each sequence, without padding and on the CPU."""
    mask = attention_mask.bool().cpu()
    return list(input_ids.cpu()[mask].split(mask.sum(dim=1).tolist()))


def can_pack(decoder: Any, longest: int) -> bool:
    """Whether a mask and positions keep the sequences of a pack apart in this decoder.

    See :func:`reads_mask_and_positions`. The mask of a pack is given whole and has no window, so that a sequence must
    not be longer than the decoder's.

    Args:
        decoder: Layers without the LM head.
        longest: Length of the longest sequence in tokens.
    """
    return (
        reads_mask_and_positions(decoder)
        and attention_implementation(decoder.config.get_text_config()) in DENSE_MASK_ATTENTION
        and within_sliding_window(decoder, longest)
    )


def prepare_packs(decoder: Any, sequences: Sequence[Tensor]) -> Packs:
    """Run the prefix that all sequences share, if that saves time, and plan packs of the rest.

    Arguments as for :func:`states_packed`.
    """
    lists = [sequence.tolist() for sequence in sequences]
    shortest = min(len(tokens) for tokens in lists)
    shared = 0 if gradient_checkpointing_enabled(decoder) else min(common_prefix(lists), shortest - 1)
    plan = plan_packs([tokens[shared:] for tokens in lists], views=decoder.training)
    if shared and shared * (len(plan.ids) - 1) < 4 * _PASS:  # beyond that, repeating it cannot pay
        whole = plan_packs(lists, views=decoder.training)
        first = _PASS + (shared + cost(1, shared)) / 2  # its tokens attend to those before them, half of all pairs
        if cost(len(whole.ids), whole.ids.shape[1]) < first + cost(len(plan.ids), plan.ids.shape[1], shared):
            shared, plan = 0, whole
    cache = DynamicCache()
    states = torch.empty(0, dtype=decoder.dtype, device=decoder.device)
    if shared:
        prefix = sequences[0][None, :shared].to(decoder.device)
        positions = torch.arange(shared, device=decoder.device)[None]
        states = forward_with_cache(decoder, cache, prefix, torch.ones_like(prefix), positions)[0]
        cache.batch_repeat_interleave(len(plan.ids))
    return Packs(plan, cache, states)


def run_packs(decoder: Any, packs: Packs) -> Tensor:
    """Return the hidden states of prepared packs, of shape (packs, width, hidden)."""
    plan, shared, device = packs.plan, len(packs.shared_prefix), decoder.device
    mask = prefix_tree_mask(plan.ends.to(device), shared, decoder.dtype)
    return forward_with_cache(decoder, packs.cache, plan.ids.to(device), mask, (shared + plan.positions).to(device))


def plan_packs(sequences: list[list[int]], *, views: bool) -> PackPlan:
    """Plan packs in which a common prefix of neighbouring sequences appears once.

    The sequences of a pack form a prefix tree in depth-first order. ``ends[i]`` is the end of the subtree of token i:
    tokens i to ``ends[i] - 1`` may attend to it. The sequences 1 2 3, 1 2 4 5 and 6 give one pack::

        tree:   1 ── 2 ─┬─ 3            index      0  1  2  3  4  5
                        └─ 4 ── 5       ids        1  2  3  4  5  6
                6                       positions  0  1  2  2  3  0
                                        ends       5  5  3  5  5  6

    Args:
        sequences: Token ids of each sequence.
        views: Whether equal sequences stay apart.

    >>> plan = plan_packs([[1, 2, 3], [1, 2, 4, 5], [6]], views=False)
    >>> plan.ids.tolist(), plan.positions.tolist(), plan.ends.tolist()
    ([[1, 2, 3, 4, 5, 6]], [[0, 1, 2, 2, 3, 0]], [[5, 5, 3, 5, 5, 6]])
    >>> plan.indices[1].tolist()
    [0, 1, 3, 4]
    """
    order = sorted(range(len(sequences)), key=lambda number: sequences[number])
    pairs = [(sequences[one], sequences[two]) for one, two in pairwise(order)]
    shared = [0, *(0 if views and pair[0] == pair[1] else common_prefix(pair) for pair in pairs)]
    packs, width = fill_packs([len(sequences[number]) for number in order], shared)
    rows: list[list[list[int]]] = []
    indices: list[list[int]] = [[]] * len(sequences)
    for pack_number, pack in enumerate(packs):
        ids: list[int] = []
        positions: list[int] = []
        ends = [width] * width
        path: list[int] = []  # indices in the pack of the current sequence's tokens
        for rank, prefix in pack:
            tokens = sequences[order[rank]]
            path = [*path[:prefix], *range(len(ids), len(ids) + len(tokens) - prefix)]
            ids += tokens[prefix:]
            positions += range(prefix, len(tokens))
            for index in path:
                ends[index] = len(ids)
            indices[order[rank]] = [pack_number * width + index for index in path]
        padding = [0] * (width - len(ids))
        rows.append([ids + padding, positions + padding, ends])
    all_ids, all_positions, all_ends = torch.tensor(rows).unbind(1)
    flat = torch.tensor(list(chain.from_iterable(indices)))
    return PackPlan(all_ids, all_positions, all_ends, list(flat.split([len(tokens) for tokens in indices])))


def prefix_tree_mask(ends: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask of packs, of shape (packs, 1, width, shared + width).

    A token sees the shared prefix, its ancestors in the prefix tree, and itself. For the pack in :func:`plan_packs`,
    with a shared prefix of two tokens (a row is a query, x is a key that it sees)::

                 prefix    1  2  3  4  5  6
            1     x  x     x
            2     x  x     x  x
            3     x  x     x  x  x
            4     x  x     x  x  .  x
            5     x  x     x  x  .  x  x
            6     x  x     .  .  .  .  .  x

    Padding at the end of a pack sees the prefix and padding.

    Args:
        ends: As in :class:`PackPlan`, of shape (packs, width).
        shared: Length of the prefix that all sequences share.
        dtype: Type of the mask.

    >>> (prefix_tree_mask(torch.tensor([[2, 2, 3]]), 1, torch.float32) == 0).int().tolist()
    [[[[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 1]]]]
    """
    index = torch.arange(ends.shape[1], device=ends.device)
    own = (index[:, None] < ends[:, None]).tril()
    seen = torch.cat([own.new_ones(*own.shape[:2], shared), own], dim=2)[:, None]
    return additive_mask(seen, dtype)


def additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an additive attention mask: 0 where ``seen`` is True, and the lowest number of ``dtype`` elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
