"""Plain-text tables for the end of a command."""

from __future__ import annotations

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out rows under a header; numbers are set right, floats with two places.

    >>> print(table(["task", "score"], [["STS12", 61.5], ["average", 7]]))
    task     score
    -------  -----
    STS12    61.50
    average      7
    """
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    numeric = [all(isinstance(row[index], int | float) for row in rows) for index in range(len(header))]
    lines = [header, ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )
