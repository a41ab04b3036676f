"""STS errors by stratum: sentence length, lexical overlap and gold score; and the worst pairs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sempa_st.analysis.ranks import Values, checked_cosines, checked_gold, percentile_ranks, spearman
from sempa_st.analysis.vectors import Vectors
from sempa_st.data.sts import GradedPairs

_WORD = re.compile(r"\w+")
_OVERLAPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
_GRADES = 5
"""Number of strata of the gold score, of equal width."""


@dataclass(frozen=True)
class Stratum:
    """The pairs whose property lies in one interval, and the errors of one model on them.

    Args:
        by: Property: ``length`` (mean number of words of the two sentences), ``overlap`` (see :func:`word_overlap`) or
            ``gold`` (the gold score).
        low: Lower end of the interval, included.
        high: Upper end, excluded except in the last interval.
        pairs: Number of pairs.
        spearman: Spearman correlation of cosine and gold score within the stratum, times 100; NaN where all cosines or
            all gold scores are equal.
        rank_error: Mean absolute difference of the :func:`percentile_ranks` of cosine and gold score, 0 to 100. The
            ranks are those among all pairs.
    """

    by: str
    low: float
    high: float
    pairs: int
    spearman: float
    rank_error: float

    @property
    def label(self) -> str:
        """The interval as text."""
        return f"{self.low:.3g} to {self.high:.3g}"


@dataclass(frozen=True)
class RankedPair:
    """A pair and the percentile ranks, 0 to 100, of its gold score and its cosine."""

    first: str
    second: str
    gold: float
    cosine: float
    gold_rank: float
    cosine_rank: float

    @property
    def error(self) -> float:
        """Rank of the cosine minus that of the gold score."""
        return self.cosine_rank - self.gold_rank


def sts_strata(pairs: GradedPairs, cosines: Sequence[float] | Values) -> list[Stratum]:
    """Return the errors of a model on each stratum that holds a pair.

    Lengths are cut at their quartiles, overlaps at fifths of 0 to 1, and gold scores at fifths of their range.

    Args:
        pairs: Graded pairs.
        cosines: Cosine similarity of each pair.

    Raises:
        SempaError: On fewer than two pairs, a value that is not finite, or equal cosines or gold scores only.
    """
    gold = checked_gold(pairs)
    cosine = checked_cosines(cosines, pairs)
    errors = np.abs(percentile_ranks(cosine) - percentile_ranks(gold))
    lengths = np.array([(len(words(a)) + len(words(b))) / 2 for a, b in zip(pairs.first, pairs.second, strict=True)])
    overlaps = np.array([word_overlap(a, b) for a, b in zip(pairs.first, pairs.second, strict=True)])
    properties = {
        "length": (lengths, np.quantile(lengths, np.linspace(0, 1, 5))),
        "overlap": (overlaps, np.array(_OVERLAPS)),
        "gold": (gold, np.linspace(gold.min(), gold.max(), _GRADES + 1)),
    }
    return [
        Stratum(by, low, high, int(inside.sum()), spearman(cosine[inside], gold[inside]), float(errors[inside].mean()))
        for by, (values, edges) in properties.items()
        for low, high, inside in _intervals(values, edges)
    ]


def worst_pairs(pairs: GradedPairs, cosines: Sequence[float] | Values, count: int = 20) -> list[RankedPair]:
    """Return the pairs whose percentile ranks of gold score and cosine differ most, the worst first.

    Args:
        pairs: Graded pairs.
        cosines: Cosine similarity of each pair.
        count: Number of pairs to return; all if there are fewer.

    Raises:
        SempaError: As for :func:`sts_strata`.
    """
    gold = checked_gold(pairs)
    cosine = checked_cosines(cosines, pairs)
    cosine_ranks, gold_ranks = percentile_ranks(cosine), percentile_ranks(gold)
    worst = np.argsort(-np.abs(cosine_ranks - gold_ranks), kind="stable")[:count]
    return [
        RankedPair(pairs.first[index], pairs.second[index], *(float(each[index]) for each in columns))
        for columns in [(gold, cosine, gold_ranks, cosine_ranks)]
        for index in worst
    ]


def pair_cosines(first: Vectors, second: Vectors) -> Values:
    """Return the cosine of each row of ``first`` with that of ``second``, both of shape (pairs, hidden)."""
    one, other = (np.asarray(side, dtype=np.float64) for side in (first, second))
    with np.errstate(invalid="ignore"):
        return np.asarray((one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1))


def words(text: str) -> list[str]:
    """Return the lower-cased words of a text: runs of letters, digits and underscores.

    >>> words("A cat's nap.")
    ['a', 'cat', 's', 'nap']
    """
    return _WORD.findall(text.lower())


def word_overlap(first: str, second: str) -> float:
    """Return the Jaccard similarity of the :func:`words` of two texts, 0 to 1; 1 if neither has a word.

    >>> word_overlap("A cat sleeps.", "The cat sleeps")
    0.5
    """
    one, other = set(words(first)), set(words(second))
    return len(one & other) / len(one | other) if one | other else 1.0


def _intervals(values: Values, edges: Values) -> list[tuple[float, float, NDArray[np.bool_]]]:
    """Return both ends of each interval that holds a value, and which values lie in it."""
    edges = np.unique(edges)
    index = np.searchsorted(edges[1:-1], values, side="right")
    return [
        (float(edges[number]), float(edges[min(number + 1, len(edges) - 1)]), index == number)
        for number in np.unique(index)
    ]
