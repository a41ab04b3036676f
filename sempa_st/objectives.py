"""Names of the training objectives, and weighted sums of them. Standard library only."""

from __future__ import annotations

import math

from sempa_st.errors import SempaError

SEQUENCE_OBJECTIVES = ("dpo", "listwise")
"""State the preference over whole answers to a paraphrase request."""
WORD_OBJECTIVES = ("one-word", "one-word-listwise")
"""State it over the words at the template's last position."""
READING_OBJECTIVES = (*WORD_OBJECTIVES, "contrastive")
"""State it at the template's last position, whose state is the embedding."""
OBJECTIVES = (*SEQUENCE_OBJECTIVES, *READING_OBJECTIVES)


def parse_objective(text: str) -> dict[str, float]:
    """Read ``one-word`` or a weighted sum such as ``dpo:0.3,one-word-listwise:1.0``.

    Args:
        text: Comma-separated names of :data:`OBJECTIVES`, each with a weight above 0 after a colon (default 1).

    Returns:
        Weight by name, in the order given.

    Raises:
        SempaError: On an unknown or repeated name, or a weight that is no number above 0.
    """
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight_text = part.strip().partition(":")
        if name not in OBJECTIVES:
            raise SempaError(f"Unknown objective {name!r} in {text!r}. Expected one of: {', '.join(OBJECTIVES)}.")
        if name in weights:
            raise SempaError(f"The objective {name!r} stands twice in {text!r}. Add the weights up.")
        try:
            weight = float(weight_text) if weight_text else 1.0
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise SempaError(f"The weight of {name!r} is {weight_text!r}. Expected a number above 0.")
        weights[name] = weight
    return weights
