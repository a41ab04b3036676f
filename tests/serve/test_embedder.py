"""How the server gathers texts of many requests into batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sempa_st.serve.device import DeviceTurns
from sempa_st.serve.embedder import Embedder, Request


class Model:
    """An embedding model that is held until it is let go."""

    def __init__(self) -> None:
        self.free = threading.Event()

    def encode(self, texts: list[str], **_: Any) -> np.ndarray:
        assert self.free.wait(20)
        return np.array([[float(text)] for text in texts], dtype=np.float32)


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def batches() -> list[int]:
    return []


@pytest.fixture
def embedder(model: Model, batches: list[int]) -> Iterator[Embedder]:
    made: Any = model
    embedder = Embedder(made, DeviceTurns(), max_queue=100, max_wait=60.0, observe=batches.append)
    yield embedder
    model.free.set()
    embedder.close()


def submit(embedder: Embedder, count: int) -> list[Request]:
    return [embedder.submit([str(number)]) for number in range(count)]


def answers(requests: list[Request]) -> list[float]:
    return [float(request.future.result(20)[0, 0]) for request in requests]


def test_a_batch_waits_for_as_many_clients_as_were_answered(
    embedder: Embedder, model: Model, batches: list[int]
) -> None:
    first = submit(embedder, 1)
    while not batches:
        time.sleep(0.001)
    rest = submit(embedder, 4)  # gather while the first batch runs
    model.free.set()
    assert answers(first + rest) == [0, 0, 1, 2, 3]
    back = submit(embedder, 2)
    time.sleep(0.1)  # the others are late
    assert batches == [1, 4]
    back += submit(embedder, 2)
    assert answers(back) == [0, 1, 0, 1]
    assert batches == [1, 4, 4]


def test_a_request_that_is_alone_does_not_wait(embedder: Embedder, model: Model, batches: list[int]) -> None:
    model.free.set()
    for number in range(3):
        assert answers(submit(embedder, 1)) == [0]  # within 20 seconds, a third of the wait
        assert batches == [1] * (number + 1)


def test_closing_answers_what_waits(embedder: Embedder, model: Model) -> None:
    requests = submit(embedder, 5)
    threading.Timer(0.05, model.free.set).start()
    embedder.close()
    assert answers(requests) == [0, 1, 2, 3, 4]
