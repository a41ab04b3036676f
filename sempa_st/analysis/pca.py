"""The part ``pca``: NLI sentences on the first two principal components, one panel a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sempa_st.analysis.context import Context
from sempa_st.analysis.part import Cell, Part, PartResult, Picture, Table
from sempa_st.analysis.plotting import new_figure, style
from sempa_st.analysis.vectors import Vectors, check_vectors, unit_blocks

_FEWEST = 20
"""Triplets in the picture, if the share gives fewer."""
_ROLES = ("anchor", "positive", "negative")
_STYLES = (0, 2, 1)
"""Blue, green and vermilion."""
_PANELS = 2
"""Panels side by side."""


def principal_components(
    vectors: Vectors | Sequence[Any], count: int = 2
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Project unit vectors on their first principal components.

    The sign of a component is fixed: its loading of largest absolute value is positive.

    Args:
        vectors: Array of shape (sentences, hidden); each row is divided by its norm.
        count: Number of components, at most the width and the number of rows.

    Returns:
        Coordinates of shape (sentences, count), and each component's share of the variance, of shape (count,); the
        shares are 0 where all vectors are equal.

    Raises:
        SempaError: If there are fewer than ``count`` rows, or one is zero or not finite.
    """
    rows = np.concatenate([block for _, block in unit_blocks(check_vectors(vectors, at_least=max(2, count)))])
    centred = rows.astype(np.float64) - rows.mean(axis=0, dtype=np.float64)
    _, singular, loadings = np.linalg.svd(centred, full_matrices=False)
    loadings = loadings[:count]
    largest = np.abs(loadings).argmax(axis=1)
    loadings = loadings * np.sign(loadings[np.arange(len(loadings)), largest])[:, None]
    variance = np.square(singular)
    shares = variance[:count] / variance.sum() if variance.sum() > len(rows) * 1e-14 else np.zeros(len(loadings))
    return centred @ loadings.T, shares


def run(context: Context) -> PartResult:
    """Draw the NLI sentences of each model."""
    triplets = context.data.sample_triplets(_num_triplets(context), context.settings.seed)
    sides = [[getattr(triplet, side) for triplet in triplets] for side in ("premise", "entailed", "contradicted")]
    sentences = [text for side in sides for text in side]
    points, shares = {}, {}
    for name in context.models:
        points[name], shares[name] = principal_components(context.vectors(name, sentences))
    rows: list[list[Cell]] = [
        [name, index % len(triplets), _ROLES[index // len(triplets)], sentence, float(x), float(y)]
        for name, coordinates in points.items()
        for index, (sentence, (x, y)) in enumerate(zip(sentences, coordinates, strict=True))
    ]
    table = Table(
        "variance",
        "Share of the variance on each of the two components.",
        ("model", "first", "second"),
        [[name, *map(float, numbers)] for name, numbers in shares.items()],
    )
    columns = ("model", "triplet", "role", "sentence", "first", "second")
    return PartResult(
        values={
            "models": {name: {"explained variance": numbers.tolist()} for name, numbers in shares.items()},
            "triplets": len(triplets),
        },
        tables=[table],
        files=[Table("points", "Coordinates of each sentence.", columns, rows)],
        pictures=[_picture(points, shares, len(triplets))],
        notes=[
            f"The sentences of {len(triplets):,} NLI triplets, {len(triplets) / len(context.data.triplets):.1%} of "
            "them, divided by their norms. Each model has its own components; all panels have the same scale. Lines "
            "join an anchor with its positive (what it entails) and its negative (what it contradicts)."
        ],
    )


def _num_triplets(context: Context) -> int:
    total = len(context.data.triplets)
    return min(total, max(_FEWEST, round(context.settings.share * total)))


def _picture(points: dict[str, NDArray[Any]], shares: dict[str, NDArray[Any]], count: int) -> Picture:
    columns = min(_PANELS, len(points))
    lines = math.ceil(len(points) / columns)
    figure = new_figure(4.2 * columns, 4.2 * lines)
    figure.set_layout_engine("compressed")
    panels = figure.subplots(lines, columns, squeeze=False)
    limit = 1.08 * max(float(abs(coordinates).max()) for coordinates in points.values()) or 1.0
    for axes, (name, coordinates) in zip(panels.flat, points.items(), strict=False):
        anchors, *others = (coordinates[role * count : (role + 1) * count] for role in range(len(_ROLES)))
        for index, dashes, side in zip(_STYLES[1:], ("-", ":"), others, strict=True):
            ends = np.stack([anchors, side])
            colour = style(index)["color"]
            axes.plot(ends[:, :, 0], ends[:, :, 1], dashes, color=colour, linewidth=0.7, alpha=0.6, zorder=1)
        for role, index, side in zip(_ROLES, _STYLES, [anchors, *others], strict=True):
            axes.scatter(side[:, 0], side[:, 1], s=18, linewidths=0, label=role, **style(index))
        first, second = shares[name]
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel(f"first component ({first:.1%} of the variance)", fontsize=8)
        axes.set_ylabel(f"second component ({second:.1%})", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in panels.flat[len(points) :]:
        axes.set_visible(False)
    series = panels.flat[0].get_legend_handles_labels()
    figure.legend(*series, loc="outside upper center", ncols=len(_ROLES), fontsize=9)
    return Picture("pca", f"Anchors, positives and negatives of {count:,} NLI triplets on two components.", figure)


PART = Part(
    "pca",
    "NLI sentences on two principal components",
    run,
    needs=("triplets",),
    settings=("share", "seed"),
    steps=lambda context: len(_ROLES) * _num_triplets(context),
)
