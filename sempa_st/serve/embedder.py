"""Gather the texts of many requests into batches, and embed them on one thread."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from sempa_st.serve.device import EMBEDDING, GENERATION, DeviceTurns

_MAX_TEXTS = 32
"""Texts of a batch."""
_MAX_TEXTS_BESIDE_GENERATION = 8
"""The same while a generation waits for its next token, so that its text does not stutter."""
_MAX_CHARACTERS = 32 * 256


class QueueFullError(Exception):
    """More texts wait than the queue may hold."""


@dataclass(eq=False)
class _Request:
    """The texts of a request; ``vectors`` fills up in any order."""

    texts: list[str]
    future: Future[NDArray[np.float32]]
    vectors: list[NDArray[np.float32] | None] = field(default_factory=list)
    begun: int = 0
    done: int = 0

    def __post_init__(self) -> None:
        self.vectors = [None] * len(self.texts)


class Embedder:
    """A queue of texts, and the thread that embeds them.

    Each batch takes one text of each waiting request in turn, until it is full, so that a short request does not wait
    for all of a long one. While a batch runs, the next one gathers by itself. After a batch of several requests the
    thread waits up to ``max_wait`` for the clients that it has just answered; a request that is alone never waits.

    Args:
        model: Embedding model.
        turns: Turns on its device.
        max_queue: Texts that may wait.
        max_wait: Seconds to wait for more texts.
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
        self._requests: deque[_Request] = deque()
        self._waiting = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="sempa-embedder", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of texts that wait."""
        return self._waiting

    def submit(self, texts: list[str]) -> Future[NDArray[np.float32]]:
        """Queue the texts of a request; the result has the shape (texts, dimensions).

        Raises:
            QueueFullError: If they do not fit into the queue.
        """
        future: Future[NDArray[np.float32]] = Future()
        with self._condition:
            if self._closed or self._waiting + len(texts) > self._max_queue:
                raise QueueFullError
            self._requests.append(_Request(texts, future))
            self._waiting += len(texts)
            self._condition.notify()
        return future

    def close(self) -> None:
        """Take no more requests, answer those that wait, and end the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join()

    def _run(self) -> None:
        crowded = False
        while True:
            with self._condition:
                if crowded and not self._closed:
                    self._condition.wait_for(lambda: self._waiting >= _MAX_TEXTS or self._closed, self._max_wait)
                self._condition.wait_for(lambda: self._requests or self._closed)
                if not self._requests:
                    return
            self._turns.acquire(EMBEDDING)
            try:
                batch = self._gather()
                if batch:
                    self._embed(batch)
            finally:
                self._turns.release()
            crowded = len({id(request) for request, _ in batch}) > 1

    def _gather(self) -> list[tuple[_Request, int]]:
        """Take the next texts from the queue: (request, index of its text)."""
        limit = _MAX_TEXTS_BESIDE_GENERATION if self._turns.is_wanted(GENERATION) else _MAX_TEXTS
        batch: list[tuple[_Request, int]] = []
        characters = 0
        with self._condition:
            while self._requests and len(batch) < limit and characters < _MAX_CHARACTERS:
                request = self._requests.popleft()
                if request.begun == 0 and not request.future.set_running_or_notify_cancel():
                    self._waiting -= len(request.texts)  # the client is gone
                    continue
                batch.append((request, request.begun))
                characters += len(request.texts[request.begun])
                request.begun += 1
                self._waiting -= 1
                if request.begun < len(request.texts):
                    self._requests.append(request)
        return batch

    def _embed(self, batch: list[tuple[_Request, int]]) -> None:
        self._observe(len(batch))
        try:
            vectors = self._model.encode(
                [request.texts[index] for request, index in batch], batch_size=_MAX_TEXTS, show_progress_bar=False
            )
        except Exception as error:  # whatever it is, it is the answer to these requests, and the thread goes on
            self._fail({id(request): request for request, _ in batch}.values(), error)
            return
        for (request, index), vector in zip(batch, vectors, strict=True):
            request.vectors[index] = vector
            request.done += 1
            if request.done == len(request.texts) and not request.future.done():
                request.future.set_result(np.stack([v for v in request.vectors if v is not None]))

    def _fail(self, requests: Any, error: Exception) -> None:
        with self._condition:
            for request in requests:
                if request in self._requests:
                    self._requests.remove(request)
                    self._waiting -= len(request.texts) - request.begun
                if not request.future.done():
                    request.future.set_exception(error)
