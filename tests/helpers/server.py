"""A server of ``sempa serve`` in a thread of this process, on a free port of 127.0.0.1."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from helpers.tiny import finish_adapter, make_llama, make_tokenizer
from sentence_transformers import SentenceTransformer

import sempa_st
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.model.tokenizer import install_template, prefix_tokens
from sempa_st.serve.app import Service, build_app
from sempa_st.serve.config import ServeConfig


@dataclass
class Running:
    """A running server, and the service behind it."""

    url: str
    service: Service


def activated_adapter(folder: Path, base: Path, model: Any = None) -> Path:
    """Write a folder of format custom whose adapter acts on sentences under the template and on no other text."""
    tokenizer = make_tokenizer()
    install_template(tokenizer, EMBEDDING_TEMPLATES["prompteol"])
    invocation = prefix_tokens(tokenizer, "prompteol")
    return finish_adapter(folder, base, model or make_llama(), format="custom", invocation=invocation)


def load_float32(folder: Path) -> SentenceTransformer:
    return sempa_st.load(folder, dtype="float32", device="cpu")


@contextmanager
def running_server(model: SentenceTransformer, **settings: Any) -> Iterator[Running]:
    """Serve a model under the name ``tiny``."""
    config = ServeConfig(model="tiny", port=0, **settings)
    service = Service(config, model, "tiny")
    server = uvicorn.Server(uvicorn.Config(build_app(service), host=config.host, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(f"http://127.0.0.1:{port}", service)
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
