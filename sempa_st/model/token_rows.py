"""From sentences to token ids.

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


def common_prefix(sequences: Sequence[Any]) -> int:
    """Return the length of the longest common prefix of sequences of token ids, all lists or all tuples.

    >>> common_prefix([[2, 5, 7], [2, 5], [2, 5, 9]])
    2
    """
    # What the first and the last one in lexicographic order share, all of them share.
    first, last = min(sequences), max(sequences)
    differing = (index for index, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return next(differing, len(first))


def sentence_in(value: Any) -> str:
    """Return the sentence in an input of sentence-transformers.

    Raises:
        ValueError: If the input is neither a string nor ``{"text": string}``.
    """
    text = value["text"] if isinstance(value, dict) and value.keys() == {"text"} else value
    if not isinstance(text, str):
        # Not a TypeError, which sentence-transformers catches, to call again without the prompt.
        raise ValueError(
            f"PromptEOL embeds sentences, each a string or {{'text': string}}, got {type(text).__name__}: {text!r:.80}."
        )
    return text


_WITHOUT_TRUNCATION: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def tokenize(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Return the token ids of each text, and the (start, end) of each token in characters.

    Padding and truncation are state of a fast tokenizer, not arguments of a call, and another thread may set them at
    any time. So this function neither relies on them nor changes them.

    Args:
        tokenizer: Any tokenizer; a slow one gives no characters.
        texts: The texts.
        add_special_tokens: Whether to add the special tokens that the tokenizer puts around a text.
    """
    if not tokenizer.is_fast:
        sequences = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
        return [(ids, []) for ids in sequences]
    shared = tokenizer.backend_tokenizer
    encodings = [] if shared.truncation else shared.encode_batch(texts, add_special_tokens=add_special_tokens)
    if shared.truncation or any(encoding.overflowing for encoding in encodings):
        own = _WITHOUT_TRUNCATION.get(tokenizer)
        if own is None:
            own = copy.deepcopy(shared)
            own.no_truncation()
            _WITHOUT_TRUNCATION[tokenizer] = own  # whole, since another thread may take it at once
        encodings = own.encode_batch(texts, add_special_tokens=add_special_tokens)
    return [_without_padding(encoding) for encoding in encodings]


def _without_padding(encoding: Any) -> tuple[list[int], list[tuple[int, int]]]:
    ids, offsets, mask = encoding.ids, encoding.offsets, encoding.attention_mask
    return (ids, offsets) if all(mask) else (list(compress(ids, mask)), list(compress(offsets, mask)))


def fitting(tokenizer: Any, sequences: list[list[int]], decoder: Any) -> list[list[int]]:
    """Replace tokens without an embedding in the decoder: a text may spell out the special token of an image.

    Args:
        tokenizer: Tokenizer of the sequences; its unknown token, or else its pad token, is the replacement.
        sequences: Token ids of each sequence.
        decoder: Layers with the input embeddings.
    """
    vocabulary = embedding_count(decoder)
    if max(map(max, filter(None, sequences)), default=0) < vocabulary:
        return sequences
    known = (token for token in (tokenizer.unk_token_id, tokenizer.pad_token_id) if token is not None)
    replacement = next((token for token in known if token < vocabulary), 0)
    return [[token if token < vocabulary else replacement for token in ids] for ids in sequences]


def embedding_count(decoder: Any) -> int:
    """Return the number of tokens with an embedding; the weight may be on another process."""
    embedding = decoder.get_input_embeddings()
    return int(embedding.weight.shape[0] or embedding.num_embeddings)


def pad_rows(tokenizer: Any, sequences: Sequence[Sequence[int]], side: str | None = None) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``attention_mask`` of shape (batch, seq_len), as ``tokenizer.pad`` does but faster.

    Args:
        tokenizer: Tokenizer with the pad token.
        sequences: Token ids of each sequence.
        side: Side of the padding, ``left`` or ``right``; the tokenizer's own when None.
    """
    import torch  # here: the command line reads settings that need this file, and no tensor

    lengths = torch.tensor([len(ids) for ids in sequences])[:, None]
    index = torch.arange(int(lengths.max()))
    kept = index.flip(0) < lengths if (side or tokenizer.padding_side) == "left" else index < lengths
    input_ids = torch.full(kept.shape, tokenizer.pad_token_id or 0)
    input_ids[kept] = torch.tensor(list(chain.from_iterable(sequences)))
    return {"input_ids": input_ids, "attention_mask": kept.long()}
