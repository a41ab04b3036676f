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
    yield from running(model, batches, max_wait=60.0)


@pytest.fixture
def impatient(model: Model, batches: list[int]) -> Iterator[Embedder]:
    yield from running(model, batches, max_wait=0.1)


def running(model: Any, batches: list[int], max_wait: float) -> Iterator[Embedder]:
    embedder = Embedder(model, DeviceTurns(threads=2), max_queue=100, max_wait=max_wait, observe=batches.append)
    yield embedder
    model.free.set()
    embedder.close()


def submit(embedder: Embedder, count: int) -> list[Request]:
    return [embedder.submit([str(number)]) for number in range(count)]


def answers(requests: list[Request]) -> list[float]:
    return [float(request.future.result(20)[0, 0]) for request in requests]


def test_a_batch_waits_for_the_clients_that_were_answered_beside_those_that_wait(
    embedder: Embedder, model: Model, batches: list[int]
) -> None:
    first = submit(embedder, 1)
    while not batches:
        time.sleep(0.001)
    rest = submit(embedder, 3)  # gather meanwhile
    model.free.set()
    assert answers(first) == [0]
    time.sleep(0.1)
    assert batches == [1]  # the fourth client is still to come back
    assert answers(rest + submit(embedder, 1)) == [0, 1, 2, 0]
    back = submit(embedder, 2)
    time.sleep(0.1)  # the others are late
    assert batches == [1, 4]
    back += submit(embedder, 2)
    assert answers(back) == [0, 1, 0, 1]
    assert batches == [1, 4, 4]


def test_a_batch_does_not_wait_for_a_request_that_has_more_texts(
    embedder: Embedder, model: Model, batches: list[int]
) -> None:
    model.free.set()
    long = embedder.submit([str(number) for number in range(150)])
    assert long.future.result(20)[:, 0].tolist() == list(range(150))
    assert batches == [64, 64, 22]


def test_clients_that_do_not_come_back_are_not_waited_for(
    impatient: Embedder, model: Model, batches: list[int]
) -> None:
    first = submit(impatient, 1)
    while not batches:
        time.sleep(0.001)
    rest = submit(impatient, 3)
    model.free.set()
    assert answers(first + rest + submit(impatient, 1)) == [0, 0, 1, 2, 0]
    assert answers(submit(impatient, 1)) == [0]  # after a batch of several


def test_a_client_that_leaves_at_the_last_moment_takes_no_thread_along(
    embedder: Embedder, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its future is cancelled between the last look at it and the result."""
    model.free.set()
    stack = np.stack

    def cancel_and_stack(vectors: list[np.ndarray]) -> np.ndarray:
        for request in leaving:
            request.future.cancel()
        return stack(vectors)

    monkeypatch.setattr("sempa_st.serve.embedder.np.stack", cancel_and_stack)
    for _ in range(3):
        leaving: list[Request] = []
        model.free.clear()
        leaving += submit(embedder, 1)
        model.free.set()
        deadline = time.monotonic() + 20
        while not leaving[0].future.done() and time.monotonic() < deadline:  # wait() does not see a cancelled future
            time.sleep(0.001)
    leaving = []
    assert answers(submit(embedder, 1)) == [0]


def test_an_error_outside_of_the_model_is_an_answer_too(embedder: Embedder, model: Model) -> None:
    model.free.set()
    compute = embedder._turns.compute
    embedder._turns.compute = refuse  # type: ignore[method-assign, assignment]
    with pytest.raises(RuntimeError, match="can't start new thread"):
        answers(submit(embedder, 1))
    embedder._turns.compute = compute  # type: ignore[method-assign]
    assert answers(submit(embedder, 1)) == [0]


def refuse(*_: Any, **__: Any) -> Any:
    raise RuntimeError("can't start new thread")


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
