"""Gather the texts of many requests into batches, and embed them one batch after the other."""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from sempa_st.serve.device import EMBEDDING, GENERATION, DeviceTurns
from sempa_st.utils.finite import NotFiniteError

_MAX_TEXTS = 64
"""Texts of a batch."""
_MAX_TEXTS_BESIDE_GENERATION = 16
"""The same while a generation waits for the device, so that its text does not stutter."""
_CHARACTERS = 256
"""Characters of a text, in the mean of a batch; longer texts make smaller batches."""
_PATIENCE = 0.05
"""Share of the time of a batch for which the next one may wait to fill."""


class QueueFullError(Exception):
    """More texts wait than the queue may hold."""


@dataclass(eq=False)
class Request:
    """The texts of a request.

    Attributes:
        texts: The texts.
        future: The result, of shape (texts, dimensions).
        abandoned: Set this when nobody waits for the result any more; texts that have not begun are then left out.
    """

    texts: list[str]
    future: Future[NDArray[np.float32]] = field(default_factory=Future)
    abandoned: bool = False
    _vectors: dict[int, NDArray[np.float32]] = field(default_factory=dict)
    _begun: int = 0

    @property
    def remaining(self) -> int:
        """Number of texts that have not begun."""
        return len(self.texts) - self._begun

    def next_text(self) -> int:
        """Begin the next text, and return its index."""
        self._begun += 1
        return self._begun - 1

    def add(self, index: int, vector: NDArray[np.float32]) -> None:
        """Note the vector of a text; the last one completes the result."""
        self._vectors[index] = vector
        if len(self._vectors) == len(self.texts):
            vectors = np.stack([self._vectors[number] for number in range(len(self.texts))])
            with suppress(InvalidStateError):  # another text has failed, or the client has left
                self.future.set_result(vectors)

    def fail(self, error: Exception) -> None:
        """End the request with an error, unless it has ended."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


class Embedder:
    """A queue of texts, and the thread that embeds them.

    Each batch takes one text of each waiting request in turn, until it is full, so that a short request does not wait
    for all of a long one. While a batch runs, the next one gathers by itself. After a batch of several clients, the
    next one waits a moment for them to come back: one batch of 64 texts takes a tenth less time than two of 32. A
    client that is alone does not wait, nor does a batch that is full.

    Args:
        model: Embedding model.
        turns: Turns on its device.
        max_queue: Texts that may wait.
        max_wait: Seconds to wait for clients to come back; a twentieth of the last batch's time where that is longer.
        observe: Called with the number of texts of each batch.
    """

    def __init__(
        self, model: SentenceTransformer, turns: DeviceTurns, *, max_queue: int, max_wait: float, observe: Any
    ) -> None:
        self._model = model
        self._turns = turns
        self._max_queue = max_queue
        self._max_wait = max_wait
        self._observe = observe
        self._condition = threading.Condition()
        self._requests: deque[Request] = deque()
        self._waiting = 0
        self._closed = False
        self._others = 0  # requests that waited when the last batch was done
        self._full = _MAX_TEXTS  # texts with which the next batch is full
        self._thread = threading.Thread(target=self._run, name="sempa-embedder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of texts that wait."""
        return self._waiting

    def submit(self, texts: list[str]) -> Request:
        """Queue the texts of a request. An empty queue takes a request of any size.

        Raises:
            QueueFullError: If they do not fit into the queue.
        """
        request = Request(texts)
        with self._condition:
            if self._closed or (self._waiting and self._waiting + len(texts) > self._max_queue):
                raise QueueFullError
            self._requests.append(request)
            self._waiting += len(texts)
            self._condition.notify_all()
        return request

    def close(self) -> None:
        """Take no more requests, answer those that wait, and end the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join()

    def _run(self) -> None:
        clients, patience = 0, 0.0
        while self._wait(clients, patience):
            with self._turns.turn(EMBEDDING):
                batch = self._gather()
                begun = time.perf_counter()
                if batch:
                    self._compute(batch)
            answered = {request for request, _ in batch if request.future.done() and not request.remaining}
            clients = len(answered) + self._others
            patience = max(self._max_wait, _PATIENCE * (time.perf_counter() - begun))

    def _wait(self, clients: int, patience: float) -> bool:
        """Wait some seconds for these clients or a full batch, then for one; returns False when the work is over."""
        with self._condition:
            full = min(self._full, self._max_queue)
            self._condition.wait_for(
                lambda: len(self._requests) >= clients or self._waiting >= full or self._closed, patience
            )
            self._condition.wait_for(lambda: self._requests or self._closed)
            return bool(self._requests)

    def _gather(self) -> list[tuple[Request, int]]:
        """Take the next texts from the queue: (request, index of its text)."""
        limit = _MAX_TEXTS_BESIDE_GENERATION if self._turns.is_wanted(GENERATION) else _MAX_TEXTS
        batch: list[tuple[Request, int]] = []
        characters = self._others = 0
        with self._condition:
            while self._requests and len(batch) < limit and characters < limit * _CHARACTERS:
                request = self._requests.popleft()
                if request.abandoned or request.future.done():
                    self._waiting -= request.remaining
                    continue
                index = request.next_text()
                self._waiting -= 1
                batch.append((request, index))
                characters += len(request.texts[index])
                if request.remaining:
                    self._requests.append(request)
            self._full = len(batch) if self._requests else _MAX_TEXTS
        return batch

    def _compute(self, batch: list[tuple[Request, int]]) -> None:
        try:
            self._turns.compute(self._embed, batch)
        except Exception as error:  # no thread to be had, say; the next batch may have better luck
            for request, _ in batch:
                request.fail(error)

    def _embed(self, batch: list[tuple[Request, int]]) -> None:
        self._observe(len(batch))
        try:
            vectors = self._encode([request.texts[index] for request, index in batch])
        except Exception as error:  # whatever it is, it is an answer, and the thread goes on
            if len(batch) > 1:  # of the one text that it is about, and not of the others
                for item in batch:
                    self._embed([item])
            else:
                request, index = batch[0]
                if isinstance(error, NotFiniteError):  # named by its place in the request, not in this batch of one
                    error = error.naming([(index, request.texts[index])], len(request.texts))
                request.fail(error)
            return
        for (request, index), vector in zip(batch, vectors, strict=True):
            request.add(index, vector)

    def _encode(self, texts: list[str]) -> Any:
        try:
            return self._model.encode(texts, batch_size=_MAX_TEXTS, show_progress_bar=False)
        finally:
            self._others = len(self._requests)  # now, since clients come back as soon as they are answered
