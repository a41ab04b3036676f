"""The objectives of training by name, and their weighted sums. Like the settings, this imports no torch."""

from __future__ import annotations

import math

from sempa_st.errors import SempaError
from sempa_st.utils.options import split_list

SEQUENCE_OBJECTIVES = ("dpo", "listwise")
"""Objectives that compare whole answers to a paraphrase prompt."""
WORD_OBJECTIVES = ("one-word", "one-word-listwise")
"""Objectives that compare words at the template's last position."""
SIMILARITY_OBJECTIVES = ("contrastive", "retrieval")
"""Objectives that compare embeddings."""
EMBEDDING_OBJECTIVES = (*WORD_OBJECTIVES, *SIMILARITY_OBJECTIVES)
"""Objectives of the hidden state at the template's last position, which is the embedding."""
OBJECTIVES = (*SEQUENCE_OBJECTIVES, *EMBEDDING_OBJECTIVES)


def parse_objective(text: str) -> dict[str, float]:
    """Parse an objective or a weighted sum of objectives.

    Args:
        text: Comma-separated names of :data:`OBJECTIVES`, each with an optional colon and weight above 0 (default 1).

    Returns:
        Weight of each name, in the order given.

    Raises:
        SempaError: On an unknown or repeated name, or a weight that is not a number above 0.

    >>> parse_objective("dpo:0.3,one-word")
    {'dpo': 0.3, 'one-word': 1.0}
    """
    weights: dict[str, float] = {}
    for entry in split_list(text):
        name, _, weight_text = entry.partition(":")
        if name not in OBJECTIVES:
            raise SempaError(f"Unknown objective {name!r} in {text!r}. Expected one of: {', '.join(OBJECTIVES)}.")
        if name in weights:
            raise SempaError(
                f"The objective {name!r} is given twice in {text!r}. Expected it once, with the sum of the weights."
            )
        try:
            weight = float(weight_text) if weight_text else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise SempaError(f"The weight of {name!r} is {weight_text!r}. Expected a number above 0.")
        weights[name] = weight
    return weights
