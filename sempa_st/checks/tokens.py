"""What a tokenizer may do: pad with a token of its own, give none beyond the matrix, and let no text swell."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IN_TEXT = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token")
"""Special tokens that a tokenizer puts into a text by itself."""
_MOST_GROWTH = 100
"""How many characters the steps before tokenisation may make of one."""


def check_growth(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise :class:`SempaError` if what a tokenizer replaces in a text may let it swell."""
    if not tokenizer.is_fast:
        return
    growth = 1.0
    for step in (tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.pre_tokenizer):
        # Its own settings, without the vocabulary, which would take seconds.
        for settings in _steps(json.loads(step.__getstate__()) if step is not None else None):
            pattern = settings.get("pattern")
            exact = pattern.get("String") if isinstance(pattern, dict) else None
            added = len(str(settings.get("content", ""))) + len(str(settings.get("prepend", "")))
            growth *= max(1.0, added / max(1, len(exact or "")))
    if growth > _MOST_GROWTH:
        raise SempaError(
            f"The tokenizer replaces one character by up to {growth:.0f}. Expected {_MOST_GROWTH} at most; restore or "
            "download its files again."
        )


def _steps(settings: Any) -> list[dict[str, Any]]:
    """Return the settings of all steps, of those within others too."""
    if isinstance(settings, list):
        return [step for part in settings for step in _steps(part)]
    if not isinstance(settings, dict):
        return []
    return [settings, *(step for part in settings.values() for step in _steps(part))]


def fit_tokens(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Give a tokenizer a pad token other than EOS that the embedding matrix holds.

    A special token that only stands in a text that spells it out may lie beyond the matrix: Gemma 3's for images does.

    Args:
        tokenizer: The tokenizer.
        rows: Rows of the embedding matrix; any number when None.

    Raises:
        SempaError: If another token lies beyond the matrix, or there is none to pad with.
    """
    beyond = _beyond(tokenizer, rows)
    pad = tokenizer.pad_token
    if pad is None or pad == tokenizer.eos_token or pad in beyond:
        tokenizer.pad_token = _spare_token(tokenizer, beyond)
    if rows is None:
        return
    named = {getattr(tokenizer, name) for name in _IN_TEXT} & beyond.keys()
    common = {token.content for token in tokenizer.added_tokens_decoder.values() if not token.special} & beyond.keys()
    if tokenizer.vocab_size > rows or named or common:
        found = ", ".join(f"{token!r} is {beyond[token]}" for token in sorted(named | common)[:3])
        raise SempaError(
            f"The tokenizer does not fit the model: {found or f'it has {tokenizer.vocab_size} tokens'}, and the "
            f"embedding matrix has {rows} rows. Expected numbers below that; take the tokenizer that came with the "
            "model."
        )


def _beyond(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> dict[str, int]:
    """Return the added tokens, by their text, that have no row in the embedding matrix."""
    added = tokenizer.added_tokens_decoder.items()
    return {token.content: index for index, token in added if rows is not None and index >= rows}


def _spare_token(tokenizer: PreTrainedTokenizerBase, beyond: dict[str, int]) -> str:
    """Choose a pad token from the vocabulary as it is, so that the embedding matrix need not grow."""
    taken = {tokenizer.eos_token, tokenizer.bos_token, None, *beyond}
    if tokenizer.unk_token not in taken:
        return str(tokenizer.unk_token)
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = [token for token in added if token not in taken]
    for mark in ("pad", "reserved"):
        for token in spare:
            if mark in token:
                return token
    # BOS never follows the sentence, so as padding it is masked like any other token and stops nothing.
    last_resort = spare[0] if spare else tokenizer.bos_token
    if last_resort in (None, tokenizer.eos_token):
        raise SempaError("The tokenizer has no token besides EOS to pad with. Set its pad_token and save it.")
    return str(last_resort)
