"""Cache of sentence vectors: each distinct sentence is encoded once across tasks and sides of pairs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sempa_st.model.patching import replaced
from sempa_st.utils.finite import check_finite

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass
class EncodeCost:
    """The cost of encoding so far.

    Attributes:
        asked: Sentences requested.
        encoded: Sentences that the model encoded; the others came from the cache.
        seconds: Time that the model took.
    """

    asked: int = 0
    encoded: int = 0
    seconds: float = 0.0


@contextmanager
def encode_cache(model: SentenceTransformer) -> Iterator[EncodeCost]:
    """Cache the vectors that ``model.encode`` returns for lists of sentences, within a ``with`` block.

    Args:
        model: Any SentenceTransformer. Calls that ask for anything but an array of vectors bypass the cache.

    Raises:
        SempaError: From ``encode``, if a vector is not finite.
    """
    cost = EncodeCost()
    # mteb takes a SentenceTransformer and calls its ``encode``; a wrapper would lose the model's name and card there.
    with replaced(model, "encode", lambda encode: _cached(encode, cost)):
        yield cost


def _cached(original: Callable[..., Any], cost: EncodeCost) -> Callable[..., Any]:
    cache: dict[tuple[str, str], Any] = {}

    # encode_query and encode_document pass ``inputs`` by name.
    def encode(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if args or isinstance(inputs, str) or not _asks_for_array(kwargs):
            return original(inputs, *args, **kwargs)
        prompt = repr([kwargs.get(name) for name in ("prompt", "prompt_name", "normalize_embeddings", "truncate_dim")])
        new = [sentence for sentence in dict.fromkeys(inputs) if (sentence, prompt) not in cache]
        if new:
            started = time.perf_counter()
            vectors = original(new, **kwargs)
            cost.seconds += time.perf_counter() - started
            check_finite(vectors, new)
            cache.update(zip(((sentence, prompt) for sentence in new), vectors, strict=True))
        cost.asked += len(inputs)
        cost.encoded += len(new)
        return np.stack([cache[sentence, prompt] for sentence in inputs])

    return encode


def _asks_for_array(kwargs: dict[str, Any]) -> bool:
    other = ("output_value", "precision", "convert_to_tensor", "pool")
    plain: Sequence[Any] = (None, False, "sentence_embedding", "float32")
    return kwargs.get("convert_to_numpy", True) and all(kwargs.get(name) in plain for name in other)
