"""OpenMP's teams: the threads with which one thread computes.

A team lives as long as the thread that it belongs to. Teams spin from one product to the next, which is what makes them
fast, but only while the threads of all teams together are no more than the cores: one idle team makes another's work a
third slower. So no thread that lives as long as the server has one here; a generation's ends with its text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch


def on_own_thread(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run something on a thread that ends with it and takes its team along, and return its result."""
    with ThreadPoolExecutor(1, thread_name_prefix="sempa-work") as pool:
        return pool.submit(run, *args, **kwargs).result()


@contextmanager
def without_team() -> Iterator[None]:
    """Let the calling thread compute alone within the block, so that OpenMP keeps no team for it afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
