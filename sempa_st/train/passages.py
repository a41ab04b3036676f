"""Passages of ordinary text from a file, for the term that ties the model to its base there."""

from __future__ import annotations

import hashlib
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sempa_st.errors import SempaError

PASSAGE_TOKENS = 128


def read_passages(path: str, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of a text's passages, each begun as the tokenizer begins a text.

    Args:
        path: Text file in UTF-8.
        tokenizer: The base's tokenizer.

    Raises:
        SempaError: If the file cannot be read, or is shorter than one passage of :data:`PASSAGE_TOKENS`.
    """
    beginning = tokenizer("")["input_ids"]
    beginning = beginning if beginning[-1:] != [tokenizer.eos_token_id] else beginning[:-1]
    tokens = tokenizer(_read(path), add_special_tokens=False)["input_ids"]
    size = PASSAGE_TOKENS - len(beginning)
    passages = [beginning + tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    if not passages:
        raise SempaError(f"{path} has {len(tokens)} tokens of text. Expected at least {size}.")
    return passages


def text_digest(path: str) -> str:
    """Return the SHA-256 of a text file; raises as :func:`read_passages`."""
    return hashlib.sha256(_read(path).encode()).hexdigest()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SempaError(f"The text {path} cannot be read ({error}). Expected a text file in UTF-8.") from error
