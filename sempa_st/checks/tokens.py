"""Checks of a tokenizer: pad token, token ids within the embedding matrix, and bounded growth of texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_IN_TEXT = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token")
"""Special tokens that a tokenizer may add to a text."""
_NEW_PAD = "<|pad|>"
_UNUSED_BYTE = "ÿ"
"""Entry of byte 0xFF in byte-level vocabularies, which occurs in no UTF-8 text; this letter is two other bytes."""
_COUNTED = 10**9
"""Tokens up to which a post-processor's are counted: a chain of them may double the text at each step."""
_MAX_GROWTH = 100
"""Maximum number of characters that normalisation and pre-tokenisation may produce from one character, and of tokens
that post-processing may make of one token."""


def check_growth(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise :class:`SempaError` if what a tokenizer replaces, or puts around a text, could make it much longer."""
    if not tokenizer.is_fast:
        return
    growth = 1.0
    for step in (tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.pre_tokenizer):
        # The state of the single step: serialising the whole tokenizer, with its vocabulary, would take seconds.
        for settings in _nested_settings(json.loads(step.__getstate__()) if step is not None else None):
            pattern = settings.get("pattern")
            exact = pattern.get("String") if isinstance(pattern, dict) else None
            added = len(str(settings.get("content", ""))) + len(str(settings.get("prepend", "")))
            growth *= max(1.0, added / max(1, len(exact or "")))
    if growth > _MAX_GROWTH:
        raise SempaError(
            f"The tokenizer replaces one character by up to {growth:.0f}. Expected at most {_MAX_GROWTH}; restore or "
            "download its files again."
        )
    step = tokenizer.backend_tokenizer.post_processor
    if step is not None and (made := _post_processed(json.loads(step.__getstate__()), 1)) > _MAX_GROWTH:
        raise SempaError(
            f"The tokenizer's post-processor makes {made} tokens or more of one. Expected at most {_MAX_GROWTH}; "
            "restore or download its files again."
        )


def _post_processed(settings: dict[str, Any], length: int) -> int:
    """Return how many tokens a post-processor makes of so many."""
    if settings["type"] == "Sequence":
        for step in settings["processors"]:
            length = min(_post_processed(step, length), _COUNTED)
        return length
    if settings["type"] != "TemplateProcessing":
        return length  # the other types add two tokens at most
    tokens = {name: len(token["ids"]) for name, token in settings["special_tokens"].items()}
    pieces = [piece.get("SpecialToken") for piece in settings["single"]]
    return sum(tokens[piece["id"]] if piece else length for piece in pieces)


def _nested_settings(value: Any) -> list[dict[str, Any]]:
    """Return all dictionaries in the JSON of a tokenizer step, including those of nested steps."""
    if isinstance(value, list):
        return [settings for item in value for settings in _nested_settings(item)]
    if not isinstance(value, dict):
        return []
    return [value, *(settings for item in value.values() for settings in _nested_settings(item))]


def fit_tokens(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> None:
    """Check a tokenizer's ids against the embedding matrix, and give it a pad token other than EOS if it needs one.

    A special token that the tokenizer never adds by itself may lie outside the matrix, like the image token of
    Gemma 3.

    Args:
        tokenizer: The tokenizer; its pad token may be set.
        rows: Number of rows of the embedding matrix; unknown when None.

    Raises:
        SempaError: If another token lies outside the matrix, or no token can be used for padding.
    """
    added = tokenizer.added_tokens_decoder.items()
    outside = {token.content: index for index, token in added if rows is not None and index >= rows}
    pad = tokenizer.pad_token
    if pad is None or pad == tokenizer.eos_token or pad in outside:
        # This adds a new token, and makes an existing one special, as it will be in a saved tokenizer.
        tokenizer.add_special_tokens({"pad_token": _spare_token(tokenizer, outside, rows)})
    if rows is None:
        return
    special = {getattr(tokenizer, name) for name in _IN_TEXT} & outside.keys()
    plain = {token.content for _, token in added if not token.special} & outside.keys()
    if tokenizer.vocab_size > rows or special or plain:
        shown = ", ".join(f"{token!r} is {outside[token]}" for token in sorted(special | plain)[:3])
        raise SempaError(
            f"The tokenizer does not fit the model: {shown or f'it has {tokenizer.vocab_size} tokens'}, and the "
            f"embedding matrix has {rows} rows. Expected token ids below that; use the tokenizer that came with the "
            "model."
        )


def _spare_token(tokenizer: PreTrainedTokenizerBase, outside: dict[str, int], rows: int | None) -> str:
    """Choose a pad token that has a row in the embedding matrix, so that the matrix need not grow.

    It is an existing token where there is a fit one, else a new one for a row beyond the vocabulary.
    """
    taken = {tokenizer.eos_token, tokenizer.bos_token, None, *outside}
    if tokenizer.unk_token not in taken:
        return str(tokenizer.unk_token)
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = [token for token in added if token not in taken]
    for word in ("pad", "reserved"):
        for token in spare:
            if word in token:
                return token
    # BOS is safe for padding: it is masked, and unlike EOS it never ends a generation.
    last_resort = spare[0] if spare else tokenizer.bos_token
    if last_resort not in (None, tokenizer.eos_token):
        return str(last_resort)
    # GPT-2's only special token is its EOS.
    if rows is not None and len(tokenizer) < rows:
        return _NEW_PAD
    if tokenizer.get_vocab().get(_UNUSED_BYTE) not in (None, *tokenizer(_UNUSED_BYTE)["input_ids"]):
        return _UNUSED_BYTE
    raise SempaError(
        "The tokenizer has no token other than EOS to pad with, and the embedding matrix no row beyond the vocabulary. "
        "Set its pad_token and save it."
    )
