"""Use one model in threads and pools of processes: each gets the vectors that it would get alone, and nothing hangs."""

from __future__ import annotations

import multiprocessing
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import numpy as np
from helpers.tiny import sample_sentences
from sentence_transformers import SentenceTransformer

import sempa_st

_EQUAL = 1e-5
_TEXTS = sample_sentences()[:24]
_PROMPT = "A rainy Sunday is"


def _forget_main() -> None:
    """Let processes that this one starts import what they need and not the whole suite."""
    sys.modules["__main__"] = ModuleType("__main__")


def _load(folder: Path) -> SentenceTransformer:
    return sempa_st.load(folder, dtype="float32", device="cpu")


def _check(found: Any, expected: Any) -> None:
    far = float(np.abs(np.asarray(found) - np.asarray(expected)).max())
    if not far <= _EQUAL:
        raise AssertionError(f"vectors differ by {far} from those computed alone")


def _generate(model: Any) -> list[int]:
    inputs = model[0].tokenizer(_PROMPT, return_tensors="pt")
    return list(model[0].model.generate(**inputs, max_new_tokens=8, do_sample=False)[0].tolist())


def _threads(folder: Path) -> None:
    """Embed in four threads beside two that generate."""
    model = _load(folder)
    expected, continued = model.encode(_TEXTS), _generate(model)
    faults: list[str] = []

    def embed(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(20):
            rows = draw.sample(range(len(_TEXTS)), draw.randrange(1, len(_TEXTS)))
            _check(model.encode([_TEXTS[row] for row in rows], batch_size=5), expected[rows])

    def generate(seed: int) -> None:
        for _ in range(20):
            if _generate(model) != continued:
                raise AssertionError("a generated text differs")

    def run(work: Callable[[int], None], seed: int) -> None:
        try:
            work(seed)
        except BaseException as error:
            faults.append(repr(error))

    running = [Thread(target=run, args=(work, seed)) for seed, work in enumerate([embed, generate, embed] * 2)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if faults:
        raise AssertionError("; ".join(faults))


_shared: Any = None
"""The model of a pool's process."""


def _share(model: Any) -> None:
    global _shared
    _shared = model if isinstance(model, SentenceTransformer) else _load(model)


def _embed(texts: list[str]) -> Any:
    return _shared.encode(texts)


def _pool(method: str, load: bool, folder: Path) -> None:
    """Embed in two processes that are started by a method, with a model that they load or are given."""
    _forget_main()
    model = _load(folder)
    expected = model.encode(_TEXTS)
    context = multiprocessing.get_context(method)
    with context.Pool(2, _share, (folder if load else model,)) as pool:
        parts = pool.map(_embed, [_TEXTS[at : at + 6] for at in range(0, len(_TEXTS), 6)])
        pool.close()
        pool.join()
    _check(np.concatenate(parts), expected)
    _check(model.encode(_TEXTS), expected)


def _own_pool(folder: Path) -> None:
    """Embed in the processes that sentence-transformers starts."""
    _forget_main()
    model = _load(folder)
    expected = model.encode(_TEXTS)
    pool = model.start_multi_process_pool(["cpu", "cpu"])
    try:
        _check(model.encode(_TEXTS, pool=pool, chunk_size=6), expected)
    finally:
        model.stop_multi_process_pool(pool)


WORKS: dict[str, Callable[[Path], None]] = {
    "threads that embed and generate": _threads,
    "a fork pool that loads": partial(_pool, "fork", True),
    "a fork pool that is given a loaded model": partial(_pool, "fork", False),
    "a spawn pool that loads": partial(_pool, "spawn", True),
    "a spawn pool that is given a loaded model": partial(_pool, "spawn", False),
    "sentence-transformers' own pool": _own_pool,
}
