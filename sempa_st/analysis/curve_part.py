"""The part ``curve``: scores over the number of training triplets, from run records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sempa_st.analysis.context import Context
from sempa_st.analysis.curve import RunCurve, run_curves, size_curves
from sempa_st.analysis.part import Part, PartResult, Picture, Table
from sempa_st.analysis.plotting import new_figure, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def run(context: Context) -> PartResult:
    """Show the curve of each run record: of the models, and of the records given."""
    records = context.data.records
    own = {name: record for name, model in context.models.items() if (record := model.source.folder.record)}
    records = replace(records, runs=own | records.runs)
    if not records.runs:
        return PartResult(notes=["No run record: none of the models has one. Pass run folders with --records."])
    curves = run_curves(records)
    points = [
        (curve.name, samples, score, "kept" if index == curve.kept else None)
        for curve in curves
        for index, (samples, score) in enumerate(zip(curve.samples, curve.scores, strict=True))
    ]
    columns = ("run", "triplets seen", "dev of the base", "kept at", "dev", "seven STS sets")
    runs = [
        (curve.name, curve.samples[-1], curve.base, curve.samples[curve.kept], curve.scores[curve.kept], curve.average)
        for curve in curves
    ]
    source, pairs = curves[0].dev
    notes = [f"Spearman x 100 on the dev pairs {source!r} ({pairs:,}), as each run measured it while it trained."]
    averaged = [name for name, record in records.runs.items() if record.get("averaged")]
    if averaged:
        notes.append(f"The mean of several runs, whose record is that of the first one: {', '.join(averaged)}.")
    return PartResult(
        values={
            "runs": [dict(zip(columns, row, strict=True)) for row in runs],
            "points": [dict(zip(("run", "triplets", "dev", "kept"), row, strict=True)) for row in points],
        },
        tables=[
            Table("runs", "The checkpoint that each run kept (higher is better).", columns, runs, 2),
            Table("curve", "Every checkpoint.", ("run", "triplets seen", "dev", ""), points, 2),
        ],
        pictures=[_picture(curves, context.models)],
        notes=notes,
    )


def _picture(curves: Sequence[RunCurve], models: Iterable[str]) -> Picture:
    known = [curve for curve in curves if curve.average is not None]
    figure = new_figure(11 if known else 7, 4.8)
    panels = figure.subplots(1, 2 if known else 1, squeeze=False, sharex=True)[0]
    draw_curves(panels[0], curves, models)
    if known:
        looks = styles((curve.name for curve in curves), models)
        for curve in known:
            panels[1].plot(curve.samples[curve.kept], curve.average, linestyle="", **looks[curve.name])
        panels[1].margins(y=0.3)
        _label(panels[1], "mean of the seven STS sets, Spearman x 100", curves)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", fontsize=9, ncols=2)
    caption = "Scores over the number of training triplets, on a logarithmic axis; rings are the kept checkpoints."
    return Picture("curve", caption, figure)


def draw_curves(axes: Axes, curves: Sequence[RunCurve], models: Iterable[str] = ()) -> None:
    """Draw the dev score of runs over the triplets seen, the kept one of several checkpoints in a ring, and the bases.

    Runs that differ in the number of triplets alone are joined by a grey line through their kept checkpoints.

    Args:
        axes: Axes to draw on.
        curves: The runs.
        models: Names of the report's models, for their colours.
    """
    looks = styles((curve.name for curve in curves), models)
    for curve in curves:
        axes.plot(curve.samples, curve.scores, label=curve.name, **looks[curve.name])
        if len(curve.samples) == 1:
            continue
        ring: dict[str, Any] = {"markersize": 12, "fillstyle": "none", "color": looks[curve.name]["color"]}
        axes.plot(curve.samples[curve.kept], curve.scores[curve.kept], "o", **ring)
    for base in {round(curve.base): curve.base for curve in curves}.values():
        axes.axhline(base, linestyle=":", color="grey", linewidth=1)
    for group in size_curves(curves):
        points = [(curve.samples[curve.kept], curve.scores[curve.kept]) for curve in group]
        axes.plot(*zip(*points, strict=True), linestyle="--", color="grey", zorder=0)
    _label(axes, f"dev ({curves[0].dev[0]}), Spearman x 100 (dotted: base)", curves)


def spaced(values: Iterable[int]) -> list[int]:
    """Return some of the values, the largest among them, that are a tenth of the logarithmic axis apart.

    >>> spaced([250, 500, 510, 1000])
    [250, 510, 1000]
    """
    ordered = sorted(values, reverse=True)
    distance = (ordered[0] / ordered[-1]) ** 0.1
    kept = ordered[:1]
    for value in ordered[1:]:
        if kept[-1] / value >= distance > 1:
            kept.append(value)
    return kept[::-1]


def _label(axes: Axes, title: str, curves: Sequence[RunCurve]) -> None:
    ticks = spaced({samples for curve in curves for samples in curve.samples})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("training triplets")
    axes.set_ylabel(title)
    axes.grid(alpha=0.3)


PART = Part("curve", "Data size", run, needs=("records",))
