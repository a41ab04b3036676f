"""Packs are whole, as narrow as they say, and the cheapest of those that are tried."""

from __future__ import annotations

import itertools
import random

import pytest

from sempa_st.forward.bin_packing import _fill_in_order, _fill_longest_first, fill_packs


def common(first: list[int], second: list[int]) -> int:
    """Return the length of the prefix that two sequences share."""
    pairs = zip(first, second, strict=False)
    return next((length for length, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


@pytest.mark.parametrize("seed", range(20))
def test_every_sequence_is_in_one_pack_with_the_prefix_that_it_shares_there(seed: int) -> None:
    draw = random.Random(seed)
    count = draw.choice([1, 2, 7, 40, 300])
    rows = sorted([draw.randrange(2) for _ in range(draw.randrange(1, 90))] for _ in range(count))
    sizes = [len(row) for row in rows]
    shared = [0, *(common(before, row) for before, row in itertools.pairwise(rows))]
    for packs, width in (
        fill_packs(sizes, shared),
        _fill_in_order(sizes, shared, 128),
        _fill_longest_first(sizes, shared, 128),
    ):
        assert sorted(index for pack in packs for index, _ in pack) == list(range(count))
        for pack in packs:
            indices = [index for index, _ in pack]
            assert indices == sorted(indices)
            assert [prefix for _, prefix in pack] == [
                0,
                *(common(rows[a], rows[b]) for a, b in itertools.pairwise(indices)),
            ]
        assert width == max(sum(sizes[index] - prefix for index, prefix in pack) for pack in packs)


def test_a_shared_prefix_takes_no_room() -> None:
    assert fill_packs([100, 100], [0, 80]) == ([[(0, 0), (1, 80)]], 120)
    assert _fill_in_order([100, 100, 100], [0, 80, 80], 140) == ([[(0, 0), (1, 80), (2, 80)]], 140)
    assert fill_packs([100] * 4, [0, 90, 90, 90]) == ([[(0, 0), (1, 90), (2, 90), (3, 90)]], 130)


def test_two_narrow_packs_cost_less_than_a_wide_one_without_sharing() -> None:
    """2 x 100 x (1500 + 100) is less than 200 x (1500 + 200)."""
    assert fill_packs([100, 100], [0, 0]) == ([[(0, 0)], [(1, 0)]], 100)


def test_lengths_that_differ_fill_packs_to_the_end() -> None:
    """In order, 30 and 40 would share a pack and leave 60 with 70 to two more."""
    packs, width = fill_packs([30, 40, 60, 70], [0, 0, 0, 0])
    assert (sorted(packs), width) == ([[(0, 0), (3, 0)], [(1, 0), (2, 0)]], 100)


def test_a_pack_is_closed_after_32_sequences_in_a_row_that_do_not_fit() -> None:
    def first_pack(*sizes: int) -> list[int]:
        packs, _ = _fill_in_order(sizes, [0] * len(sizes), 100)
        assert sorted(index for pack in packs for index, _ in pack) == list(range(len(sizes)))
        return [index for index, _ in packs[0]]

    assert first_pack(60, *[50] * 31, 40) == [0, 32]
    assert first_pack(60, *[50] * 32, 40) == [0]
    assert first_pack(60, *[50] * 31, 10, *[50] * 31, 30) == [0, 32, 64]


def test_many_sequences_are_packed_almost_without_gaps() -> None:
    sizes = [10 + number % 50 for number in range(1000)]
    packs, width = fill_packs(sizes, [0] * 1000)
    assert len(packs) * width <= 1.03 * sum(sizes)
