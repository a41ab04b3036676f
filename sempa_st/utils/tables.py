"""Plain-text tables for the output of commands."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate


def table(header: Sequence[str], rows: Sequence[Sequence[object]], style: str = "simple") -> str:
    """Format rows under a header; numbers are aligned right, floats have two decimals; None is left empty.

    Args:
        header: Name of each column.
        rows: Cells of each row.
        style: Format of tabulate, such as ``simple`` or ``pipe`` (Markdown).

    >>> print(table(["task", "score"], [["STS12", 61.5], ["average", 7]]))
    task       score
    -------  -------
    STS12      61.50
    average        7
    """
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    columns = [[row[index] for row in rows] for index in range(len(header))]
    align = ["right" if all(isinstance(cell, int | float | None) for cell in column) else "left" for column in columns]
    # The cells are formatted already; tabulate must not parse them as numbers again.
    return tabulate(cells, list(header), tablefmt=style, colalign=align, disable_numparse=True)
