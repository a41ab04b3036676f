"""The part ``templates``: trains each pair of templates, so it runs only when asked for by name."""

from __future__ import annotations

from sempa_st.analysis.context import AnalyzedModel, Context
from sempa_st.analysis.data import SAMPLE, TRIPLETS_FILE
from sempa_st.analysis.part import Part, PartResult, Picture, Table
from sempa_st.analysis.plotting import new_figure
from sempa_st.analysis.templates import TemplateCell, draw_matrix, run_matrix, template_cells, template_configs
from sempa_st.errors import SempaError
from sempa_st.utils.extras import require

_COLUMNS = ("base", "paraphrase", "template", "runs", "mean", "sd", "untrained", "change")


def check(context: Context) -> None:
    """Raise :class:`SempaError` if there is no base to train, or a package to train with is missing."""
    require("optuna", "trl", "datasets", extra="train", purpose="The part templates")
    if not _bases(context):
        raise SempaError(
            f"The part templates trains a base, and these are none: {', '.join(context.models)}. Name one, such as "
            "gemma3-270m."
        )


def _bases(context: Context) -> list[AnalyzedModel]:
    return [model for model in context.models.values() if model.source.kind == "base" and model.method is None]


def run(context: Context) -> PartResult:
    """Train and score the matrix of each base among the models; finished runs of an earlier call are kept."""
    matrices = {base.name: _matrix(context, base) for base in _bases(context)}
    rows = [
        (
            name,
            cell.paraphrase,
            cell.template,
            len(cell.scores),
            cell.mean,
            cell.deviation,
            cell.base,
            cell.mean - cell.base,
        )
        for name, cells in matrices.items()
        for cell in cells
    ]
    settings = context.settings
    caption = "Dev scores after DPO (Spearman x 100, higher is better): mean and standard deviation over the seeds."
    return PartResult(
        values={"cells": [dict(zip(_COLUMNS, row, strict=True)) for row in rows]},
        tables=[Table("templates", caption, _COLUMNS, rows, 2)],
        pictures=[_picture(name, cells) for name, cells in matrices.items()],
        notes=[
            f"Each run: DPO on {settings.cell_triplets:,} triplets, drawn by its seed, with an adapter on the upper "
            f"third of the layers, rate 2e-5, batch 16; scored on {_num_pairs(context):,} pairs of "
            f"{context.data.dev_name} after its last step. Differences below the standard deviation say nothing. In "
            "brackets: the change from the untrained base."
        ],
    )


def _num_pairs(context: Context) -> int:
    return min(context.settings.cell_pairs, len(context.data.dev))


def _matrix(context: Context, base: AnalyzedModel) -> list[TemplateCell]:
    settings, data = context.settings, context.data
    folder = context.kept / "templates" / base.name
    configs = template_configs(
        base.model,
        str(data.folder / TRIPLETS_FILE) if data.folder else SAMPLE,
        folder,
        data.sample_dev(2 * settings.cell_pairs, settings.seed),
        triplets=settings.cell_triplets,
        seeds=range(settings.seed, settings.seed + settings.cell_seeds),
        dtype=settings.dtype,
        device=settings.device,
    )
    return template_cells(run_matrix(configs, folder))


def _picture(name: str, cells: list[TemplateCell]) -> Picture:
    figure = new_figure(7, 5.5)
    axes = figure.subplots()
    draw_matrix(axes, cells)
    axes.set_title(name)
    return Picture(f"templates-{name}", f"{name}: dev score after DPO by paraphrase and embedding template.", figure)


PART = Part(
    "templates",
    "Template matrix",
    run,
    needs=("dev", "triplets"),
    settings=("cell_triplets", "cell_seeds", "cell_pairs", "seed"),
    check=check,
    by_name=True,
)
