"""Split ordinary text into passages for the KL term, which keeps the model close to its base on such text."""

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
    """A text split into passages.

    Args:
        token_ids: Token ids of each passage, :data:`PASSAGE_TOKENS` long, with the tokenizer's leading special tokens.
        sha256: SHA-256 digest (hex) of the file.
    """

    token_ids: list[list[int]]
    sha256: str


def read_passages(path: str, tokenizer: PreTrainedTokenizerBase) -> Passages:
    """Split a text file into passages; a shorter rest at the end is dropped.

    Args:
        path: UTF-8 text file.
        tokenizer: The base model's tokenizer.

    Raises:
        SempaError: If the file cannot be read or is shorter than one passage.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise SempaError(f"The text {path} is no file. Expected a text file in UTF-8.")
    try:
        content = Path(path).read_bytes()
        text = content.decode(UTF8)
    except (OSError, UnicodeDecodeError) as error:
        raise SempaError(f"The text {path} cannot be read ({error}). Expected a text file in UTF-8.") from error
    prefix = _special_prefix(tokenizer)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    size = PASSAGE_TOKENS - len(prefix)
    passages = [prefix + tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    if not passages:
        raise SempaError(f"{path} has {len(tokens)} tokens of text. Expected at least {size}: give a longer text.")
    return Passages(passages, hashlib.sha256(content).hexdigest())


def _special_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special tokens that the tokenizer puts before a text (for OPT </s>, elsewhere an end token)."""
    whole, bare = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return whole[: whole.index(bare[0])]
