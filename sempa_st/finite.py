"""Texts that can be read and vectors that can be used, or an error that says which are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.files import half_characters

_TOLD = 3


def check_texts(texts: Sequence[Any]) -> None:
    """Raise :class:`SempaError` if a text holds half a character; names the first ones by their place, from 0."""
    bad = [place for place, text in enumerate(texts) if isinstance(text, str) and half_characters(text)]
    if bad:
        raise SempaError(
            f"{len(bad)} of {len(texts)} text(s) hold half a character (a lone surrogate), which no tokenizer reads: "
            f"{_named(bad, texts)}. Mend them, or leave them out."
        )


def check_finite(vectors: Any, texts: Sequence[Any], *, rows: Sequence[int] | None = None) -> None:
    """Raise :class:`SempaError` if a vector holds infinite values or no numbers; names the first ones.

    Args:
        vectors: Array or tensor of shape (texts, width), or a list of as many vectors.
        texts: What they stand for.
        rows: Numbers of the texts where they come from; their places, from 0, when None.
    """
    import torch

    if isinstance(vectors, list):
        if not vectors or not isinstance(vectors[0], torch.Tensor):
            return
        vectors = torch.stack(vectors)
    held = torch.as_tensor(vectors)
    # The sum tells at the price of reading; only where it is odd, each vector is looked at.
    if not held.is_floating_point() or held.sum(dtype=torch.float64).isfinite():
        return
    bad = (~held.isfinite()).any(dim=-1).nonzero().flatten().tolist()
    if bad:
        raise SempaError(
            f"{len(bad)} of {len(held)} vector(s) hold infinite values or no numbers: of {_named(bad, texts, rows)}. "
            "In float16 the arithmetic of many models overflows: choose dtype float32 or bfloat16. In these, the model "
            "has diverged or its files are damaged."
        )


def _named(places: Sequence[int], texts: Sequence[Any], rows: Sequence[int] | None = None) -> str:
    word = "text" if rows is None else "row"
    told = [f"{word} {place if rows is None else rows[place]} ({texts[place]!a:.60})" for place in places[:_TOLD]]
    return ", ".join(told) + (", ..." if len(places) > _TOLD else "")
