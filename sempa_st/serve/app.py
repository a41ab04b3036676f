"""The HTTP application: the routes of OpenAI's API that one model answers, and what a server shows of itself."""

from __future__ import annotations

import asyncio
import copy
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any, cast

import torch
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel, Field
from sentence_transformers import SentenceTransformer
from starlette.exceptions import HTTPException

from sempa_st import __version__
from sempa_st.analysis.tokens import aligned_tokens
from sempa_st.errors import SempaError, first_line
from sempa_st.model.prompt_eol import PromptEOL
from sempa_st.model.token_rows import tokenize
from sempa_st.serve.config import ServeConfig
from sempa_st.serve.device import EMBEDDING, DeviceTurns
from sempa_st.serve.embedder import Embedder, QueueFullError
from sempa_st.serve.generation import Generation
from sempa_st.serve.guard import Guard
from sempa_st.serve.metrics import CONTENT_TYPE, Metrics
from sempa_st.serve.protocol import EmbeddingRequest, RequestError, embedding_response, input_texts, shortened
from sempa_st.serve.threads import off_loop, while_connected
from sempa_st.utils.assets import asset_path
from sempa_st.utils.finite import NotFiniteError

_RETRY_AFTER = 1
_MAX_TOKEN_TEXTS = 16
"""Texts of a request for aligned tokens, which are one piece of work."""


class TokensRequest(BaseModel):
    """Body of ``POST /aligned-tokens``."""

    input: Any
    k: Annotated[int, Field(ge=1, le=100)] = 10


class Service:
    """A loaded model with the queues in front of it, and the answers to requests.

    Args:
        config: Settings of the server.
        model: What :func:`sempa_st.load` returned.
        name: Name of the model in requests.
    """

    def __init__(self, config: ServeConfig, model: SentenceTransformer, name: str) -> None:
        self.config, self.model, self.name = config, model, name
        self.started = int(time.time())
        self.metrics = Metrics()
        self.turns = DeviceTurns(threads=torch.get_num_threads() if model.device.type == "cpu" else 1)
        self.embedder = Embedder(
            model,
            self.turns,
            max_queue=config.max_queue,
            max_wait=config.max_wait,
            observe=self.metrics.batch.observe,
        )
        self.metrics.add_gauge("sempa_queue_texts", "Texts that wait", lambda: self.embedder.waiting)
        # One copy for all requests, which takes seconds: the other's state belongs to the threads that embed.
        self.tokenizer = copy.deepcopy(model.tokenizer)
        self.width = int(model.get_embedding_dimension() or 0)
        self.generation = self._generation()

    def _generation(self) -> Generation | None:
        module = self.model[0]
        if not isinstance(module, PromptEOL) or self.config.int8:
            return None
        return Generation(
            self.name,
            module.causal_lm,
            self.tokenizer,
            self.turns,
            self.metrics,
            chat_format=self.config.chat_format,
            running=self.config.max_generations,
            max_tokens=self.config.max_tokens,
            max_context=self.config.max_context,
        )

    def close(self) -> None:
        """Answer what was accepted, and end the threads."""
        self.embedder.close()
        if self.generation:
            self.generation.close()

    def describe(self) -> dict[str, Any]:
        """Return the model as ``/v1/models`` lists it, with what it can do."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.started,
            "owned_by": "sempa-st",
            "dimensions": self.width,
            "generates": self.generation is not None,
            "chats": self.generation is not None and self.generation.chats,
        }

    def check_model(self, name: Any) -> None:
        """Raise :class:`RequestError` unless a request names this server's model."""
        if name != self.name:
            raise RequestError(
                404,
                f"The model {name!r:.100} does not exist. This server has {self.name!r}.",
                param="model",
                code="model_not_found",
            )

    async def embed(self, request: EmbeddingRequest) -> Response:
        """Answer a request to ``/v1/embeddings``."""
        self.check_model(request.model)
        if request.dimensions is not None and request.dimensions > self.width:
            raise RequestError(
                400,
                f"dimensions is {request.dimensions}. Expected {self.width} at most, the width of this model.",
                param="dimensions",
            )
        texts, tokens = await off_loop(_size(request.input), self._read, request.input)
        self.metrics.tokens.labels("prompt").inc(tokens)
        vectors = await self._vectors(texts)

        def answer() -> Response:
            cut = shortened(vectors, request.dimensions)
            return embedding_response(cut, request.encoding_format, self.name, tokens)

        return await off_loop(vectors.size, answer)

    def _read(self, value: Any) -> tuple[list[str], int]:
        """Return the texts of a request, and the number of their tokens."""
        texts = input_texts(value, self.tokenizer, self.config.max_inputs)
        return texts, sum(len(ids) for ids, _ in tokenize(self.tokenizer, texts, add_special_tokens=True))

    async def _vectors(self, texts: list[str]) -> Any:
        try:
            queued = self.embedder.submit(texts)
        except QueueFullError:
            raise RequestError(
                429,
                f"{self.embedder.waiting} texts wait, and {self.config.max_queue} may. Try again later.",
                retry_after=_RETRY_AFTER,
            ) from None
        try:
            return await asyncio.wait_for(asyncio.wrap_future(queued.future), self.config.timeout)
        except TimeoutError:
            raise RequestError(
                503, f"The request waited {self.config.timeout:g} s. Try again later.", retry_after=_RETRY_AFTER
            ) from None
        finally:
            queued.abandoned = True  # whatever is left of it now, nobody waits for

    def aligned(self, request: TokensRequest) -> dict[str, Any]:
        """Answer a request to ``/aligned-tokens``; runs on a thread of its own."""
        texts = input_texts(request.input, self.tokenizer, _MAX_TOKEN_TEXTS)
        try:
            with self.turns.turn(EMBEDDING):
                found = self.turns.compute(partial(aligned_tokens, self.model, texts, k=request.k))
        except NotFiniteError:  # the model's fault, not the request's
            raise
        except SempaError as error:
            raise RequestError(400, str(error)) from error
        return {"data": [[{"text": token.text, "logit": token.logit} for token in own] for own in found]}


