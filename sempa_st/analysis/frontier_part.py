"""The part ``frontier``: STS against generation, from the records of ``sempa generation``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

from sempa_st.analysis.context import Context
from sempa_st.analysis.frontier import FrontierPoint, draw_frontier, frontier_points
from sempa_st.analysis.part import Part, PartResult, Picture, Table
from sempa_st.analysis.plotting import new_figure


def run(context: Context) -> PartResult:
    """Set STS beside generation for each model that has records of both."""
    records = context.data.records
    if not records.generation:
        return PartResult(notes=["No generation scores. Pass JSON files of sempa generation with --records."])
    label, points = _points(context)
    rows = [(point.name, point.sts, point.perplexity, point.rise, point.accuracy) for point in points]
    columns = ("model", label, "word perplexity", "rise in %", "mean accuracy")
    drawn = [point for point in points if point.rise is not None]
    notes = ["Perplexity: lower is better. Accuracy: the mean of the tasks that are scored by a share."]
    left_out = [name for name in records.generation if name not in {point.name for point in points}]
    if left_out:
        notes.append(f"Left out, without an STS score of this kind: {', '.join(left_out)}.")
    if not drawn:
        notes.append("No picture: it needs the perplexity of WikiText-2 of a model and of its base.")
    return PartResult(
        values={"sts": label, "points": [asdict(point) for point in points]},
        tables=[Table("frontier", "Embeddings (higher is better) against generation.", columns, rows, 2)],
        pictures=[_picture(drawn, label, context.models)] if drawn else [],
        notes=notes,
    )


def check(context: Context) -> None:
    """Raise :class:`SempaError` if there are generation scores, and none of them can be set beside an STS score."""
    if context.data.records.generation:
        _points(context)


def _points(context: Context) -> tuple[str, list[FrontierPoint]]:
    records = context.data.records
    own = {name: record for name, model in context.models.items() if (record := model.source.folder.record)}
    return frontier_points(replace(records, runs=own | records.runs))


def _picture(points: Sequence[FrontierPoint], label: str, models: Iterable[str]) -> Picture:
    figure = new_figure(7, 4.5 + 0.2 * len(points))
    draw_frontier(figure.subplots(), points, label, models)
    return Picture("frontier", "STS over the rise of the perplexity; towards the upper left is better.", figure)


PART = Part("frontier", "Embedding against generating", run, needs=("records",), check=check)
