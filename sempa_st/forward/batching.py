"""Batches of sequences of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import sentence_transformers
from tqdm import tqdm

_LONG = 256
"""Characters up to which texts count as being of one length, and which a batch holds for each text asked for."""
_FILLS_GPU = 65_536
"""Characters of a batch from which on a GPU computes for longer than its work takes to hand out."""


def min_batch_characters(model: sentence_transformers.SentenceTransformer, size: int) -> int:
    """Return how many characters a batch of ``size`` texts holds at the least, in texts beyond these where it must.

    It takes no longer then than a batch of long texts, and on a GPU no more memory than one of the longest.
    """
    if model.device.type != "cuda":
        return size * _LONG
    # Two characters a token are few.
    return max(size * _LONG, min(size * 2 * (model.max_seq_length or 0), _FILLS_GPU))


def batches_by_length(texts: Sequence[str], size: int, characters: int) -> Iterator[list[int]]:
    """Yield the numbers of texts in batches: the long ones first, and neighbours that begin alike.

    Args:
        texts: The texts.
        size: Texts of a batch, at the least.
        characters: Characters of a batch, at the least.

    >>> list(batches_by_length(["A cat sleeps.", "Snow." * 60, "A cat runs."], 1, 256))
    [[1], [0, 2]]
    """
    batch: list[int] = []
    held = 0
    for place in sorted(range(len(texts)), key=lambda place: (_magnitude(texts[place]), texts[place]), reverse=True):
        batch.append(place)
        held += len(texts[place])
        if len(batch) >= size and held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _magnitude(text: str) -> int:
    # A long text would leave room in every pack of short ones.
    return (len(text) // _LONG).bit_length()


_ROWS_TOGETHER = 64
_PADDING = 128
"""Tokens of padding that a group of rows may hold: about what a forward pass of its own costs."""


def alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of rows in groups of similar length, so that little of a group is padding.

    Args:
        lengths: Tokens of each row.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    group: list[int] = []
    for row in order:
        padding = sum(lengths[row] - lengths[other] for other in group)
        if len(group) == _ROWS_TOGETHER or padding > _PADDING:
            yield group
            group = []
        group.append(row)
    yield group


def batches_within_tokens(lengths: Sequence[int], tokens: int, desc: str) -> Iterator[list[int]]:
    """Yield the numbers of rows of similar length, at most ``tokens`` padded tokens a batch, under a progress bar.

    Args:
        lengths: Tokens of each row.
        tokens: Budget of a batch; a longer row makes a batch of its own.
        desc: Name of the bar.
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
