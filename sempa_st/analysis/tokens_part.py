"""The part ``tokens``: the vocabulary tokens that embeddings are aligned with, for a few sentences side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from sempa_st.analysis.context import Context
from sempa_st.analysis.part import Cell, Part, PartResult, Table
from sempa_st.analysis.tokens import AlignedToken, LanguageHead
from sempa_st.errors import SempaError

_TRIPLETS = 2
"""NLI triplets whose sentences are shown."""
_SENTENCES = 3 * _TRIPLETS


def run(context: Context) -> PartResult:
    """List the aligned tokens of each model that has an LM head."""
    settings = context.settings
    triplets = context.data.sample_triplets(_TRIPLETS, settings.seed)
    sentences = [text for triplet in triplets for text in (triplet.premise, triplet.entailed, triplet.contradicted)]
    values: dict[str, Any] = {}
    marked: dict[str, list[str]] = {}
    notes: list[str] = []
    for name in context.models:
        vectors = context.vectors(name, sentences)
        if (head := head_or_note(context, name, notes)) is None:
            continue
        found = head.aligned(torch.from_numpy(vectors[:]), settings.k)
        values[name] = [
            {"sentence": text, "tokens": [asdict(token) for token in tokens]}
            for text, tokens in zip(sentences, found, strict=True)
        ]
        marked[name] = [_marked(tokens, head.surface(text)) for text, tokens in zip(sentences, found, strict=True)]
    rows: list[list[Cell]] = [
        [text, name, tokens[index]] for index, text in enumerate(sentences) for name, tokens in marked.items()
    ]
    caption = f"The {settings.k} vocabulary tokens with the largest logits for each embedding, the largest first."
    note = (
        "In brackets: tokens of the sentence itself. ▁ is a space before the token. The sentences are those of "
        f"{_TRIPLETS} NLI triplets: what is given, what it entails and what it contradicts."
    )
    return PartResult(
        values={"models": values, "k": settings.k},
        tables=[Table("tokens", caption, ("sentence", "model", "aligned tokens"), rows)],
        notes=[note, *notes],
    )


def head_or_note(context: Context, name: str, notes: list[str]) -> LanguageHead | None:
    """Return the LM head of a model; if it has none, add to ``notes`` why it is left out, and return None."""
    model = context.load(name)
    decoder: Any = model[0]
    if model.truncate_dim and model.truncate_dim < decoder.get_embedding_dimension():
        notes.append(
            f"{name} is left out. Its embeddings are the first {model.truncate_dim} numbers of hidden states that the "
            "LM head reads whole."
        )
        return None
    try:
        return LanguageHead(model)
    except SempaError as error:
        notes.append(f"{name} is left out. {error}")
        return None


def _marked(tokens: Sequence[AlignedToken], own: set[int]) -> str:
    return "  ".join(f"[{token.text}]" if token.id in own else token.text for token in tokens)


PART = Part(
    "tokens",
    "Aligned tokens",
    run,
    needs=("triplets",),
    settings=("k", "seed"),
    steps=lambda context: min(_SENTENCES, 3 * len(context.data.triplets)),
)
