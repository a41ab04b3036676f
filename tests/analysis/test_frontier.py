from __future__ import annotations

import copy
from typing import Any

import pytest
from matplotlib.figure import Figure

from sempa_st.analysis.frontier import FrontierPoint, draw_frontier, frontier_points, perplexity_rise
from sempa_st.analysis.plotting import style
from sempa_st.analysis.records import Records
from sempa_st.data.sts import STS_TASKS
from sempa_st.errors import SempaError


def generation(perplexity: float | None, *accuracies: float, n: int = 8) -> list[dict[str, Any]]:
    scores = [
        {"task": f"task{number}", "metric": "accuracy", "n": 100, "shots": 5, "score": score, "percent": True}
        for number, score in enumerate(accuracies)
    ]
    if perplexity is not None:
        words = {"task": "wikitext", "metric": "word perplexity", "n": n, "shots": 0, "percent": False}
        scores += [{**words, "score": perplexity}, {**words, "metric": "token perplexity", "score": 1.0}]
    return scores


def run(base: float, kept: float) -> dict[str, Any]:
    rows = [
        {"step": 0, "samples": 0, "spearman": base},
        {"step": 1, "samples": 4, "spearman": kept},
        {"step": 2, "samples": 8, "spearman": 1.0},
    ]
    return {"dev": {"source": "stsb", "pairs": 9, "scores": rows}, "best_step": 1, "config": {}}


@pytest.fixture
def records() -> Records:
    return Records(
        generation={"base": generation(50.0, 30.0, 40.0), "tuned": generation(51.0, 20.0, 40.0)},
        methods={"base": "prompteol", "tuned": "sempa"},
        runs={"tuned": run(60.0, 70.0)},
    )


def test_points_have_the_rise_and_the_mean_accuracy(records: Records) -> None:
    label, points = frontier_points(records)
    assert label == "dev (stsb, 9 pairs)"
    assert points == [
        FrontierPoint("base", 60.0, 50.0, 0.0, 35.0, True),
        FrontierPoint("tuned", 70.0, 51.0, pytest.approx(2.0), 30.0, False),
    ]


def test_the_kind_of_score_that_most_models_have_is_taken(records: Records) -> None:
    records.sts["base"] = {("STSBenchmark", "dev", "mteb"): 61.0}
    assert [point.sts for point in frontier_points(records)[1]] == [60.0, 70.0]
    records.sts["tuned"] = {("STSBenchmark", "dev", "mteb"): 71.0}
    label, points = frontier_points(records)
    assert (label, [point.sts for point in points]) == ("STS-B dev", [61.0, 71.0])
    for name, score in (("base", 64.0), ("tuned", 74.0)):
        records.sts[name] |= {(task, "test", "senteval"): score for task in STS_TASKS}
    label, points = frontier_points(records)
    assert (label, [point.sts for point in points]) == ("mean of the seven sets", [64.0, 74.0])


def test_without_a_base_or_a_perplexity_there_is_no_rise(records: Records) -> None:
    alone = copy.deepcopy(records)
    del alone.generation["base"]
    (point,) = frontier_points(alone)[1]
    assert (point.perplexity, point.rise, point.accuracy) == (51.0, None, 30.0)
    records.generation = {"base": generation(None, 30.0), "tuned": generation(None, 20.0)}
    assert [(point.perplexity, point.rise) for point in frontier_points(records)[1]] == [(None, None)] * 2


def test_scores_that_cannot_be_compared_are_refused(records: Records) -> None:
    other = copy.deepcopy(records)
    other.generation["tuned"] = generation(51.0, 20.0, 40.0, n=62)
    with pytest.raises(SempaError, match=r"documents and shots of tuned .*62.*cannot be compared"):
        frontier_points(other)
    two = copy.deepcopy(records)
    two.methods["tuned"] = "prompteol"
    with pytest.raises(SempaError, match=r"two bases, .*: base, tuned"):
        frontier_points(two)
    records.runs.clear()
    with pytest.raises(SempaError, match=r"No model has both .*: base, tuned"):
        frontier_points(records)


@pytest.mark.parametrize(("perplexity", "base"), [(0.0, 50.0), (50.0, 0.0), (float("nan"), 50.0)])
def test_a_perplexity_that_is_none_is_refused(perplexity: float, base: float) -> None:
    with pytest.raises(SempaError, match="Expected numbers above 0"):
        perplexity_rise(perplexity, base)


def test_each_point_of_the_picture_looks_different(records: Records) -> None:
    points = [FrontierPoint(f"model {i}", 60.0 + i, 50.0 + i, 2.0 * i, None, i == 0) for i in range(16)]
    axes = Figure().subplots()
    draw_frontier(axes, points, "STS-B dev")
    drawn = [collection.get_offsets()[0].tolist() for collection in axes.collections]
    assert drawn == [[point.rise, point.sts] for point in points]
    assert len({tuple(style(index).values()) for index in range(16)}) == 16
    assert {tuple(line.get_xdata()) for line in axes.lines} == {(2.0, 2.0), (0, 1)}
