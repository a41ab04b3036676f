"""Plain-text tables for the end of a command."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out rows under a header; numbers are set right, floats with two places.

    >>> print(table(["task", "score"], [["STS12", 61.5], ["average", 7]]))
    task       score
    -------  -------
    STS12      61.50
    average        7
    """
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    numeric = [all(isinstance(row[index], int | float) for row in rows) for index in range(len(header))]
    align = ["right" if right else "left" for right in numeric]
    # Cells are text by now, and stay as they are even where they look like numbers.
    return tabulate(cells, list(header), tablefmt="simple", colalign=align, disable_numparse=True)