def _size(value: Any) -> int:
    """Return about how much there is to read in a request's ``input``."""
    if isinstance(value, str | list):
        return len(value) + sum(len(item) for item in value if isinstance(item, str | list))
    return 0


def build_app(service: Service) -> FastAPI:
    """Return the application of a service, which it closes when it ends."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    # No pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(title="sempa-st", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    _add_error_handlers(app)
    _add_own_routes(app, service)

    @app.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
        return cast(Response, await while_connected(request, service.embed(body)))

    @app.post("/v1/completions")
    async def completions(request: Request, body: dict[str, Any]) -> Any:
        return await while_connected(request, _generation_of(service, body).complete(body, uuid.uuid4().hex))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: dict[str, Any]) -> Any:
        return await while_connected(request, _generation_of(service, body).chat(body, uuid.uuid4().hex))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.describe()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.describe()

    config = service.config
    routes = tuple(str(getattr(route, "path", "")) for route in app.routes)
    app.add_middleware(
        Guard,
        metrics=service.metrics,
        routes=routes,
        host=config.host,
        api_key=config.api_key,
        max_body=config.max_body,
    )
    return app


def _generation_of(service: Service, body: dict[str, Any]) -> Generation:
    service.check_model(body.get("model"))
    if service.generation is None:
        raise RequestError(400, f"{service.name} does not generate text here. Use /v1/embeddings.")
    return service.generation


def _add_own_routes(app: FastAPI, service: Service) -> None:
    page = asset_path("serve.html").read_text(encoding="utf-8")

    @app.get("/")
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": service.name, "queue": service.embedder.waiting}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)

    one_at_a_time = asyncio.Lock()

    @app.post("/aligned-tokens")
    async def tokens(body: TokensRequest) -> dict[str, Any]:
        if one_at_a_time.locked():
            raise RequestError(429, "Another request for tokens runs. Try again later.", retry_after=_RETRY_AFTER)
        async with one_at_a_time:
            return await asyncio.to_thread(service.aligned, body)


_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every error in the form of OpenAI's API."""

    @app.exception_handler(RequestError)
    async def own(request: Request, error: RequestError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return RequestError(400, f"The body is no JSON: {first['ctx']['error']}.").response()
        where = [str(part) for part in first["loc"] if part != "body"]
        param = where[0] if where else None
        return RequestError(422, f"{param or 'The body'} is invalid: {first['msg']}.", param=param).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return RequestError(error.status_code, f"{error.detail}: {request.method} {request.url.path}").response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return RequestError(500, f"{type(error).__name__}: {first_line(error)}").response()
