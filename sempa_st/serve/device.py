"""One device for two kinds of work, in turns."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sempa_st.serve.teams import on_own_thread

EMBEDDING = "embedding"
GENERATION = "generation"
_MOMENT = 0.05
"""Seconds for which a kind of work that has left the device still counts as there: so long it takes to come back with
the next token of a text."""


class DeviceTurns:
    """Give the places of a device to as many threads, and the same share of its time to either kind of work that waits.

    A GPU has one place. A CPU with two threads or more has two, and half of the threads for work that begins beside
    other work: two pieces side by side do not wait for each other after each matrix product, as the threads of one do,
    so that they end sooner than one after the other.

    One generation runs at a time, whatever the places: what it draws comes from torch's own generator, which threads
    share. The kind that has fewer places goes next. Between kinds that have as many, this is start-time fair queueing:
    each kind has a clock of the seconds that it has had, and the kind whose clock is behind goes next. A kind that
    comes back after a pause starts at the clock of the work last begun, so that a pause earns no credit; a moment is no
    pause: the kind keeps its credit, and the last free place is kept for it if it goes next. Within a kind, who came
    first goes first.

    Args:
        kinds: Names of the kinds of work.
        threads: Threads of the device, for a CPU. :meth:`compute` and :meth:`use_share` divide them.
        now: Clock, in seconds.

    >>> turns = DeviceTurns()
    >>> with turns.turn("embedding"):
    ...     turns.is_wanted("generation")
    False
    """

    def __init__(
        self,
        kinds: tuple[str, ...] = (EMBEDDING, GENERATION),
        threads: int = 1,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.places = 2 if threads > 1 else 1
        self._threads = threads
        self._now = now
        self._condition = threading.Condition()
        self._clocks = dict.fromkeys(kinds, 0.0)
        self._waiting: dict[str, deque[object]] = {kind: deque() for kind in kinds}
        self._running: Counter[str] = Counter()  # the places that each kind has
        self._left = dict.fromkeys(kinds, -math.inf)  # when each kind last left a place
        self._begun = 0.0  # the clock of the work last begun, when it began

    @contextmanager
    def turn(self, kind: str) -> Iterator[None]:
        """Hold a place within the block."""
        since = self.acquire(kind)
        try:
            yield
        finally:
            self.release(kind, since)

    def acquire(self, kind: str) -> float:
        """Wait for a turn; returns when it began, for :meth:`release`."""
        ticket = object()
        with self._condition:
            away = not self._waiting[kind] and not self._running[kind]
            if away and time.monotonic() - self._left[kind] > _MOMENT:
                self._clocks[kind] = max(self._clocks[kind], self._begun)
            self._waiting[kind].append(ticket)
            while not (free := self._is_free_for(ticket)) or self._held_for_another(kind) > 0:
                self._condition.wait(self._held_for_another(kind) if free else None)
            self._waiting[kind].popleft()
            self._running[kind] += 1
            self._begun = self._clocks[kind]
            self._condition.notify_all()  # the next may take the other place
            return self._now()

    def release(self, kind: str, since: float) -> None:
        """End the turn that began then."""
        with self._condition:
            self._clocks[kind] += self._now() - since
            self._left[kind] = time.monotonic()
            self._running[kind] -= 1
            self._condition.notify_all()

    def compute(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run work of a turn with its share of the device's threads."""

        def with_share() -> Any:
            self.use_share()
            return work(*args)

        return on_own_thread(with_share) if self.places > 1 else work(*args)

    def use_share(self) -> None:
        """Let the calling thread compute with its share of the device's threads: all while there is no other work."""
        if self.places > 1:
            shared = self._running.total() > 1 or any(self._waits_for_place(kind) for kind in self._waiting)
            torch.get_num_threads()  # a thread that has not asked yet takes over what another thread sets last
            torch.set_num_threads(self._threads // self.places if shared else self._threads)

    def is_wanted(self, kind: str) -> bool:
        """Whether work of this kind waits for a turn, and none of it has a place."""
        return bool(self._waiting[kind]) and not self._running[kind]

    def _claim(self, kind: str) -> tuple[int, float]:
        """Return what decides between two kinds; the smaller goes first."""
        return self._running[kind], self._clocks[kind]

    def _is_free_for(self, ticket: object) -> bool:
        if self._running.total() >= self.places:
            return False
        first = min(filter(self._waits_for_place, self._waiting), key=self._claim, default=None)
        return first is not None and self._waiting[first][0] is ticket

    def _waits_for_place(self, kind: str) -> bool:
        return bool(self._waiting[kind]) and not (kind == GENERATION and self._running[kind])

    def _held_for_another(self, kind: str) -> float:
        """Return for how many seconds the last place is kept free for a kind that goes first and left a moment ago."""
        if self.places - self._running.total() > 1:
            return 0.0
        first = [other for other in self._clocks if other != kind and self._claim(other) < self._claim(kind)]
        times = [self._left[other] + _MOMENT - time.monotonic() for other in first if not self._waiting[other]]
        return max(times, default=0.0)
