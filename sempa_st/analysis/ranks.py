"""Ranks of cosine similarities against gold scores, and the checks of both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sempa_st.data.sts import GradedPairs
from sempa_st.errors import SempaError

Values = NDArray[np.float64]


def percentile_ranks(values: Values) -> Values:
    """Return 100 (r - 1) / (n - 1) for rank r among n values; equal values share the mean of their ranks.

    >>> percentile_ranks(np.array([0.5, 0.1, 0.9])).tolist()
    [50.0, 0.0, 100.0]
    """
    from scipy.stats import rankdata

    ranks: Values = 100 * (rankdata(values) - 1) / (len(values) - 1)
    return ranks


def spearman(first: Values, second: Values) -> float:
    """Return the Spearman correlation times 100, or NaN where one side has fewer than two different values."""
    from scipy.stats import spearmanr

    if min(len(np.unique(first)), len(np.unique(second))) < 2:
        return float("nan")
    return 100 * float(spearmanr(first, second).statistic)


def checked_gold(pairs: GradedPairs) -> Values:
    """Return the gold scores of pairs.

    Raises:
        SempaError: On fewer than two pairs, a score that is not finite, or equal scores only.
    """
    if len(pairs) < 2:
        raise SempaError(f"There are too few pairs to correlate: {len(pairs)}. Expected at least 2.")
    return _checked("gold score", pairs.scores)


def checked_cosines(cosines: Sequence[float] | Values, pairs: GradedPairs) -> Values:
    """Return the cosine similarities of pairs.

    Raises:
        SempaError: If there is not one a pair, or on a cosine that is not finite, or equal cosines only.
    """
    if len(cosines) != len(pairs):
        raise SempaError(f"There are {len(cosines)} cosines for {len(pairs)} pairs. Expected one a pair.")
    return _checked("cosine", cosines)


def _checked(name: str, numbers: Sequence[float] | Values) -> Values:
    values = np.asarray(numbers, dtype=np.float64)
    odd = np.flatnonzero(~np.isfinite(values))
    if odd.size:
        raise SempaError(f"The {name} of pair {odd[0] + 1} is {values[odd[0]]}. Expected a finite number.")
    if np.ptp(values) == 0:
        raise SempaError(f"Every {name} is {values[0]:g}, which ranks no pair. Expected different values.")
    return values
