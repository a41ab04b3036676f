"""The part ``geometry``: uniformity and alignment, isotropy, effective rank and mean cosine of each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sempa_st.analysis.context import Context
from sempa_st.analysis.geometry import alignment, effective_rank, isotropy, mean_cosine, spectrum, uniformity
from sempa_st.analysis.part import Cell, Part, PartResult, Picture, Table
from sempa_st.analysis.plotting import new_figure, style

_COLUMNS = ("uniformity", "alignment", "isotropy", "effective rank", "mean cosine", "width")
_PAIRS = 10
"""Sentences of the corpus for each positive pair."""


def run(context: Context) -> PartResult:
    """Measure the geometry of each model."""
    settings = context.settings
    sentences = context.data.sentences(settings.sentences, settings.seed)
    triplets = context.data.sample_triplets(_num_pairs(context), settings.seed)
    values: dict[str, dict[str, float]] = {}
    for name in context.models:
        first = context.vectors(name, [triplet.premise for triplet in triplets])
        second = context.vectors(name, [triplet.entailed for triplet in triplets])
        vectors = context.vectors(name, sentences)
        eigenvalues, directions = spectrum(vectors)
        measured = (
            uniformity(vectors, advance=context.advance),
            alignment(first, second),
            isotropy(vectors, directions),
            effective_rank(eigenvalues),
            mean_cosine(vectors),
            vectors.shape[1],
        )
        values[name] = dict(zip(_COLUMNS, measured, strict=True))
    caption = (
        "Uniformity and alignment: lower is better. Isotropy and effective rank: higher is more evenly spread. Mean "
        "cosine: of two different sentences, 0 if evenly spread."
    )
    rows: list[list[Cell]] = [[name, *numbers.values()] for name, numbers in values.items()]
    return PartResult(
        values={"models": values, "sentences": len(sentences), "pairs": len(triplets)},
        tables=[Table("geometry", caption, ("model", *_COLUMNS), rows)],
        pictures=[_picture(values)],
        notes=_notes(len(sentences), len(triplets)),
    )


def _num_pairs(context: Context) -> int:
    return max(1, context.settings.sentences // _PAIRS)


def _steps(context: Context) -> int:
    sentences = min(context.settings.sentences, len(context.data.corpus))
    return 2 * sentences + 2 * min(_num_pairs(context), len(context.data.triplets))


def _picture(values: Mapping[str, Mapping[str, float]]) -> Picture:
    figure = new_figure()
    axes = figure.subplots()
    for index, (name, numbers) in enumerate(values.items()):
        axes.scatter(numbers["uniformity"], numbers["alignment"], s=80, label=name, **style(index))
    axes.set_xlabel("uniformity (lower is better)")
    axes.set_ylabel("alignment (lower is better)")
    axes.margins(0.15)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return Picture("geometry", "Alignment over uniformity of each model; towards the lower left is better.", figure)


def _notes(sentences: int, pairs: int) -> Sequence[str]:
    return (
        f"On {sentences:,} distinct sentences, divided by their norms. Uniformity is log E exp(-2|x-y|²) over all "
        f"{sentences * (sentences - 1) // 2:,} unordered pairs of two different sentences, and the mean cosine is over "
        f"the same pairs; alignment is the mean squared distance of {pairs:,} premises and what they entail.",
        "Isotropy is min Z(u) / max Z(u) over the eigenvectors u of VᵀV, with both signs, where Z(u) sums exp(u·v) "
        "over the sentences (Mu and Viswanath). Effective rank is the exponential of the entropy of the singular "
        "values; it is at most the width, and at most the number of sentences.",
    )


PART = Part(
    "geometry",
    "Geometry of the embeddings",
    run,
    needs=("triplets", "corpus"),
    settings=("sentences", "seed"),
    steps=_steps,
)
