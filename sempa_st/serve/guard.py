"""What every request passes before a route sees it: its host, its key, its size; and what is counted of it."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from sempa_st.serve.metrics import Metrics
from sempa_st.serve.protocol import RequestError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_BODY_SECONDS = 30
_OPEN = ("/", "/health")
"""Paths that need no key: the page, and whether the server lives."""


class Guard:
    """Middleware that refuses requests, and counts all of them.

    Args:
        app: The application behind it.
        metrics: Where to count.
        routes: Paths to count by name; all others are counted together.
        host: Address that the server listens on. On a loopback address the header ``Host`` must name one, so that a web
            page cannot reach the server through a name of its own (DNS rebinding).
        api_key: Key that clients send as ``Authorization: Bearer KEY``; empty for none.
        max_body: Bytes that a request may have.
    """

    def __init__(
        self, app: Any, *, metrics: Metrics, routes: tuple[str, ...], host: str, api_key: str, max_body: int
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes
        self._only_local = is_loopback(host)
        self._api_key = api_key.encode()
        self._max_body = max_body

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in self._routes else "other"
        started, status = time.perf_counter(), [500]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                status[0] = message["status"]
            await send(message)

        try:
            headers = dict(scope["headers"])
            self._check_host(headers)
            self._check_key(scope["path"], headers)
            body = await self._whole_body(headers, receive)
            await self._app(scope, _replay(body, receive), counted)
        except RequestError as error:
            await error.response()(scope, receive, counted)
        finally:
            self._metrics.requests.labels(route, str(status[0])).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self._only_local and not is_loopback(name.strip("[]")):
            raise RequestError(403, f"The host {host!r} is not this machine. Expected localhost or 127.0.0.1.")

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._api_key or path in _OPEN:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._api_key):
            raise RequestError(
                401, "The API key is missing or wrong. Send it as `Authorization: Bearer KEY`.", code="invalid_api_key"
            )

    async def _whole_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                return await self._body(headers, receive)
        except TimeoutError:
            raise RequestError(408, f"The request did not arrive within {_BODY_SECONDS} s.") from None

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            raise self._too_large()
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestError(400, "The client is gone.")
            body += message.get("body", b"")
            if len(body) > self._max_body:
                raise self._too_large()
            if not message.get("more_body"):
                return bytes(body)

    def _too_large(self) -> RequestError:
        return RequestError(413, f"The request is larger than {self._max_body} bytes. Send it in parts.")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the whole body, and then what comes after it."""
    sent = False

    async def replayed() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own.

    >>> [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "example.org")]
    [True, True, True, False, False]
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
