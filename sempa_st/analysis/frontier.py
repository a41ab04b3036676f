"""The frontier: how good a model's embeddings are against how well it still generates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sempa_st.analysis.curve import run_curve
from sempa_st.analysis.plotting import styles
from sempa_st.analysis.records import Records, unique
from sempa_st.errors import SempaError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PERPLEXITY = "word perplexity"
TRAINED = "sempa"
"""What ``sempa generation`` labels a trained model with; a base has the name of its template."""
_WIDE_NAME = 40
"""Characters of a name beyond which the legend has one column."""
BAR = 2.0
"""Rise of the perplexity, in per cent, that is marked in the picture."""


@dataclass(frozen=True)
class FrontierPoint:
    """A model's scores for embeddings and for generation.

    Args:
        name: Name of the model.
        sts: Spearman correlation times 100.
        perplexity: Word perplexity of WikiText-2, above 0; None if it was not measured.
        rise: Rise of the perplexity over the base's, in per cent; None without the base.
        accuracy: Mean of the tasks that are scored by a share, times 100; None if there is none.
        is_base: Whether it is the base.
    """

    name: str
    sts: float
    perplexity: float | None
    rise: float | None
    accuracy: float | None
    is_base: bool


def frontier_points(records: Records) -> tuple[str, list[FrontierPoint]]:
    """Set STS beside generation for each model that has both.

    The STS score is that of these which most models have: the mean of the seven test sets, STS-B dev of ``evaluate``,
    or the dev score of the checkpoint that training kept, and of its base before training.

    Args:
        records: Records of ``sempa generation`` with those of ``sempa evaluate``, ``table`` or ``train``.

    Returns:
        What the STS score is, and the points in the order of the generation records.

    Raises:
        SempaError: If no model has both, two were measured on different documents or dev pairs, or two are bases.
    """
    names = list(records.generation)
    label, scores = max(_sts_scores(records, names), key=lambda kind: len(kind[1]))
    both = [name for name in names if name in scores]
    if not both:
        raise SempaError(
            "No model has both STS and generation scores. Pass JSON files of sempa generation and of sempa evaluate, "
            f"with the same models. Models with generation scores: {', '.join(names) or 'none'}."
        )
    tasks = [_documents(records.generation[name]) for name in both]
    unique(tasks, "list of tasks with their documents and shots", both)
    bases = [name for name in both if records.methods[name] != TRAINED]
    if len(bases) > 1:
        raise SempaError(f"These are two bases, where a model is compared with one: {', '.join(bases)}.")
    base = _perplexity(records.generation[bases[0]]) if bases else None
    return label, [_point(name, scores[name], records.generation[name], base, name in bases) for name in both]


def _sts_scores(records: Records, names: Sequence[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name of each kind of STS score, and the scores by model."""
    averages = {name: records.sts_average(name) for name in names}
    yield "mean of the seven sets", {name: score for name, score in averages.items() if score is not None}
    cell = ("STSBenchmark", "dev", "mteb")
    yield "STS-B dev", {name: records.sts[name][cell] for name in names if cell in records.sts.get(name, {})}
    curves = {name: run_curve(name, records.runs[name]) for name in names if name in records.runs}
    if curves:
        source, pairs = unique([curve.dev for curve in curves.values()], "set of dev pairs", list(curves))
        untrained = {name: next(iter(curves.values())).base for name in names if records.methods[name] != TRAINED}
        kept = {name: curve.scores[curve.kept] for name, curve in curves.items()}
        yield f"dev ({source}, {pairs:,} pairs)", untrained | kept


def _point(
    name: str, sts: float, scores: Sequence[Mapping[str, Any]], base: float | None, is_base: bool
) -> FrontierPoint:
    perplexity = _perplexity(scores)
    shares = [score["score"] for score in scores if score["percent"]]
    return FrontierPoint(
        name,
        sts,
        perplexity,
        None if perplexity is None or base is None else perplexity_rise(perplexity, base),
        sum(shares) / len(shares) if shares else None,
        is_base,
    )


def perplexity_rise(perplexity: float, base: float) -> float:
    """Return by how many per cent a perplexity is above the base's.

    Raises:
        SempaError: If one of them is not above 0.

    >>> perplexity_rise(51.0, 50.0)
    2.0
    """
    if not (perplexity > 0 and base > 0):
        raise SempaError(f"The perplexities are {perplexity} and, of the base, {base}. Expected numbers above 0.")
    return 100 * (perplexity - base) / base


def _perplexity(scores: Sequence[Mapping[str, Any]]) -> float | None:
    return next((score["score"] for score in scores if score["metric"] == PERPLEXITY), None)


def _documents(scores: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, int]]:
    return sorted({(score["task"], score["n"], score["shots"]) for score in scores})


def draw_frontier(axes: Axes, points: Sequence[FrontierPoint], label: str, models: Iterable[str] = ()) -> None:
    """Draw the STS score over the rise of the perplexity, with the bar of 2 per cent and the base's score.

    Args:
        axes: Axes to draw on.
        points: Points with a rise.
        label: What the STS score is.
        models: Names of the report's models, for their colours.
    """
    looks = styles((point.name for point in points), models)
    for point in points:
        look = {"s": 90, "edgecolors": "white", "linewidths": 0.5, **looks[point.name]}
        axes.scatter(point.rise, point.sts, label=point.name, **look)  # type: ignore[arg-type]
    axes.axvline(BAR, linestyle="--", color="grey", linewidth=1)
    for base in (point for point in points if point.is_base):
        axes.axhline(base.sts, linestyle=":", color="grey", linewidth=1)
    axes.set_xlabel(f"rise of the WikiText-2 perplexity in % (dashed: {BAR:g} %)")
    axes.set_ylabel(f"Spearman x 100, {label}")
    axes.grid(alpha=0.3)
    columns = 1 if max(len(point.name) for point in points) > _WIDE_NAME else 2
    axes.figure.legend(loc="outside lower center", fontsize=8, ncols=columns)
