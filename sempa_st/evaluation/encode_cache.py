"""Each distinct sentence is encoded once, however many sets and sides of pairs it stands in."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sempa_st.utils.finite import check_finite

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


@dataclass
class EncodeCost:
    """What encoding has cost so far.

    Attributes:
        asked: Sentences that vectors were asked for.
        encoded: Sentences that were run.
        seconds: Time that these took.
    """

    asked: int = 0
    encoded: int = 0
    seconds: float = 0.0


@contextmanager
def encode_cache(model: SentenceTransformer) -> Iterator[EncodeCost]:
    """Let ``model.encode`` remember the vectors of lists of sentences, for the time of a block.

    Args:
        model: Any SentenceTransformer; calls for anything but arrays of vectors are passed on.

    Raises:
        SempaError: From ``encode``, if a vector is not finite.
    """
    original = model.encode
    known: dict[tuple[str, str], Any] = {}
    tally = EncodeCost()

    def encode(sentences: Any, *args: Any, **kwargs: Any) -> Any:
        if args or isinstance(sentences, str) or not _asks_for_array(kwargs):
            return original(sentences, *args, **kwargs)
        prompt = repr([kwargs.get(name) for name in ("prompt", "prompt_name", "normalize_embeddings", "truncate_dim")])
        new = [sentence for sentence in dict.fromkeys(sentences) if (sentence, prompt) not in known]
        if new:
            started = time.perf_counter()
            vectors = original(new, **kwargs)
            tally.seconds += time.perf_counter() - started
            check_finite(vectors, new)
            known.update(zip(((sentence, prompt) for sentence in new), vectors, strict=True))
        tally.asked += len(sentences)
        tally.encoded += len(new)
        return np.stack([known[sentence, prompt] for sentence in sentences])

    model.encode = encode  # type: ignore[method-assign,assignment]
    try:
        yield tally
    finally:
        del model.encode


def _asks_for_array(kwargs: dict[str, Any]) -> bool:
    other = ("output_value", "precision", "convert_to_tensor", "pool")
    plain: Sequence[Any] = (None, False, "sentence_embedding", "float32")
    return kwargs.get("convert_to_numpy", True) and all(kwargs.get(name) in plain for name in other)
