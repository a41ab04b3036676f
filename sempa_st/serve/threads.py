"""Work that would hold up other requests, on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request

from sempa_st.serve.protocol import RequestError

_LONG = 20_000
"""Characters, or numbers, from which on work moves off the thread that all requests share."""
_GONE = 499
"""What servers note for a client that did not wait."""


async def off_loop(size: int, run: Callable[..., Any], *args: Any) -> Any:
    """Run something at once if it is small, and on another thread otherwise."""
    return run(*args) if size < _LONG else await asyncio.to_thread(run, *args)


async def while_connected(request: Request, answer: Awaitable[Any]) -> Any:
    """Await an answer, and cancel it when the client leaves.

    Raises:
        RequestError: If the client has left; nobody reads it.
    """
    working = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RequestError(_GONE, "The client has left.")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
