"""Texts that can be read and vectors that can be used, or an error that says which are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.utils.files import lone_surrogates

_TOLD = 3


def check_texts(texts: Sequence[Any]) -> None:
    """Raise :class:`SempaError` if a text holds half a character; names the first ones by their place, from 0."""
    bad = [(place, text) for place, text in enumerate(texts) if isinstance(text, str) and lone_surrogates(text)]
    if bad:
        raise SempaError(
            f"{len(bad)} of {len(texts)} text(s) hold half a character (a lone surrogate), which no tokenizer reads: "
            f"{_named(bad, 'text')}. Mend them, or leave them out."
        )


class NotFiniteError(SempaError):
    """Vectors that hold infinite values or no numbers.

    Args:
        bad: Number and content of each text that has such a vector.
        total: Number of vectors that were looked at.
        word: What the numbers count.
    """

    def __init__(self, bad: Sequence[tuple[int, Any]], total: int, word: str = "text") -> None:
        super().__init__(
            f"{len(bad)} of {total} vector(s) hold infinite values or no numbers: of {_named(bad, word)}. In float16 "
            "the arithmetic of many models overflows: choose dtype float32 or bfloat16. In these, the model has "
            "diverged or its files are damaged."
        )
        self.texts = [text for _, text in bad]
        self.total = total


def check_finite(vectors: Any, texts: Sequence[Any]) -> None:
    """Raise :class:`NotFiniteError` if a vector holds infinite values or no numbers; it names the first ones.

    Args:
        vectors: Array or tensor of shape (texts, width).
        texts: What they stand for.
    """
    import torch

    held = torch.as_tensor(vectors)
    # The sum tells at the price of reading; only where it is odd, each vector is looked at. (MPS has no float64.)
    if not held.is_floating_point() or held.sum(dtype=torch.float32).isfinite():
        return
    bad = (~held.isfinite()).any(dim=-1).nonzero().flatten().tolist()
    if bad:
        raise NotFiniteError([(place, texts[place]) for place in bad], len(held))


def _named(found: Sequence[tuple[int, Any]], word: str) -> str:
    told = [f"{word} {number} ({text!a:.60})" for number, text in found[:_TOLD]]
    return ", ".join(told) + (", ..." if len(found) > _TOLD else "")
