"""Special tokens: one to pad with, and none beyond the base's embedding matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sempa_st.errors import SempaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IN_TEXT = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token")
"""Special tokens that a tokenizer puts into a text by itself."""


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
