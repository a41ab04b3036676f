"""Turns on the device: one at a time, and the same share of the time for both kinds."""

from __future__ import annotations

import threading
import time

import pytest

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
    turns.acquire(GENERATION)

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
    turns.release()
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
