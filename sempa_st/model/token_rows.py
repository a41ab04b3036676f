"""From sentences to rows of token ids.

This file needs nothing else of sempa_st; see ``prompt_eol.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain, compress
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from torch import Tensor


def common_prefix(rows: Sequence[Any]) -> int:
    """Return the length in tokens of the longest common prefix of rows: lists, or tuples, of token ids.

    >>> common_prefix([[2, 5, 7], [2, 5], [2, 5, 9]])
    2
    """
    # All rows begin as the first and the last one do in lexicographic order.
    first, last = min(rows), max(rows)
    differing = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return next(differing, len(first))


def sentence_in(value: Any) -> str:
    """Return the sentence that an input of sentence-transformers holds.

    Raises:
        ValueError: If it is neither a string nor ``{"text": string}``.
    """
    text = value["text"] if isinstance(value, dict) and value.keys() == {"text"} else value
    if not isinstance(text, str):
        # Not a TypeError: sentence-transformers would swallow it and call again without the prompt.
        raise ValueError(
            f"PromptEOL embeds sentences, each a string or {{'text': string}}, got {type(text).__name__}: {text!r:.80}."
        )
    return text


_WITHOUT_TRUNCATION: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return the token ids of texts, and the first character and the one behind the last of each token.

    Padding and truncation are settings of a fast tokenizer and not arguments of a call. Another thread may set them
    meanwhile, so they are neither relied on nor touched here.

    Args:
        tokenizer: Any tokenizer; one that is written in Python tells no characters.
        texts: The texts.
        add_special_tokens: Whether to add those that the tokenizer puts around a text.
    """
    if not tokenizer.is_fast:
        rows = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        return [(row, []) for row in rows]
    shared = tokenizer.backend_tokenizer
    encodings = [] if shared.truncation else shared.encode_batch(texts, add_special_tokens=add_special_tokens)
    if shared.truncation or any(encoding.overflowing for encoding in encodings):
        own = _WITHOUT_TRUNCATION.get(tokenizer)
        if own is None:
            own = _WITHOUT_TRUNCATION[tokenizer] = copy.deepcopy(shared)
            own.no_truncation()
        encodings = own.encode_batch(texts, add_special_tokens=add_special_tokens)
    return [_without_padding(encoding) for encoding in encodings]


def _without_padding(encoding: Any) -> tuple[list[int], list[tuple[int, int]]]:
    ids, offsets, mask = encoding.ids, encoding.offsets, encoding.attention_mask
    return (ids, offsets) if all(mask) else (list(compress(ids, mask)), list(compress(offsets, mask)))


def fitting(tokenizer: Any, rows: list[list[int]], decoder: Any) -> list[list[int]]:
    """Return rows without tokens that the decoder has no embedding of: a text may spell out one of an image's.

    Args:
        tokenizer: Tokenizer that the rows come from; its unknown token, or else its pad token, takes their place.
        rows: Token ids.
        decoder: Layers with the input embeddings.
    """
    entries = decoder.get_input_embeddings().weight.shape[0]
    if max(map(max, filter(None, rows)), default=0) < entries:
        return rows
    known = (token for token in (tokenizer.unk_token_id, tokenizer.pad_token_id) if token is not None)
    stand_in = next((token for token in known if token < entries), 0)
    return [[token if token < entries else stand_in for token in row] for row in rows]


def pad_rows(tokenizer: Any, rows: Sequence[Sequence[int]], side: str | None = None) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of shape (rows, tokens): what ``tokenizer.pad`` does, much sooner.

    ``rows`` are the rows' token ids, ``side`` the padding's (``left`` or ``right``, or None for the tokenizer's own).
    """
    import torch  # here: the command line reads settings that need this file, and no tensor

    lengths = torch.tensor([len(row) for row in rows])[:, None]
    places = torch.arange(int(lengths.max()))
    kept = places.flip(0) < lengths if (side or tokenizer.padding_side) == "left" else places < lengths
    input_ids = torch.full(kept.shape, tokenizer.pad_token_id or 0)
    input_ids[kept] = torch.tensor(list(chain.from_iterable(rows)))
    return {"input_ids": input_ids, "attention_mask": kept.long()}
