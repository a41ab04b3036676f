"""What OpenAI's embeddings API says: requests, responses and errors."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, StrictInt, StrictStr
from pydantic_core import to_json
from starlette.responses import JSONResponse, Response


class EmbeddingRequest(BaseModel):
    """Body of ``POST /v1/embeddings``; fields that it does not name are ignored."""

    input: Any  # checked by input_texts: pydantic would note an error for each element and each form
    model: StrictStr
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None


class RequestError(Exception):
    """An error that is the client's to mend.

    Args:
        status: HTTP status.
        message: What was wrong, and what was expected.
        param: Field of the request, if one is to blame.
        code: Short name of the error, for programs.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def response(self) -> JSONResponse:
        """Return the error as OpenAI's API writes it."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, status_code=self.status, headers=headers)


_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def input_texts(value: Any, tokenizer: Any, most: int) -> list[str]:
    """Return the texts of a request's ``input``; token ids are read as the text that they spell.

    Args:
        value: A text, a list of texts, token ids, or lists of them.
        tokenizer: The model's tokenizer.
        most: Largest number of texts.

    Raises:
        RequestError: If there is no input, too much of it, or a text or token id that cannot be read.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise _input_error(422, f"input is {type(value).__name__}. Expected a text, a list of texts, or token ids.")
    items: list[Any] = [value] if value and type(value[0]) is int else value
    if not items:
        raise _input_error(400, "input is empty. Expected at least one text.")
    if len(items) > most:
        raise _input_error(400, f"input has {len(items)} texts. Expected {most} at most.")
    ids = any(isinstance(item, list) for item in items)
    size = len(tokenizer) if ids else 0  # counted anew each time, which takes half a millisecond for 262,144 tokens
    return [_text(item, index, tokenizer, size) for index, item in enumerate(items)]


def _text(item: Any, index: int, tokenizer: Any, size: int) -> str:
    if not isinstance(item, str | list):
        raise _input_error(422, f"input {index} is {item!r:.40}. Expected a text or a list of token ids.")
    if not item:
        raise _input_error(400, f"input {index} is empty. Expected a text of one character or more.")
    if isinstance(item, str):
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise _input_error(
                400, f"input {index} has a lone surrogate at character {error.start}, which is no text. Remove it."
            ) from None
        return item
    unknown = next((token for token in item if type(token) is not int or not 0 <= token < size), None)
    if unknown is not None:
        raise _input_error(
            400 if type(unknown) is int else 422,
            f"input {index} has the token id {unknown!r:.40}. Expected ids of this model's tokenizer, from 0 to "
            f"{size - 1}; a client that tokenises for another model must send text.",
        )
    return str(tokenizer.decode(item, skip_special_tokens=True))


def _input_error(status: int, message: str) -> RequestError:
    return RequestError(status, message, param="input")


def shortened(vectors: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """Return the leading components of vectors, scaled to the norm 1; or the vectors themselves without a number."""
    if dimensions is None:
        return vectors
    cut = vectors[:, :dimensions]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def embedding_response(vectors: NDArray[np.float32], encoding_format: str | None, model: str, tokens: int) -> Response:
    """Return the response to an :class:`EmbeddingRequest`, written by pydantic: ``json`` takes six times as long.

    Args:
        vectors: Embeddings of shape (texts, dimensions).
        encoding_format: ``base64`` for the bytes of little-endian float32; lists of numbers otherwise.
        model: Name of the model.
        tokens: Number of tokens of the texts.
    """
    body = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": embedding}
            for index, embedding in enumerate(_encoded(vectors, encoding_format))
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return Response(to_json(body), media_type="application/json")


def _encoded(vectors: NDArray[np.float32], encoding_format: str | None) -> Sequence[Any]:
    if encoding_format == "base64":
        return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
    return vectors.tolist()
