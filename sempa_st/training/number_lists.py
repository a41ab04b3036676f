"""Lists of numbers among the settings of a run: layers to adapt, widths to train. This imports no torch."""

from __future__ import annotations

import re

from sempa_st.errors import SempaError
from sempa_st.utils.options import split_list

MAX_CHARACTERS = 4096
"""Length of the longest text that a setting takes."""
_WIDTH = re.compile(r"[1-9][0-9]{0,5}")
_LAYERS = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")


def parse_widths(text: str) -> list[int]:
    """Parse widths of embeddings, and return them with the largest first.

    Raises:
        SempaError: If one is no whole number above 0, or is given twice.

    >>> parse_widths("80,640")
    [640, 80]
    """
    if not text:
        return []
    entries = split_list(text)
    widths = sorted({int(entry) for entry in entries if _WIDTH.fullmatch(entry)}, reverse=True)
    if len(widths) < len(entries):
        raise SempaError(
            f"matryoshka_dims is {text!r:.80}. Expected different whole numbers above 0, such as 640,320,160,80."
        )
    return widths


def parse_layers(text: str) -> list[int] | None:
    """Parse indices of decoder layers, and return them sorted; None for an empty text.

    Raises:
        SempaError: If an entry is neither a number nor a range.

    >>> parse_layers("6-8,0")
    [0, 6, 7, 8]
    """
    if not text:
        return None
    layers: set[int] = set()
    for entry in split_list(text) if len(text) <= MAX_CHARACTERS else [""]:
        match = _LAYERS.fullmatch(entry)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise SempaError(
                f"lora_layers is {text!r:.80}. Expected numbers and ranges of layers below 10000, such as 0,4,6-17."
            )
        layers.update(span)
    return sorted(layers)
