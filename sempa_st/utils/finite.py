"""Check that texts can be encoded and that vectors are finite; errors name the offending ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sempa_st.errors import SempaError, list_first
from sempa_st.utils.files import lone_surrogates


def check_texts(texts: Sequence[Any]) -> None:
    """Raise :class:`SempaError` if a text contains a lone surrogate; the message names the first by index, from 0."""
    bad = [(index, text) for index, text in enumerate(texts) if isinstance(text, str) and lone_surrogates(text)]
    if bad:
        raise SempaError(
            f"{len(bad)} of {len(texts)} text(s) contain a lone surrogate, which no tokenizer can "
            f"encode: {_shown(bad, 'text')}. Fix or remove them."
        )


OVERFLOW_ADVICE = (
    "Many models overflow in float16: choose dtype float32 or bfloat16. With those dtypes, the model has diverged or "
    "its files are damaged."
)


class NotFiniteError(SempaError):
    """Error for vectors with infinite or NaN values.

    Args:
        bad: Index and content of each text with such a vector.
        total: Number of vectors that were checked.
        word: Noun for the index in the message, such as ``text`` or ``row``.
    """

    def __init__(self, bad: Sequence[tuple[int, Any]], total: int, word: str = "text") -> None:
        super().__init__(
            f"{len(bad)} of {total} vector(s) contain infinite or NaN values: of {_shown(bad, word)}. {OVERFLOW_ADVICE}"
        )
        self.bad = list(bad)
        self.texts = [text for _, text in bad]
        self.total = total


def check_finite(vectors: Any, texts: Sequence[Any]) -> None:
    """Raise :class:`NotFiniteError` if a vector contains infinite or NaN values; the message names the first.

    Args:
        vectors: Array or tensor of shape (texts, width).
        texts: Texts that the vectors embed.
    """
    import torch

    tensor = torch.as_tensor(vectors)
    # The sum is a cheap test: it is finite for all usual vectors. In float32, since MPS has no float64.
    if not tensor.is_floating_point() or tensor.sum(dtype=torch.float32).isfinite():
        return
    bad = (~tensor.isfinite()).any(dim=-1).nonzero().flatten().tolist()
    if bad:
        raise NotFiniteError([(index, texts[index]) for index in bad], len(tensor))


def _shown(bad: Sequence[tuple[int, Any]], word: str) -> str:
    return list_first([f"{word} {index} ({text!a:.60})" for index, text in bad], 3)
