"""Turns on the device: as many at a time as it has places, and the same share of the time for both kinds."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter

import pytest
import torch

from sempa_st.serve import device
from sempa_st.serve.device import EMBEDDING, GENERATION, DeviceTurns


class Clock:
    """A clock that moves only when work is done."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(turns: DeviceTurns, clock: Clock, costs: dict[str, float], rounds: int) -> list[str]:
    """Let a thread of each kind take turns that cost so many seconds; returns the kinds in order."""
    order: list[str] = []
    ready = threading.Barrier(len(costs) + 1)

    def work(kind: str, cost: float) -> None:
        ready.wait()
        for _ in range(rounds):
            with turns.turn(kind):
                order.append(kind)
                clock.now += cost
                # The other kind is waiting when this turn ends, as under load.
                deadline = time.monotonic() + 5
                while not any(turns.is_wanted(other) for other in costs if other != kind):
                    if len(order) > rounds or time.monotonic() > deadline:
                        break
                    time.sleep(0.0005)

    threads = [threading.Thread(target=work, args=item) for item in costs.items()]
    for thread in threads:
        thread.start()
    ready.wait()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return order


@pytest.mark.parametrize("factor", [1, 10])
def test_both_kinds_get_the_same_time(factor: int) -> None:
    clock = Clock()
    order = run(DeviceTurns(now=clock), clock, {EMBEDDING: float(factor), GENERATION: 1.0}, rounds=60)
    both = order[: max(i for i, kind in enumerate(order) if kind == EMBEDDING and order[i + 1 :].count(GENERATION))]
    embedding, generation = both.count(EMBEDDING) * factor, both.count(GENERATION)
    assert abs(embedding - generation) <= 2 * factor, (embedding, generation)


def test_a_pause_earns_no_credit() -> None:
    clock = Clock()
    turns = DeviceTurns(now=clock)
    for _ in range(100):
        with turns.turn(EMBEDDING):
            clock.now += 1
    order = run(turns, clock, {EMBEDDING: 1.0, GENERATION: 1.0}, rounds=20)
    assert order[:10].count(EMBEDDING) >= 4


def test_one_at_a_time_and_in_order() -> None:
    turns = DeviceTurns()
    inside, most, order = 0, 0, []
    since = turns.acquire(GENERATION)

    def work(number: int) -> None:
        nonlocal inside, most
        with turns.turn(EMBEDDING):
            inside += 1
            most = max(most, inside)
            order.append(number)
            time.sleep(0.002)
            inside -= 1

    threads = []
    for number in range(8):
        threads.append(threading.Thread(target=work, args=(number,)))
        threads[-1].start()
        while len(turns._waiting[EMBEDDING]) < number + 1:
            time.sleep(0.001)
    assert turns.is_wanted(EMBEDDING) and not turns.is_wanted(GENERATION)
    turns.release(GENERATION, since)
    for thread in threads:
        thread.join(10)
    assert most == 1 and order == list(range(8))


def test_a_moment_between_two_turns_costs_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tokens a generation is away; another kind that always waits must not take the device each time."""
    monkeypatch.setattr(device, "_MOMENT", 1.0)
    clock, order, done = Clock(), [], threading.Event()
    turns = DeviceTurns(now=clock)

    def generate() -> None:
        for _ in range(40):
            with turns.turn(GENERATION):
                order.append(GENERATION)
                clock.now += 1
            time.sleep(0.002)
        done.set()

    def embed() -> None:
        while not done.is_set():
            with turns.turn(EMBEDDING):
                order.append(EMBEDDING)
                clock.now += 10

    threads = [threading.Thread(target=work) for work in (generate, embed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    last = max(index for index, kind in enumerate(order) if kind == GENERATION)
    assert 2 <= order[:last].count(EMBEDDING) <= 6, order


def test_two_places_are_taken_at_once_and_share_the_threads() -> None:
    turns = DeviceTurns(threads=2)
    both, shares = threading.Barrier(2), []

    def work(kind: str) -> None:
        with turns.turn(kind):
            both.wait(10)
            turns.use_share()
            shares.append(torch.get_num_threads())
            both.wait(10)
        both.wait(10)
        with both_done, turns.turn(kind):
            turns.use_share()
            alone.append(torch.get_num_threads())

    both_done, alone = threading.Lock(), list[int]()
    before = torch.get_num_threads()
    threads = [threading.Thread(target=work, args=(kind,)) for kind in (EMBEDDING, GENERATION)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert shares == [1, 1]
    assert alone == [2, 2]
    assert torch.get_num_threads() == before  # a thread's own number


def test_each_kind_keeps_a_place_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three threads of one kind and one of the other, which comes back after each token: each kind has one place."""
    monkeypatch.setattr(device, "_MOMENT", 5.0)
    turns, order, done = DeviceTurns(threads=2), [], threading.Event()
    inside, most = Counter[str](), Counter[str]()

    def generate() -> None:
        for _ in range(60):
            with turns.turn(GENERATION):
                order.append(GENERATION)
                time.sleep(0.002)
        done.set()

    def embed() -> None:
        while not done.is_set():
            with turns.turn(EMBEDDING):
                inside[EMBEDDING] += 1
                if len(order) > 5 and not done.is_set():  # while both kinds are there
                    most[EMBEDDING] = max(most[EMBEDDING], inside[EMBEDDING])
                time.sleep(0.02)
                inside[EMBEDDING] -= 1

    threads = [threading.Thread(target=work) for work in (generate, embed, embed, embed)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert most[EMBEDDING] == 1


def test_one_generation_at_a_time() -> None:
    turns, inside, most = DeviceTurns(threads=2), 0, 0
    shares = set()

    def generate() -> None:
        nonlocal inside, most
        for _ in range(20):
            with turns.turn(GENERATION):
                turns.use_share()
                shares.add(torch.get_num_threads())
                inside += 1
                most = max(most, inside)
                time.sleep(0.001)
                inside -= 1

    threads = [threading.Thread(target=generate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert most == 1
    assert shares == {2}  # the other place stays free, and its thread helps


def test_a_place_is_kept_free_only_when_it_is_the_last() -> None:
    """Embedding is behind and has left a moment ago; with two free places a token need not wait for it."""
    clock = Clock()
    turns = DeviceTurns(threads=2, now=clock)
    written = threading.Event()
    with turns.turn(GENERATION):
        clock.now += 100.0
    with turns.turn(EMBEDDING):
        pass
    turns._left[EMBEDDING] = math.inf  # it has always left just now

    def generate() -> None:
        with turns.turn(GENERATION):
            written.set()

    threading.Thread(target=generate, daemon=True).start()
    assert written.wait(20)
