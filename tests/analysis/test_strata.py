from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from sempa_st.analysis.ranks import percentile_ranks
from sempa_st.analysis.strata import sts_strata, word_overlap, worst_pairs
from sempa_st.data.rows import read_rows
from sempa_st.data.sts import GradedPairs, read_pairs
from sempa_st.errors import SempaError
from sempa_st.utils.assets import asset_path


@pytest.fixture(scope="module")
def pairs() -> GradedPairs:
    return read_pairs([asset_path("sts_sample.jsonl")])


@pytest.fixture(scope="module")
def cosines(pairs: GradedPairs) -> list[float]:
    noise = np.random.default_rng(0).normal(size=len(pairs))
    return [round(score / 5 + 0.3 * float(shift), 2) for score, shift in zip(pairs.scores, noise, strict=True)]


def rank(value: float, values: list[float]) -> float:
    """Percentile rank by counting, independent of scipy's ranks."""
    below, equal = sum(other < value for other in values), sum(other == value for other in values)
    return 100 * (below + (equal - 1) / 2) / (len(values) - 1)


def brute_overlap(first: str, second: str) -> float:
    one, other = (re.split(r"[^a-z0-9_]+", text.lower().strip(" .?!,'\"")) for text in (first, second))
    shared = [word for word in set(one) if word in other]
    return len(shared) / (len(set(one)) + len(set(other)) - len(shared))


def test_strata_equal_a_brute_force(pairs: GradedPairs, cosines: list[float]) -> None:
    properties: dict[str, Callable[[int], float]] = {
        "length": lambda i: (len(re.findall(r"\w+", pairs.first[i])) + len(re.findall(r"\w+", pairs.second[i]))) / 2,
        "overlap": lambda i: brute_overlap(pairs.first[i], pairs.second[i]),
        "gold": lambda i: pairs.scores[i],
    }
    scores = list(pairs.scores)
    found = sts_strata(pairs, cosines)
    assert {stratum.by for stratum in found} == set(properties)
    for by, value in properties.items():
        strata = [stratum for stratum in found if stratum.by == by]
        assert sum(stratum.pairs for stratum in strata) == len(pairs)
        assert [stratum.high for stratum in strata[:-1]] == [stratum.low for stratum in strata[1:]]
        for stratum in strata:
            last = stratum is strata[-1]
            inside = [i for i in range(len(pairs)) if stratum.low <= value(i) < stratum.high + (1e-9 if last else 0)]
            assert len(inside) == stratum.pairs
            errors = [abs(rank(cosines[i], cosines) - rank(scores[i], scores)) for i in inside]
            assert stratum.rank_error == pytest.approx(sum(errors) / len(errors))
            expected = spearmanr([cosines[i] for i in inside], [scores[i] for i in inside]).statistic
            assert stratum.spearman == pytest.approx(100 * expected)


def test_the_worst_pairs_are_those_that_sorting_all_finds(pairs: GradedPairs, cosines: list[float]) -> None:
    scores = list(pairs.scores)
    errors = {i: rank(cosines[i], cosines) - rank(scores[i], scores) for i in range(len(pairs))}
    found = worst_pairs(pairs, cosines, 20)
    assert [pair.error for pair in found] == pytest.approx(
        [errors[i] for i in sorted(errors, key=lambda i: -abs(errors[i]))[:20]]
    )
    for pair in found:
        assert errors[list(pairs.first).index(pair.first)] == pytest.approx(pair.error)
    assert len(worst_pairs(pairs, cosines, 1000)) == len(pairs)


def test_a_perfect_order_has_no_error_and_a_reversed_one_the_largest() -> None:
    """Ranks 0, 50, 100 against 100, 50, 0: the mean absolute difference is 200 / 3."""
    pairs = GradedPairs(["a b", "c d", "e f"], ["a b", "c x", "y z"], [0.0, 2.0, 4.0])
    for cosines, error, correlation in ([0.1, 0.2, 0.3], 0, 100), ([0.3, 0.2, 0.1], 200 / 3, -100):
        (stratum,) = [one for one in sts_strata(pairs, cosines) if one.by == "length"]
        assert (stratum.pairs, stratum.low, stratum.high) == (3, 2, 2)
        assert stratum.rank_error == pytest.approx(error)
        assert stratum.spearman == pytest.approx(correlation)
    assert [(one.label, one.pairs) for one in sts_strata(pairs, [0, 1, 2]) if one.by == "overlap"] == [
        ("0 to 0.2", 1),
        ("0.2 to 0.4", 1),
        ("0.8 to 1", 1),
    ]
    singles = [one for one in sts_strata(pairs, [0, 1, 2]) if one.by == "gold"]
    assert [one.pairs for one in singles] == [1, 1, 1]
    assert all(math.isnan(one.spearman) for one in singles)


def test_equal_values_share_their_rank() -> None:
    assert percentile_ranks(np.array([3.0, 1.0, 3.0, 5.0])).tolist() == pytest.approx([50, 0, 50, 100])


def test_word_overlap_counts_each_word_once_in_any_case() -> None:
    assert word_overlap("The cat, the CAT!", "the dog") == pytest.approx(1 / 3)
    assert word_overlap("...", "!") == 1
    for row in read_rows(asset_path("sts_sample.jsonl")):
        assert word_overlap(row["sentence1"], row["sentence2"]) == word_overlap(row["sentence2"], row["sentence1"])


@pytest.mark.parametrize(
    ("scores", "cosines", "message"),
    [
        ([1.0], [0.5], "too few pairs to correlate: 1"),
        ([], [], "too few pairs to correlate: 0"),
        ([1.0, 2.0], [0.5], "1 cosines for 2 pairs"),
        ([1.0, 2.0, 3.0], [0.5, math.nan, 0.1], "cosine of pair 2 is nan"),
        ([1.0, math.inf, 3.0], [0.5, 0.2, 0.1], "gold score of pair 2 is inf"),
        ([1.0, 1.0, 1.0], [0.5, 0.2, 0.1], "Every gold score is 1"),
        ([1.0, 2.0, 3.0], [0.5, 0.5, 0.5], "Every cosine is 0.5"),
    ],
)
@pytest.mark.parametrize("function", [sts_strata, worst_pairs])
def test_pairs_that_rank_nothing_are_refused(
    function: Callable[..., Any], scores: list[float], cosines: list[float], message: str
) -> None:
    pairs = GradedPairs(["a cat"] * len(scores), ["a dog"] * len(scores), scores)
    with pytest.raises(SempaError, match=message):
        function(pairs, cosines)
