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


@pytest.fixture(params=[1, 2], ids=["one place", "two places"])
def threads(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def embedder(threads: int, model: Model, batches: list[int]) -> Iterator[Embedder]:
    made: Any = model
    embedder = Embedder(made, DeviceTurns(threads=threads), max_queue=100, max_wait=60.0, observe=batches.append)
    yield embedder
    model.free.set()
    embedder.close()


def submit(embedder: Embedder, count: int) -> list[Request]:
    return [embedder.submit([str(number)]) for number in range(count)]


def answers(requests: list[Request]) -> list[float]:
    return [float(request.future.result(20)[0, 0]) for request in requests]


def test_a_batch_waits_for_as_many_clients_as_were_answered(
    embedder: Embedder, model: Model, batches: list[int], threads: int
) -> None:
    first = []
    for place in range(threads):  # keep all threads busy
        first += submit(embedder, 1)
        while len(batches) <= place:
            time.sleep(0.001)
    rest = submit(embedder, 4)  # gather meanwhile
    model.free.set()
    assert answers(first + rest) == [0] * threads + [0, 1, 2, 3]
    if threads > 1:
        return  # the other thread, which has answered one client, takes whoever comes
    back = submit(embedder, 2)
    time.sleep(0.1)  # the others are late
    assert batches == [1, 4]
    back += submit(embedder, 2)
    assert answers(back) == [0, 1, 0, 1]
    assert batches == [1, 4, 4]


def test_a_lone_request_does_not_wait_beside_a_thread_that_waits_for_others(
    embedder: Embedder, model: Model, batches: list[int], threads: int
) -> None:
    if threads == 1:
        pytest.skip("there is no other thread")
    first = submit(embedder, 1)
    while not batches:
        time.sleep(0.001)
    many = submit(embedder, 4)
    model.free.set()
    answers(first + many)  # the thread of the four waits for four clients, a minute long
    for _ in range(5):
        assert answers(submit(embedder, 1)) == [0]


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
