"""What the reference says of the data: computed once, before the adapter is there, and kept on disk."""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sempa_st.bases import cache_folder
from sempa_st.errors import SempaError
from sempa_st.files import atomic_file
from sempa_st.leftovers import clear_leftovers, disk_fault

REFERENCE = "reference_log_probabilities"
"""Name of the log-probabilities of whole answers, best first, of shape (triplets, answers)."""


def cached_tensor(name: str, identity: dict[str, Any], compute: Callable[[], Tensor], *, write: bool) -> Tensor:
    """Return ``compute()``, or what it returned earlier for the same ``identity``; a cache is a help and no need.

    Args:
        name: What the result is called on disk.
        identity: All that decides the result: base, data, template, type. JSON values only.
        compute: Runs the reference; called only when nothing is cached.
        write: Whether this process keeps the result for others.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache_folder() / "reference" / f"{digest[:32]}.safetensors"
    try:
        return load_file(path)[name]
    except (SafetensorError, OSError, KeyError):  # not there, cut short, out of reach, or somebody else's
        tensor = compute()
    if write:
        try:
            clear_leftovers(path.parent)
            with atomic_file(path) as scratch:
                save_file({name: tensor}, scratch, metadata={"identity": json.dumps(identity)})
        except (SafetensorError, SempaError, OSError) as error:
            warn_uncached(path.parent, disk_fault(error) or str(error))
    return tensor


@functools.cache
def warn_uncached(folder: Path, reason: str) -> None:
    """Say once that nothing can be kept in the cache, which a run can do without."""
    print(
        f"The cache folder {folder} cannot be written ({reason}); the run goes on without it, and what the base says "
        "of the data is computed again the next time. SEMPA_CACHE_DIR names another folder.",
        file=sys.stderr,
    )


def in_batches(lengths: Sequence[int], tokens: int, desc: str) -> Iterator[list[int]]:
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


def collect(rows: int, batches: Iterator[list[int]], compute: Callable[[list[int]], Tensor]) -> Tensor:
    """Return float32 results of all rows, in the order of their numbers."""
    parts: list[Tensor | None] = [None] * rows
    for batch in batches:
        with torch.no_grad():
            for index, value in zip(batch, compute(batch).float().cpu(), strict=True):
                parts[index] = value
    return torch.stack([part for part in parts if part is not None])
