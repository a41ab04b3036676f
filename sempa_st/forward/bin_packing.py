"""Bin packing: which sequences share a pack, and how wide packs are."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import pairwise

_WIDTH, _STEP = 128, 16
"""Tokens of a pack and how finely it is varied: some sentences, so few that the masked keys of others cost little."""
_EVEN = 1500
_MANY = 256
"""Rows beyond which fewer widths are tried."""
_MISSES = 32
"""Rows one after another that do not fit, after which no more are tried for a pack: the rest would hardly fill it."""


def fill_packs(sizes: Sequence[int], alike: Sequence[int]) -> tuple[list[list[tuple[int, int]]], int]:
    """Return what goes into each pack, and the width of the packs: the one that leaves little room.

    A wider pack costs more attention: at :data:`_EVEN` tokens as much as the rest of a small decoder.

    Args:
        sizes: Tokens of each row, the rows sorted by their tokens.
        alike: How many tokens each row begins with as the one before it does; 0 for the first one.

    Returns:
        For each pack its rows by number, in their order, each with the number of tokens that it begins with as the one
        before it in the pack does, and which the pack holds already.

    >>> fill_packs([50, 100, 60], [0, 0, 20])
    ([[(0, 0), (1, 0), (2, 20)]], 190)
    """
    longest = max(sizes)
    # Of many rows the widest packs leave next to no room, whatever their exact width.
    step = _STEP * (1 + len(sizes) // _MANY)
    widths = range(max(_WIDTH, 2 * longest), longest - 1, -step)
    # The second leaves less room where rows are of very different lengths and share little.
    found = [_fill(sizes, alike, width) for width in widths]
    found += [_fill_longest_first(sizes, alike, width) for width in widths]
    return min(found, key=lambda filled: len(filled[0]) * filled[1] * (_EVEN + filled[1]))


def _fill(sizes: Sequence[int], alike: Sequence[int], most: int) -> tuple[list[list[tuple[int, int]]], int]:
    """Fill packs of at most ``most`` tokens, each with the first rows in their order that still fit."""
    packs: list[list[tuple[int, int]]] = []
    rooms: list[int] = []
    left = list(zip(range(len(sizes)), alike, strict=True))
    while left:
        pack: list[tuple[int, int]] = []
        rest: list[tuple[int, int]] = []
        room, in_pack, in_rest, missed = most, 0, 0, 0
        for number, (row, same) in enumerate(left):
            in_pack, in_rest = min(in_pack, same), min(in_rest, same)
            if sizes[row] - in_pack <= room:
                pack.append((row, in_pack))
                room -= sizes[row] - in_pack
                in_pack, missed = sizes[row], 0
                continue
            rest.append((row, in_rest))
            in_rest = sizes[row]
            missed += 1
            if missed == _MISSES:
                rest += left[number + 1 :]
                break
        packs.append(pack)
        rooms.append(room)
        left = rest
    return packs, most - min(rooms)


def _fill_longest_first(
    sizes: Sequence[int], alike: Sequence[int], most: int
) -> tuple[list[list[tuple[int, int]]], int]:
    """Fill packs of at most ``most`` tokens: the longest rows first, each where it leaves the least room."""
    filled: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # of each pack, with its number, in order
    for row in sorted(range(len(sizes)), key=lambda row: -sizes[row]):
        least = bisect_left(rooms, (sizes[row], 0))
        if least == len(rooms):
            filled.append([])
            room, number = most, len(filled) - 1
        else:
            room, number = rooms.pop(least)
        filled[number].append(row)
        insort(rooms, (room - sizes[row], number))
    ordered = [sorted(pack) for pack in filled]
    packs = [[(pack[0], 0), *((two, min(alike[one + 1 : two + 1])) for one, two in pairwise(pack))] for pack in ordered]
    return packs, max(sum(sizes[row] - same for row, same in pack) for pack in packs)
