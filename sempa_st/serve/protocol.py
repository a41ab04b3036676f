"""What OpenAI's embeddings API says: requests, responses and errors."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, StrictInt, StrictStr
from starlette.responses import JSONResponse


class EmbeddingRequest(BaseModel):
    """Body of ``POST /v1/embeddings``; fields that it does not name are ignored."""

    input: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    model: StrictStr
    encoding_format: Literal["float", "base64"] = "float"
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


def input_texts(value: Any, tokenizer: Any) -> list[str]:
    """Return the texts of a request's ``input``; token ids are read as the text that they spell.

    Args:
        value: ``input`` of an :class:`EmbeddingRequest`.
        tokenizer: The model's tokenizer.

    Raises:
        RequestError: If there is no input, or a text or token id that cannot be read.
    """
    if isinstance(value, str):
        items: list[Any] = [value]
    else:
        items = [value] if value and isinstance(value[0], int) else list(value)
    if not items:
        raise RequestError(400, "input is empty. Expected at least one text.", param="input")
    return [_text(item, index, tokenizer) for index, item in enumerate(items)]


def _text(item: str | list[int], index: int, tokenizer: Any) -> str:
    if not item:
        raise RequestError(400, f"input {index} is empty. Expected a text of one character or more.", param="input")
    if isinstance(item, str):
        try:
            item.encode()
        except UnicodeEncodeError as error:
            message = f"input {index} has a lone surrogate at character {error.start}, which is no text. Remove it."
            raise RequestError(400, message, param="input") from None
        return item
    unknown = [token for token in item if not 0 <= token < len(tokenizer)]
    if unknown:
        message = (
            f"input {index} has the token id {unknown[0]}. Expected ids of this model's tokenizer, from 0 to "
            f"{len(tokenizer) - 1}; a client that tokenises for another model must send text."
        )
        raise RequestError(400, message, param="input")
    return str(tokenizer.decode(item, skip_special_tokens=True))


def shortened(vectors: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """Return the leading components of vectors, scaled to the norm 1; or the vectors themselves without a number.

    Raises:
        RequestError: If they have fewer components.
    """
    if dimensions is None:
        return vectors
    if dimensions > vectors.shape[1]:
        message = f"dimensions is {dimensions}. Expected {vectors.shape[1]} at most, the width of this model."
        raise RequestError(400, message, param="dimensions")
    cut = vectors[:, :dimensions]
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), np.finfo(np.float32).tiny)


def embedding_response(vectors: NDArray[np.float32], encoding_format: str, model: str, tokens: int) -> dict[str, Any]:
    """Return the body of the response to an :class:`EmbeddingRequest`.

    Args:
        vectors: Embeddings of shape (texts, dimensions).
        encoding_format: ``float`` for lists of numbers, ``base64`` for the bytes of little-endian float32.
        model: Name of the model.
        tokens: Number of tokens of the texts.
    """
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": embedding}
            for index, embedding in enumerate(_encoded(vectors, encoding_format))
        ],
        "model": model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _encoded(vectors: NDArray[np.float32], encoding_format: str) -> Sequence[Any]:
    if encoding_format == "float":
        return vectors.tolist()
    return [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
