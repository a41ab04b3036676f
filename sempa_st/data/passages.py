"""Passages of ordinary text from a file, for the term that ties the model to its base there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sempa_st.errors import SempaError
from sempa_st.utils.files import UTF8

PASSAGE_TOKENS = 128


@dataclass(frozen=True)
class Passages:
    """A text in pieces.

    Args:
        rows: Token ids of the passages, :data:`PASSAGE_TOKENS` each, begun as the tokenizer begins any text.
        sha256: Digest (hex) of the file.
    """

    rows: list[list[int]]
    sha256: str


def read_passages(path: str, tokenizer: PreTrainedTokenizerBase) -> Passages:
    """Cut a text file into passages; what is left at its end is dropped.

    Args:
        path: Text file in UTF-8.
        tokenizer: The base's tokenizer.

    Raises:
        SempaError: If the file cannot be read, or is shorter than one passage.
    """
    try:
        content = Path(path).read_bytes()
        text = content.decode(UTF8)
    except (OSError, UnicodeDecodeError) as error:
        raise SempaError(f"The text {path} cannot be read ({error}). Expected a text file in UTF-8.") from error
    beginning = _beginning(tokenizer)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    size = PASSAGE_TOKENS - len(beginning)
    rows = [beginning + tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    if not rows:
        raise SempaError(f"{path} has {len(tokens)} tokens of text. Expected at least {size}.")
    return Passages(rows, hashlib.sha256(content).hexdigest())


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text; it may be a token that others put behind it (OPT)."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return whole[: whole.index(bare[0])]
