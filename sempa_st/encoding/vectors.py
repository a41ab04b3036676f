"""Vectors of many sentences: each distinct sentence of a window once, cut, normalised and quantised as asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from sempa_st.encoding.sentences import Sentences, read_shard
from sempa_st.errors import SempaError, check_known
from sempa_st.utils.finite import NotFiniteError, check_finite

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")
WITH_RANGES = ("int8", "uint8")
"""Precisions that divide the range of each dimension into 256 steps."""
WINDOW = 2048
"""Sentences that are sorted by length, encoded and written together."""
_BATCHES = 2
"""Batches per step of the progress bar."""
_CALIBRATION_SHARDS = 32


@dataclass(frozen=True)
class VectorSettings:
    """What decides the vector of a sentence, besides the model; as for ``SentenceTransformer.encode``.

    Args:
        normalize: Scale vectors to the norm 1, after they are cut.
        truncate_dim: Number of dimensions to keep; all when None.
        precision: One of :data:`PRECISIONS`.
        prompt: Text to put before each sentence.
        prompt_name: Name of one of the model's own prompts, to use instead.

    Raises:
        SempaError: On an unknown precision, a dimension below 1, or two prompts.
    """

    normalize: bool = False
    truncate_dim: int | None = None
    precision: str = "float32"
    prompt: str | None = None
    prompt_name: str | None = None

    def __post_init__(self) -> None:
        check_known(self.precision, PRECISIONS, "precision")
        if self.truncate_dim is not None and self.truncate_dim < 1:
            raise SempaError(f"truncate_dim is {self.truncate_dim}. Expected 1 or more.")
        if self.prompt is not None and self.prompt_name is not None:
            raise SempaError("Expected one of prompt and prompt_name, got both.")

    def check(self, model: SentenceTransformer) -> None:
        """Raise :class:`SempaError` if a model has no such prompt."""
        if self.prompt_name is not None:
            check_known(self.prompt_name, model.prompts, "prompt")

    @property
    def encode_arguments(self) -> dict[str, Any]:
        """Arguments of ``SentenceTransformer.encode``; quantisation comes later, with ranges of the corpus."""
        asked = {
            "normalize_embeddings": self.normalize,
            "truncate_dim": self.truncate_dim,
            "prompt": self.prompt,
            "prompt_name": self.prompt_name,
        }
        return {name: value for name, value in asked.items() if value not in (None, False)}


def encode_window(
    model: SentenceTransformer,
    rows: Sequence[int],
    texts: Sequence[str],
    settings: VectorSettings,
    ranges: Any,
    *,
    batch_size: int,
    advance: Callable[[int], object],
) -> Any:
    """Return the vectors of some sentences, an array of shape (sentences, width).

    Args:
        model: The model.
        rows: Number of each sentence's row, for the message of an error.
        texts: The sentences.
        settings: What decides their vectors.
        ranges: Least and greatest value of each dimension, of shape (2, width), for int8 and uint8.
        batch_size: Sentences per batch.
        advance: Called with the number of sentences that have been encoded since its last call.

    Raises:
        SempaError: If a vector is not finite, or shorter than ``truncate_dim``.
    """
    from sentence_transformers.util import quantize_embeddings

    try:
        vectors = _encode_once(model, texts, settings, batch_size, advance)
        check_finite(vectors, texts)
    except NotFiniteError as error:  # name rows of the file, not positions in a batch
        bad = set(error.texts)
        named = [(row, text) for row, text in zip(rows, texts, strict=True) if text in bad]
        raise error.naming(named, error.total, "row") from error
    if settings.truncate_dim and vectors.shape[1] < settings.truncate_dim:
        raise SempaError(
            f"truncate_dim is {settings.truncate_dim}. The model's vectors have {vectors.shape[1]} numbers."
        )
    if settings.precision == "float32":
        return vectors
    return quantize_embeddings(vectors, precision=settings.precision, ranges=ranges)  # type: ignore[arg-type]


def _encode_once(
    model: SentenceTransformer,
    texts: Sequence[str],
    settings: VectorSettings,
    batch_size: int,
    advance: Callable[[int], object],
) -> Any:
    """Encode each distinct sentence of a window once, in a few batches of similar length at a time."""
    import numpy as np

    from sempa_st.forward.batching import batches_by_length, min_batch_characters

    counts = Counter(texts)
    distinct = list(counts)
    vectors: list[Any] = []
    vector_index: dict[str, int] = {}
    size = _BATCHES * batch_size
    asked = {
        "batch_size": batch_size,
        "show_progress_bar": False,
        "convert_to_numpy": True,
        **settings.encode_arguments,
    }
    for indices in batches_by_length(distinct, size, min_batch_characters(model, size)):
        batch = [distinct[index] for index in indices]
        vectors.append(model.encode(batch, **asked))
        vector_index |= {text: len(vector_index) + index for index, text in enumerate(batch)}
        advance(sum(counts[text] for text in batch))
    return np.concatenate(vectors).astype("float32", copy=False)[[vector_index[text] for text in texts]]


def calibrate(model: SentenceTransformer, sentences: Sentences, settings: VectorSettings, *, batch_size: int) -> Any:
    """Return the least and the greatest value of each dimension, of shape (2, width), for int8 and uint8.

    They are those of :data:`WINDOW` sentences from shards all over the corpus. Values outside of them are clipped.

    Args:
        model: The model.
        sentences: The corpus.
        settings: What decides the vectors.
        batch_size: Sentences per batch.
    """
    import numpy as np

    shards = sentences.shards[:: max(1, len(sentences.shards) // _CALIBRATION_SHARDS)]
    sample = [row for shard in shards for row in _first(shard, sentences.column, max(1, WINDOW // len(shards)))]
    rows, texts = zip(*sample, strict=True)
    exact = VectorSettings(**{**vars(settings), "precision": "float32"})
    vectors = encode_window(model, rows, texts, exact, None, batch_size=batch_size, advance=lambda _: None)
    least, greatest = vectors.min(axis=0), vectors.max(axis=0)
    if np.array_equal(least, greatest):
        raise SempaError(
            f"--precision {settings.precision} divides the range of each dimension over the corpus, and all sentences "
            "here have one vector. Give two different sentences, or leave --precision out."
        )
    return np.stack([least, greatest])


def _first(shard: Any, column: str | None, count: int) -> Iterator[tuple[int, str]]:
    return ((row, text) for row, text, _ in islice(read_shard(shard, column), count))
