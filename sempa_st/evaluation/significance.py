"""Whether one model is better than another on STS, beyond chance: a paired bootstrap over the sentence pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from sempa_st.data.sts import SPLITS, STS_TASKS, GradedPairs, data_dir_or_default, dev_pairs, local_files, read_pairs
from sempa_st.errors import SempaError
from sempa_st.evaluation.sts import expand_tasks
from sempa_st.loading import load
from sempa_st.utils.finite import check_finite

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Floats = NDArray[np.float64]
LEVEL = 0.95
"""Share of the resamples that an interval holds."""
_CELLS = 1 << 19
"""Numbers at once (resamples times pairs), which bounds the memory."""


@dataclass(frozen=True)
class Comparison:
    """Two models on one set of pairs, or on the mean of all sets.

    Args:
        task: Name of the set, or ``mean``.
        pairs: Number of sentence pairs.
        first: Spearman correlation of the first model, times 100.
        second: That of the second model.
        difference: ``second - first``.
        low: Lower end of the 95% percentile interval of the difference.
        high: Upper end.
        p_value: Two-sided: twice the share of resamples whose difference is 0 or has the other sign; at most 1, and at
            least 2 / (resamples + 1).
    """

    task: str
    pairs: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    p_value: float


def compare(
    first: str | SentenceTransformer,
    second: str | SentenceTransformer,
    *,
    tasks: str | None = None,
    split: str = "test",
    data_dir: str | None = None,
    resamples: int = 10_000,
    seed: int = 0,
    batch_size: int = 32,
    **loading: Any,
) -> list[Comparison]:
    """Compare two models on STS by a paired bootstrap: ``sempa compare`` from Python.

    Args:
        first: What :func:`sempa_st.load` takes, or any SentenceTransformer.
        second: The same.
        tasks: Comma-separated names of :data:`STS_TASKS`; all that ``data_dir`` has when None.
        split: ``test`` or ``dev``.
        data_dir: Folder with ``sts/*.parquet``; the shipped sample of graded pairs when None.
        resamples: Number of resamples, at least 1.
        seed: Seed of the resamples, 0 or more.
        batch_size: Sentences per batch.
        **loading: Arguments of :func:`sempa_st.load` for models that are named.

    Returns:
        One comparison per set, and one of the mean over the sets if there are several. SICK-R is its test rows.

    Raises:
        SempaError: On an unknown model, task or split, a seed below 0, or if pairs are missing or too few.
    """
    if seed < 0:
        raise SempaError(f"--seed is {seed}. Expected 0 or more.")
    sets = sets_at_hand(tasks, split, data_dir)
    # One after the other: two models may not fit into memory.
    cosines = [_cosines(model, list(sets.values()), batch_size, loading) for model in (first, second)]
    grades = {name: np.asarray(pairs.scores, dtype=np.float64) for name, pairs in sets.items()}
    return compare_cosines(grades, *cosines, resamples=resamples, seed=seed)


def sets_at_hand(tasks: str | None, split: str, data_dir: str | None) -> dict[str, GradedPairs]:
    """Read graded pairs by task: see :func:`compare`, whose arguments these are."""
    if split not in SPLITS:
        raise SempaError(f"Unknown split {split!r}. Expected one of: {', '.join(SPLITS)}.")
    data_dir = data_dir_or_default(data_dir)
    if not data_dir:
        if tasks:
            raise SempaError(
                f"The tasks {tasks} are in no data folder. Give one with --data-dir, or leave out --tasks."
            )
        return {"sample": dev_pairs("sample", None)}
    if tasks:
        names = expand_tasks(tasks)
    else:
        sts = Path(data_dir) / "sts"
        names = [name for name, stem in STS_TASKS.items() if (sts / f"{stem}.{split}.parquet").is_file()]
    if not names:
        raise SempaError(
            f"There is no {split} split of any STS set in {data_dir}. Expected files such as sts/stsb.{split}.parquet."
        )
    return {name: read_pairs(local_files(data_dir, name, split, "senteval")) for name in names}


def _cosines(
    model: str | SentenceTransformer, sets: Sequence[GradedPairs], batch_size: int, loading: Mapping[str, Any]
) -> list[Floats]:
    loaded = load(model, **loading) if isinstance(model, str) else model
    cosines = []
    for pairs in sets:
        vectors = loaded.encode(pairs.sentences, batch_size=batch_size, show_progress_bar=True)  # float32 of any model
        check_finite(vectors, pairs.sentences)
        cosines.append(pairs.cosines(torch.from_numpy(vectors)).double().numpy())
    return cosines


def compare_cosines(
    grades: Mapping[str, Floats], first: Sequence[Floats], second: Sequence[Floats], *, resamples: int, seed: int
) -> list[Comparison]:
    """Compare the cosines of two models with the grades, set by set and in the mean.

    Args:
        grades: Grades of the pairs by set, each of shape (pairs,).
        first: The first model's cosines, in the order of the sets.
        second: The second model's.
        resamples: Number of resamples. The sets are resampled independently of each other.
        seed: Seed of the resamples.

    Raises:
        SempaError: If a model's cosines or the grades of a set, or of one of its resamples, are all equal.
    """
    scores: dict[str, Floats] = {}
    for (name, graded), *pair in zip(grades.items(), first, second, strict=True):
        draws = _counts(len(graded), resamples, np.random.default_rng([seed, len(scores)]))
        whole = np.ones((len(graded), 1))
        parts = [_spearman(pair, graded, counts) for counts in (whole, *draws)]
        scores[name] = 100 * np.concatenate(parts, axis=1)
        if not np.isfinite(scores[name]).all():
            raise SempaError(
                f"{name} cannot be compared: in some resample of its {len(graded)} pairs, all grades or all cosines "
                "are equal. Use more pairs."
            )
    sizes = {name: len(graded) for name, graded in grades.items()}
    if len(scores) > 1:
        scores["mean"] = np.mean(list(scores.values()), axis=0)
        sizes["mean"] = sum(sizes.values())
    return [_comparison(name, sizes[name], both) for name, both in scores.items()]


def _comparison(name: str, pairs: int, scores: Floats) -> Comparison:
    """Summarise scores of shape (2, 1 + resamples), of which the first column is of the pairs themselves."""
    difference, *resampled = scores[1] - scores[0]
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    other_side = min(np.count_nonzero(np.array(resampled) <= 0), np.count_nonzero(np.array(resampled) >= 0))
    p_value = min(1.0, 2 * (1 + other_side) / (1 + len(resampled)))
    first, second = scores[:, 0]
    return Comparison(name, pairs, *map(float, (first, second, difference, low, high, p_value)))


def _counts(pairs: int, resamples: int, rng: np.random.Generator) -> Iterator[Floats]:
    """Draw resamples with replacement; yield how often each pair is drawn, in chunks of shape (pairs, resamples)."""
    chunk = max(1, _CELLS // pairs)
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        cells = rng.integers(0, pairs, (count, pairs)) * count + np.arange(count)[:, None]
        yield np.bincount(cells.ravel(), minlength=count * pairs).reshape(pairs, count).astype(np.float64)


def _spearman(cosines: Sequence[Floats], grades: Floats, counts: Floats) -> Floats:
    """Return the Spearman correlation of cosines with grades in each resample, of shape (models, resamples).

    It is the Pearson correlation of the ranks. A pair that is drawn several times weighs as much.
    """
    graded = _ranks(grades, counts)
    weighted = counts * graded
    correlations = []
    for values in cosines:
        ranks = _ranks(values, counts)
        squares = (counts * ranks**2).sum(axis=0) * (weighted * graded).sum(axis=0)
        with np.errstate(invalid="ignore"):  # 0 / 0 where all are equal, which the caller refuses
            correlations.append((weighted * ranks).sum(axis=0) / np.sqrt(squares))
    return np.stack(correlations)


def _ranks(values: Floats, counts: Floats) -> Floats:
    """Return the centred ranks of values in resamples, without sorting each of these; ties get their mean rank.

    If a value is drawn ``c`` times, and values up to it ``e`` times, its mean rank is ``e - (c - 1) / 2``.

    Args:
        values: Of shape (pairs,).
        counts: How often each is drawn, of shape (pairs, resamples).
    """
    group = np.unique(values, return_inverse=True)[1]
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    drawn: Floats = np.add.reduceat(counts[order], starts, axis=0)
    ranks: Floats = drawn.cumsum(axis=0) - (drawn + len(values)) / 2  # less their mean, (pairs + 1) / 2
    return ranks[group]
