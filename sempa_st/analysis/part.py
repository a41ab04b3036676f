"""The interface of a part of an analysis: a measure or picture of several models, side by side.

A part is a function of a :class:`~sempa_st.analysis.context.Context`, and an entry of
:data:`sempa_st.analysis.registry.PARTS`::

    def run(context: Context) -> PartResult:
        sentences = context.data.sentences(context.settings.sentences, context.settings.seed)
        rows = []
        for name in context.models:
            vectors = context.vectors(name, sentences)  # encoded once, whichever part asks first
            rows.append((name, uniformity(vectors)))
        return PartResult(
            values={name: {"uniformity": value} for name, value in rows},
            tables=[Table("uniformity", "Uniformity (lower is better)", ("model", "uniformity"), rows)],
        )

    PART = Part("uniformity", "Uniformity", needs=("triplets", "sts"), settings=("seed", "sentences"), run=run)

The framework does the rest: the progress bar, the files, the report, and skipping a part that is finished. A part is
computed again when its models, the data that it ``needs``, the ``settings`` that it reads, or the version of the
package differ. A model that lacks something, such as an LM head or a training record, is left out of the part, with a
sentence in ``notes``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from sempa_st.analysis.context import Context

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A table of a part, written as CSV and shown in the report.

    Args:
        name: Stem of its file, such as ``geometry``.
        caption: One sentence, with units and which direction is better.
        columns: Names of the columns.
        rows: Cells, one sequence a row; None is an empty cell.
        decimals: Digits after the point in the report; the file has all of them.
    """

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    decimals: int = 3


@dataclass(frozen=True)
class Picture:
    """A picture of a part, written as PNG and shown in the report.

    Args:
        name: Stem of its file, such as ``pca``.
        caption: One sentence that says what is seen; it is the picture's text for screen readers too.
        figure: Figure of matplotlib, from :func:`sempa_st.analysis.plotting.new_figure`.
    """

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class PartResult:
    """What a part found.

    Args:
        values: JSON value with string keys: every number of the tables, for programs.
        tables: Tables, in the order of the report.
        files: Tables that are only written as files, for being long.
        pictures: Pictures, in the order of the report.
        notes: Sentences under them: what was measured on what, and what was left out.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    files: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """A part of an analysis.

    Args:
        name: What ``--only`` calls it, and its folder in the output.
        title: Heading in the report, and name of the progress bar.
        run: Function that computes it.
        needs: Data that it reads: any of ``triplets`` (NLI), ``sts`` (test), ``dev`` (STS-B), ``corpus``,
            ``records``. Missing data are refused before the first part is run.
        settings: Names of the fields of :class:`~sempa_st.analysis.settings.AnalysisSettings` that it reads.
        steps: Steps of the progress bar for one model, such as the number of sentences. ``context.vectors`` advances it
            by one step a sentence; ``context.advance`` by the other steps. Unknown when None.
        check: Raises :class:`SempaError` if it cannot run; called before the first part is run.
        by_name: Whether it runs only when asked for by its name, since it takes long.
    """

    name: str
    title: str
    run: Callable[[Context], PartResult]
    needs: Sequence[str] = ()
    settings: Sequence[str] = ()
    steps: Callable[[Context], int] | None = None
    check: Callable[[Context], None] | None = None
    by_name: bool = False
