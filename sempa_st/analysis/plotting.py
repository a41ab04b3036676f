"""Figures for screen, print and colour-blind readers: Okabe and Ito's colours, and a marker for each series."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
"""Okabe and Ito's colours; the first ones differ most in lightness, and yellow comes last on white."""
MARKERS = "o^sDvPX*"
_DPI = 160


def style(index: int) -> dict[str, Any]:
    """Return colour and marker of a series, as keyword arguments of ``Axes.plot`` and ``Axes.scatter``."""
    turn = index // len(COLOURS)  # so that the ninth differs from the first
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + turn) % len(MARKERS)]}


def styles(names: Iterable[str], models: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Return the style of each series by its name; a model has that of its place, in every picture of a report.

    Args:
        names: Names of the series in a picture.
        models: Names of all models of the report, in order.

    >>> styles(["b"], ["a", "b"])["b"] == style(1)
    True
    """
    order = dict.fromkeys([*models, *names])
    return {name: style(index) for index, name in enumerate(order)}


def new_figure(width: float = 7.0, height: float = 4.5) -> Figure:
    """Return an empty figure; sizes in inches. It is not registered in pyplot, and needs no display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, the same bytes for the same figure."""
    figure.savefig(path, dpi=_DPI, format="png", metadata={"Software": None})


def data_uri(path: Path) -> str:
    """Return a PNG file as the address of an inline picture."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
