"""Where a text ends because it spells out a stop sequence, as OpenAI's API means it: before the sequence."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sempa_st.serve.protocol import RequestError

_MOST = 4
_LONGEST = 100


def stop_sequences(value: Any) -> tuple[str, ...]:
    """Return the stop sequences of a request.

    Args:
        value: The field ``stop``: None, a text, or a list of texts.

    Raises:
        RequestError: If it is anything else, or too much.
    """
    found = [] if value is None else [value] if isinstance(value, str) else value
    if (
        not isinstance(found, list)
        or len(found) > _MOST
        or not all(isinstance(stop, str) and 0 < len(stop) <= _LONGEST for stop in found)
    ):
        raise RequestError(
            400,
            f"stop is {value!r:.80}. Expected a text, or a list of {_MOST} texts at most, of 1 to {_LONGEST} "
            "characters.",
            param="stop",
        )
    return tuple(found)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first stop sequence begins in a text, or None.

    >>> first_stop("one. Two. Three", (" Th", "."))
    3
    """
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


class StopQueue:
    """A queue of the texts of a stream that ends before a stop sequence.

    The end of a text that may be the beginning of a stop sequence is held back until more is known.

    Args:
        queue: The stream: texts, other items, and None at its end.
        stops: Stop sequences.
    """

    def __init__(self, queue: asyncio.Queue[Any], stops: Sequence[str]) -> None:
        self._queue = queue
        self._stops = stops
        self._held = ""
        self._ready: list[Any] = []
        self._ended = False

    async def get(self) -> Any:
        """Return the next item."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.pop(0)

    def get_nowait(self) -> Any:
        """Return the next item, or raise :class:`asyncio.QueueEmpty`."""
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.pop(0)

    def _take(self, item: Any) -> None:
        if type(item) is not str:
            if self._held and not self._ended:
                self._ready.append(self._held)
            self._held = ""
            self._ready.append(item)
            return
        if self._ended:
            return
        text = self._held + item
        place = first_stop(text, self._stops)
        self._ended = place is not None
        kept = place if place is not None else len(text) - self._unsure(text)
        self._held = "" if self._ended else text[kept:]
        if kept:
            self._ready.append(text[:kept])

    def _unsure(self, text: str) -> int:
        """Return the length of the longest end of a text that begins a stop sequence."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
