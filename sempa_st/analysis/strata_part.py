"""The part ``strata``: where each model ranks STS pairs wrongly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sempa_st.analysis.context import Context
from sempa_st.analysis.part import Part, PartResult, Picture, Table
from sempa_st.analysis.plotting import new_figure, style
from sempa_st.analysis.ranks import checked_gold
from sempa_st.analysis.strata import Stratum, pair_cosines, sts_strata, worst_pairs

_PROPERTIES = {
    "length": "words a sentence",
    "overlap": "word overlap (Jaccard)",
    "gold": "gold score",
}
_MEASURES = {"spearman": "Spearman x 100", "rank_error": "mean rank error"}
_WORST = ("sentence 1", "sentence 2", "gold", "cosine", "gold rank", "cosine rank", "error")


def run(context: Context) -> PartResult:
    """Measure the errors of each model by stratum, and list its worst pairs."""
    pairs = context.data.sample_dev(context.settings.sentences, context.settings.seed)
    checked_gold(pairs)
    strata, worst = {}, {}
    for name in context.models:
        cosines = pair_cosines(*(context.vectors(name, side) for side in (pairs.first, pairs.second)))
        strata[name] = sts_strata(pairs, cosines)
        worst[name] = worst_pairs(pairs, cosines)
    rows = [
        (name, _PROPERTIES[each.by], each.label, each.pairs, _finite(each.spearman), each.rank_error)
        for name, found in strata.items()
        for each in found
    ]
    listed = [
        (name, pair.first, pair.second, pair.gold, pair.cosine, pair.gold_rank, pair.cosine_rank, pair.error)
        for name, found in worst.items()
        for pair in found
    ]
    columns = ("model", "property", "stratum", "pairs", *_MEASURES.values())
    return PartResult(
        values={
            "pairs": len(pairs),
            "strata": [dict(zip(columns, row, strict=True)) for row in rows],
            "worst": [dict(zip(("model", *_WORST), row, strict=True)) for row in listed],
        },
        tables=[
            Table("strata", "Errors by stratum: Spearman within it (higher is better), rank error.", columns, rows, 2),
            Table("worst", "The twenty pairs that each model ranks worst.", ("model", *_WORST), listed, 2),
        ],
        pictures=[_picture(strata)],
        notes=[
            f"On {len(pairs):,} pairs of {context.data.dev_name}. Ranks are those of the cosine and of the gold score "
            "among all pairs, from 0 (lowest) to 100 (highest). The rank error of a pair "
            "is the difference of the two; a random order has a mean of a third, 33.3. Within a stratum the gold "
            "scores differ less, so that its Spearman is lower than that of all pairs."
        ],
    )


def _picture(strata: Mapping[str, Sequence[Stratum]]) -> Picture:
    figure = new_figure(10, 6)
    grid = figure.subplots(len(_MEASURES), len(_PROPERTIES), sharey="row", sharex="col")
    for column, (by, label) in enumerate(_PROPERTIES.items()):
        for row, (measure, title) in enumerate(_MEASURES.items()):
            axes = grid[row, column]
            for index, (name, found) in enumerate(strata.items()):
                values = [getattr(stratum, measure) for stratum in found if stratum.by == by]
                axes.plot(range(len(values)), values, label=name, **style(index))
            axes.grid(alpha=0.3)
            if column == 0:
                axes.set_ylabel(title)
        of_one = [stratum for stratum in next(iter(strata.values())) if stratum.by == by]
        labels = [f"{stratum.low:.3g}\nto {stratum.high:.3g}\nn={stratum.pairs}" for stratum in of_one]
        axes.set_xticks(range(len(of_one)), labels, fontsize=8)
        axes.set_xlabel(label)
        axes.set_xlim(-0.5, len(of_one) - 0.5)
    handles, names = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", fontsize=9, ncols=2)
    caption = "Spearman within each stratum (top) and mean rank error (bottom), by length, word overlap and gold score."
    return Picture("strata", caption, figure)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _steps(context: Context) -> int:
    return 2 * len(context.data.sample_dev(context.settings.sentences, context.settings.seed))


PART = Part("strata", "STS errors by stratum", run, needs=("dev",), settings=("sentences", "seed"), steps=_steps)
