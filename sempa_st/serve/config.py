"""The settings of ``sempa serve``. This file imports no torch, so that the command line starts quickly."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sempa_st.errors import SempaError, check_known
from sempa_st.model.chat_formats import CHAT_FORMATS
from sempa_st.utils.devices import DTYPES
from sempa_st.utils.options import option

API_KEY_VARIABLE = "SEMPA_API_KEY"
DEFAULT_MODEL = "sempa-gemma3-270m-activated"
_POSITIVE = (
    "max_queue",
    "max_inputs",
    "max_body",
    "max_generations",
    "max_tokens",
    "max_context",
    "timeout",
)


@dataclass
class ServeConfig:
    """Settings of ``sempa serve``.

    Raises:
        SempaError: If a value is out of range.
    """

    model: str = DEFAULT_MODEL
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for all, which anyone who can reach it may use")
    port: int = option(8000, "port to listen on; 0 for a free one")
    api_key: str = option("", f"key that clients must send (default: the variable {API_KEY_VARIABLE}; none)")
    chat_format: str = option(
        "auto",
        "chat format of /v1/chat/completions: auto (the base's own template), "
        f"{', '.join(CHAT_FORMATS[1:])}, or a file with a Jinja template",
    )
    dtype: str = option("auto", "dtype of the weights", choices=DTYPES)
    device: str | None = option(None, "device such as cpu or cuda (default: the best available)")
    int8: bool = option(False, "multiply 8-bit integers on a CPU: faster, not exact, and for embedding alone")
    max_queue: int = option(2048, "texts that may wait; more are refused with status 429")
    max_inputs: int = option(2048, "texts of one request")
    max_body: int = option(8 * 2**20, "bytes of one request")
    max_generations: int = option(4, "generations at a time; as many more may wait")
    max_tokens: int = option(1024, "most tokens that one generation may ask for")
    max_context: int = option(4096, "most tokens of a prompt and its answer together")
    max_wait: float = option(
        0.003,
        "least seconds to wait after a batch for its clients to come back, unless one is alone; a twentieth of that "
        "batch's time where that is longer",
    )
    timeout: float = option(
        300.0,
        "seconds that a request for embeddings may take, and that a server waits for its requests when it ends",
    )

    def __post_init__(self) -> None:
        check_known(self.dtype, DTYPES, "dtype")
        self.api_key = self.api_key or os.environ.get(API_KEY_VARIABLE, "")
        for name in _POSITIVE:
            if not getattr(self, name) > 0:
                raise SempaError(f"{name} is {getattr(self, name)}. Expected a number above 0.")
        if not 0 <= self.port < 65536:
            raise SempaError(f"port is {self.port}. Expected a number from 0 to 65535.")
        if not 0 <= self.max_wait <= 1:
            raise SempaError(f"max_wait is {self.max_wait}. Expected seconds from 0 to 1.")
        if not self.api_key.isascii() or any(character.isspace() for character in self.api_key):
            raise SempaError("The API key has characters that no HTTP header can carry. Expected ASCII without spaces.")
