"""Bin packing: which sequences share a pack, and how wide the packs are."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise

_WIDTH, _STEP = 128, 16
"""Width of a pack in tokens, and the step in which narrower ones are tried: a few sentences fit, so few that masked
keys of other sequences cost little."""
_EVEN = 1500
"""Width at which attention costs a small decoder as much as all of its other operations."""
_MANY = 256
"""Number of sequences beyond which fewer widths are tried."""
_MISSES = 32
"""Consecutive sequences that do not fit, after which a pack is closed: the rest would hardly fill it."""

Pack = list[tuple[int, int]]
"""(Index of a sequence, length of the prefix shared with the previous sequence of the pack), in order."""


def fill_packs(sizes: Sequence[int], shared: Sequence[int]) -> tuple[list[Pack], int]:
    """Distribute sequences over packs, and choose the width of the packs so that they cost the least.

    A shared prefix is stored once per pack. Here the third sequence shares 20 tokens with the second::

        |---- 50 ----|-------- 100 --------|-- 40 --|      one pack, 190 tokens wide
         sequence 0   sequence 1            sequence 2, without its 20 shared tokens

    Args:
        sizes: Length of each sequence in tokens; the sequences are sorted by their tokens.
        shared: Length of the prefix that each sequence shares with the one before it; 0 for the first one.

    Returns:
        Per pack, (sequence index, length of the prefix shared with the previous sequence of the pack); and the width.

    >>> fill_packs([50, 100, 60], [0, 0, 20])
    ([[(0, 0), (1, 0), (2, 20)]], 190)
    """
    longest = max(sizes)
    # With many sequences the widest packs are almost full, whatever their exact width.
    step = _STEP * (1 + len(sizes) // _MANY)
    widths = range(max(_WIDTH, 2 * longest), longest - 1, -step)
    # The second way leaves less empty space where lengths differ much and little is shared.
    candidates = [_fill_in_order(sizes, shared, width) for width in widths]
    candidates += [_fill_longest_first(sizes, shared, width) for width in widths]
    return min(candidates, key=lambda filled: cost(len(filled[0]), filled[1]))


def cost(packs: int, width: int, before: int = 0) -> float:
    """Return what packs cost, in tokens without attention.

    Args:
        packs: Number of packs.
        width: Tokens of a pack, each of which attends to all of them.
        before: Tokens in front of each pack, which it attends to.

    >>> cost(2, 750), cost(2, 600, before=150)
    (2250.0, 1800.0)
    """
    return packs * width * (1 + (before + width) / _EVEN)


def _fill_in_order(sizes: Sequence[int], shared: Sequence[int], limit: int) -> tuple[list[Pack], int]:
    """Fill packs of at most ``limit`` tokens one by one, each with the first remaining sequences that fit."""
    packs: list[Pack] = []
    rooms: list[int] = []
    remaining: Pack = list(zip(range(len(sizes)), shared, strict=True))
    while remaining:
        pack: Pack = []
        rest: Pack = []
        # in_pack and in_rest: prefix that the next sequence shares with the last one of the pack, and of the rest.
        room, in_pack, in_rest, missed = limit, 0, 0, 0
        for number, (index, prefix) in enumerate(remaining):
            in_pack, in_rest = min(in_pack, prefix), min(in_rest, prefix)
            if sizes[index] - in_pack <= room:
                pack.append((index, in_pack))
                room -= sizes[index] - in_pack
                in_pack, missed = sizes[index], 0
                continue
            rest.append((index, in_rest))
            in_rest = sizes[index]
            missed += 1
            if missed == _MISSES:
                rest += remaining[number + 1 :]
                break
        packs.append(pack)
        rooms.append(room)
        remaining = rest
    return packs, limit - min(rooms)


def _fill_longest_first(sizes: Sequence[int], shared: Sequence[int], limit: int) -> tuple[list[Pack], int]:
    """Fill packs of at most ``limit`` tokens: the longest sequences first, each where the least room remains."""
    filled: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, number of the pack), sorted
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        tightest = bisect_left(rooms, (sizes[index], 0))
        if tightest == len(rooms):
            filled.append([])
            room, number = limit, len(filled) - 1
        else:
            room, number = rooms.pop(tightest)
        filled[number].append(index)
        insort(rooms, (room - sizes[index], number))
    packs: list[Pack] = [
        [(pack[0], 0), *((after, min(shared[before + 1 : after + 1])) for before, after in pairwise(pack))]
        for pack in map(sorted, filled)
    ]
    return packs, max(sum(sizes[index] - prefix for index, prefix in pack) for pack in packs)
