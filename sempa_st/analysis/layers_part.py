"""The part ``layers``: the score of the embedding read at each layer, a trained model beside its base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

from sempa_st.analysis.context import Context
from sempa_st.analysis.layers import LayerCurve, layer_curve, without_adapter
from sempa_st.analysis.part import Part, PartResult, Picture, Table
from sempa_st.analysis.plotting import new_figure, styles
from sempa_st.data.sts import GradedPairs
from sempa_st.folder.resolve import adapter_base
from sempa_st.forward.sentence_transformers import reads_prompt_eol


def run(context: Context) -> PartResult:
    """Score each layer of each model that is read under its template."""
    pairs = context.data.sample_dev(context.settings.sentences, context.settings.seed)
    curves: list[LayerCurve] = []
    left_out: list[str] = []
    for name in context.models:
        found = _curves(context, name, pairs)
        curves += found
        left_out += [] if found else [name]
    notes = [
        f"On {len(pairs):,} pairs of {context.data.dev_name}: the last token's hidden "
        "state after each layer. The last one has the final norm, and is the model's own embedding; the inner ones are "
        "without it, as in --method prompteol:layer=N."
    ]
    if left_out:
        notes.append(f"Left out, since they are not read under an embedding template: {', '.join(left_out)}.")
    if not curves:
        return PartResult(notes=notes)
    deepest = max(len(curve.scores) for curve in curves)
    rows = [(layer, *(_cell(curve, layer) for curve in curves)) for layer in range(1, deepest + 1)]
    columns = ("layer", *(curve.name for curve in curves))
    return PartResult(
        values={
            curve.name: {
                "scores": [_cell(curve, layer + 1) for layer in range(len(curve.scores))],
                "best layer": curve.best,
            }
            for curve in curves
        },
        tables=[Table("layers", "Spearman x 100 by layer (higher is better).", columns, rows, 2)],
        pictures=[_picture(curves, context.models)],
        notes=notes,
    )


def _curves(context: Context, name: str, pairs: GradedPairs) -> list[LayerCurve]:
    """Return a model's curve, and its base's if the base is none of the models; none if it has no template."""
    model = context.load(name)  # here: a reference kept in the loop would keep two models in memory
    if not reads_prompt_eol(model):
        return []
    keep = partial(context.keep, name)  # of the same pairs, `strata` reads the embeddings
    curves = [layer_curve(name, model, pairs, report=context.advance, keep=keep)]
    if (off := without_adapter(model)) is not None and not _base_is_given(context, name):
        with off:
            curves.append(layer_curve(f"{name}, adapter off", model, pairs))
    return curves


def _base_is_given(context: Context, name: str) -> bool:
    """Whether the base of a model's adapter is among the models, so that one curve is enough."""
    base = adapter_base(context.models[name].source.folder).folder.resolve()
    given = (model.source.folder.path for model in context.models.values() if model.method is None)
    return any(path.resolve() == base for path in given)


def _cell(curve: LayerCurve, layer: int) -> float | None:
    score = curve.scores[layer - 1] if layer <= len(curve.scores) else math.nan
    return score if math.isfinite(score) else None


def _picture(curves: Sequence[LayerCurve], models: Iterable[str]) -> Picture:
    from matplotlib.ticker import MaxNLocator

    figure = new_figure()
    axes = figure.subplots()
    looks = styles((curve.name for curve in curves), models)
    for curve in curves:
        line = "--" if curve.name.endswith("adapter off") else "-"
        axes.plot(range(1, len(curve.scores) + 1), curve.scores, line, label=curve.name, **looks[curve.name])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer (the last one with the final norm)")
    axes.set_ylabel("Spearman x 100")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper center", fontsize=9, ncols=2)
    return Picture("layers", "Spearman of the embedding read at each layer, first to last.", figure)


def _steps(context: Context) -> int:
    return len(context.data.sample_dev(context.settings.sentences, context.settings.seed))


PART = Part("layers", "Layer by layer", run, needs=("dev",), settings=("sentences", "seed"), steps=_steps)
