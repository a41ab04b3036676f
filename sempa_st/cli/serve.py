"""The command ``sempa serve``."""

from __future__ import annotations

import argparse
from typing import Any

from sempa_st.cli.arguments import NOTHING_KEPT, add_command
from sempa_st.serve.config import DEFAULT_MODEL, ServeConfig
from sempa_st.utils.extras import require
from sempa_st.utils.options import add_options, read_options

_GROUPS = {
    "model": ("dtype", "device", "int8", "chat_format"),
    "address": ("host", "port", "api_key"),
    "limits": (
        *("max_queue", "max_inputs", "max_body", "max_generations", "max_tokens", "max_context"),
        *("max_wait", "timeout"),
    ),
}


def add(commands: Any) -> None:
    """Add ``sempa serve``."""
    parser = add_command(
        commands,
        "serve",
        _serve,
        "Answer requests for embeddings and text over HTTP, as OpenAI's API does.",
        examples=("", "runs/best --port 9000", "sempa-gemma3-270m --host 0.0.0.0 --api-key SECRET"),
        kept=lambda args: NOTHING_KEPT,
    )
    parser.add_argument(
        "model", nargs="?", default=DEFAULT_MODEL, help=f"as in sempa encode (default: {DEFAULT_MODEL})"
    )
    add_options(parser, ServeConfig, groups=_GROUPS, without=("model",))


def _serve(args: argparse.Namespace) -> None:
    config = read_options(ServeConfig, vars(args))
    require("fastapi", "uvicorn", "openai", "prometheus_client", extra="serve", purpose="sempa serve")
    from sempa_st.serve.run import serve

    serve(config)
