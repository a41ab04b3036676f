"""Load a model and serve it until the process is told to end."""

from __future__ import annotations

import signal
import socket
from math import ceil
from pathlib import Path
from typing import Any

import uvicorn

from sempa_st.errors import SempaError
from sempa_st.loading import load
from sempa_st.serve.app import Service, build_app
from sempa_st.serve.config import ServeConfig
from sempa_st.serve.teams import without_team

_KEEP_ALIVE = 30
"""Seconds that an idle connection stays open."""
_BACKLOG = 2048


def serve(config: ServeConfig) -> None:
    """Serve a model until SIGTERM or Ctrl-C, and answer what was accepted until then.

    Args:
        config: Settings of the server.

    Raises:
        SempaError: If the model cannot be loaded, or the address is taken.
    """
    with _listening(config.host, config.port) as listener:
        with without_team():
            model = load(config.model, dtype=config.dtype, device=config.device, int8=config.int8)
        service = Service(config, model, served_name(config.model))
        server = _Server(
            uvicorn.Config(
                build_app(service),
                http="h11",  # which bounds the headers; httptools takes any number of bytes, before a key is looked at
                log_level="error",
                access_log=False,
                timeout_keep_alive=_KEEP_ALIVE,
                timeout_graceful_shutdown=ceil(config.timeout),
                server_header=False,
            ),
            service,
        )
        # uvicorn hands a signal on to these after it has ended in order.
        previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            server.run(sockets=[listener])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens, so that a taken address is known before a model is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        raise SempaError(
            f"{host}:{port} cannot be listened on ({error.strerror}). Choose another --host or --port, or end what "
            "listens there."
        ) from error
    # Its connections inherit it; asyncio sets it only on sockets that it has made. Without it the second part of each
    # answer waits 40 ms for the client to acknowledge the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def served_name(model: str) -> str:
    """Return the name of a model in requests: that of its folder, or its id on the Hub.

    >>> served_name("runs/best/"), served_name("acme/sempa")
    ('best', 'acme/sempa')
    """
    return Path(model).resolve().name if Path(model).is_dir() or model.endswith("/") else model


class _Server(uvicorn.Server):
    """A server that says where it listens, once it does."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        about = self._service.describe()
        does = ["embeddings", *(["completions"] if about["generates"] else []), *(["chat"] if about["chats"] else [])]
        where = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"Serving {about['id']} on {where} ({', '.join(does)}); Ctrl-C ends it.", flush=True)
