"""Batches of sequences of similar length."""

from __future__ import annotations

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
    for index in sorted(range(len(texts)), key=lambda index: (_magnitude(texts[index]), texts[index]), reverse=True):
        batch.append(index)
        held += len(texts[index])
        if len(batch) >= size and held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _magnitude(text: str) -> int:
    # A long text would leave empty space in every pack of short ones.
    return (len(text) // _SHORT).bit_length()


_GROUP_SIZE = 64
_GROUP_PADDING = 128
"""Most tokens of padding in a group: they cost about as much as another forward pass."""


def groups_by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield groups of indices of sequences of similar length, so that little of a group is padding.

    Args:
        lengths: Length of each sequence in tokens.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    group: list[int] = []
    for index in order:
        padding = sum(lengths[index] - lengths[other] for other in group)
        if len(group) == _GROUP_SIZE or padding > _GROUP_PADDING:
            yield group
            group = []
        group.append(index)
    yield group


def batches_within_tokens(lengths: Sequence[int], tokens: int, desc: str) -> Iterator[list[int]]:
    """Yield batches of indices of sequences of similar length, under a progress bar.

    Args:
        lengths: Length of each sequence in tokens.
        tokens: Most tokens per batch, padding included; a longer sequence is a batch of its own.
        desc: Label of the progress bar.
    """
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    with tqdm(total=len(order), desc=desc, unit="row", dynamic_ncols=True) as bar:
        batch: list[int] = []
        for index in order:
            if batch and lengths[index] * (len(batch) + 1) > tokens:
                yield batch
                bar.update(len(batch))
                batch = []
            batch.append(index)
        yield batch
        bar.update(len(batch))
