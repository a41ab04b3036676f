"""Batches of sequences of similar length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import sentence_transformers
from tqdm import tqdm

_SHORT = 256
"""Length in characters up to which texts count as equally long; also the least characters of a batch, per text."""
_FILLS_GPU = 65_536
"""Characters of a batch from which on a GPU computes for longer than its kernels take to launch."""


def min_batch_characters(model: sentence_transformers.SentenceTransformer, size: int) -> int:
    """Return the minimum number of characters per batch; short texts are added until it is reached.

    This keeps a GPU busy at the memory cost of one batch of texts of maximal length.

    Args:
        model: Embedding model.
        size: Number of texts per batch that the caller asked for.
    """
    if model.device.type != "cuda":
        return size * _SHORT
    # Two characters per token are few.
    return max(size * _SHORT, min(size * 2 * (model.max_seq_length or 0), _FILLS_GPU))


def batches_by_length(texts: Sequence[str], size: int, characters: int) -> Iterator[list[int]]:
    """Yield batches of indices of texts: long texts first, and texts with a common prefix next to each other.

    Args:
        texts: The texts.
        size: Minimum number of texts per batch.
        characters: Minimum number of characters per batch.

    >>> list(batches_by_length(["A cat sleeps.", "Snow." * 60, "A cat runs."], 1, 256))
    [[1], [0, 2]]
    """
    batch: list[int] = []
    held = 0
    # By magnitude first: a long text would leave empty space in every pack of short ones.
    keys = [((len(text) // _SHORT).bit_length(), text) for text in texts]
    for index in sorted(range(len(texts)), key=keys.__getitem__, reverse=True):
        batch.append(index)
        held += len(texts[index])
        if len(batch) >= size and held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def group_by_length(
    lengths: Sequence[int],
    *,
    max_sequences: float = math.inf,
    max_tokens: float = math.inf,
    max_padding: float = math.inf,
) -> Iterator[list[int]]:
    """Yield the indices of sequences in groups of similar length, the shortest first.

    Args:
        lengths: Length of each sequence in tokens.
        max_sequences: Maximum number of sequences in a group.
        max_tokens: Maximum number of tokens in a group, padding included; a longer sequence is a group of its own.
        max_padding: Maximum number of padding tokens in a group.

    >>> list(group_by_length([5, 1, 9, 2], max_padding=4))
    [[1, 3], [0, 2]]
    """
    group: list[int] = []
    tokens = 0  # of the group, without padding
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        length = lengths[index]
        if group and (
            len(group) == max_sequences
            or length * (len(group) + 1) > max_tokens
            or length * len(group) - tokens > max_padding
        ):
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += length
    if group:
        yield group


def batches_within_tokens(lengths: Sequence[int], tokens: int, desc: str) -> Iterator[list[int]]:
    """Yield the groups of :func:`group_by_length` with at most ``tokens`` tokens each, under a progress bar.

    Args:
        lengths: Length of each sequence in tokens.
        tokens: Maximum number of tokens in a batch, padding included.
        desc: Name of the progress bar.
    """
    with tqdm(total=len(lengths), desc=desc, unit="row", dynamic_ncols=True) as bar:
        for batch in group_by_length(lengths, max_tokens=tokens):
            yield batch
            bar.update(len(batch))
