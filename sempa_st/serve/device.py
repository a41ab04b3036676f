"""One device for two kinds of work, in turns."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EMBEDDING = "embedding"
GENERATION = "generation"
_MOMENT = 0.05
"""Seconds for which a kind of work that has left the device still counts as there: so long it takes to come back with
the next token of a text."""


class DeviceTurns:
    """Give a device to one thread at a time, and the same share of its time to either kind of work that waits.

    This is start-time fair queueing: each kind has a clock of the seconds that it has had, and the kind whose clock is
    behind goes next. A kind that comes back after a pause starts at the clock of the work last begun, so that a pause
    earns no credit; a moment is no pause: a kind that is behind keeps its credit, and the device is kept free for it.
    Within a kind, who came first goes first.

    Args:
        kinds: Names of the kinds of work.
        now: Clock, in seconds.

    >>> turns = DeviceTurns()
    >>> with turns.turn("embedding"):
    ...     turns.is_wanted("generation")
    False
    """

    def __init__(
        self, kinds: tuple[str, ...] = (EMBEDDING, GENERATION), now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._now = now
        self._condition = threading.Condition()
        self._clocks = dict.fromkeys(kinds, 0.0)
        self._waiting: dict[str, deque[object]] = {kind: deque() for kind in kinds}
        self._running: str | None = None
        self._since = 0.0
        self._left = dict.fromkeys(kinds, -math.inf)  # when each kind last had the device
        self._begun = 0.0  # the clock of the work last begun, when it began

    @contextmanager
    def turn(self, kind: str) -> Iterator[None]:
        """Hold the device within the block."""
        self.acquire(kind)
        try:
            yield
        finally:
            self.release()

    def acquire(self, kind: str) -> None:
        """Wait for a turn."""
        ticket = object()
        with self._condition:
            away = not self._waiting[kind] and self._running != kind
            if away and time.monotonic() - self._left[kind] > _MOMENT:
                self._clocks[kind] = max(self._clocks[kind], self._begun)
            self._waiting[kind].append(ticket)
            while self._running is not None or self._next() is not ticket or self._held_for_another(kind) > 0:
                free = self._running is None and self._next() is ticket
                self._condition.wait(self._held_for_another(kind) if free else None)
            self._waiting[kind].popleft()
            self._running, self._since, self._begun = kind, self._now(), self._clocks[kind]

    def release(self) -> None:
        """End the turn."""
        with self._condition:
            assert self._running is not None
            self._clocks[self._running] += self._now() - self._since
            self._left[self._running] = time.monotonic()
            self._running = None
            self._condition.notify_all()

    def is_wanted(self, kind: str) -> bool:
        """Whether work of this kind waits for a turn."""
        return bool(self._waiting[kind])

    def _held_for_another(self, kind: str) -> float:
        """Return for how many seconds the device is kept free for a kind that is behind and has left a moment ago."""
        behind = [other for other, clock in self._clocks.items() if clock < self._clocks[kind] and other != kind]
        times = [self._left[other] + _MOMENT - time.monotonic() for other in behind if not self._waiting[other]]
        return max(times, default=0.0)

    def _next(self) -> object:
        kind = min((kind for kind in self._waiting if self._waiting[kind]), key=self._clocks.__getitem__)
        return self._waiting[kind][0]
