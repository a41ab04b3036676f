"""The report: one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from sempa_st.analysis.part import Cell
from sempa_st.analysis.plotting import data_uri
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import write_text

_MOST_ROWS = 8
"""Rows that one cell may cover."""


def write_report(path: Path, results: Sequence[dict[str, Any]], parts: Path, summary: dict[str, Any]) -> None:
    """Write the report of finished parts, as one file.

    Args:
        path: HTML file to write.
        results: Record of each part.
        parts: Folder with the folders of the parts, where their pictures lie.
        summary: Content of ``results.json``.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(asset_path("")), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals |= {
        "cell": shown,
        "spans": spans,
        "picture": lambda part, name: data_uri(parts / part / f"{name}.png"),
    }
    page = environment.get_template("report.html").render(results=results, summary=summary)
    write_text(path, page + "\n")


def spans(rows: Sequence[Sequence[Cell]]) -> list[int]:
    """Return of each row how many rows its first cell covers, 0 where that of a row above does.

    Only a text that a few rows in a row begin with is written once, so that it is in sight of all of them.

    >>> spans([["A cat.", 1], ["A cat.", 2], ["Why?", 3], [0.5, 4], [0.5, 5]])
    [2, 0, 1, 1, 1]
    """
    covered: list[int] = []
    for value, equal in groupby(row[0] for row in rows):
        count = len(list(equal))
        covered += [count, *[0] * (count - 1)] if isinstance(value, str) and count <= _MOST_ROWS else [1] * count
    return covered


def shown(value: Cell, decimals: int) -> str:
    """Return a cell as the report shows it.

    >>> [shown(value, 2) for value in (0.12345, -0.001, 1234567, "mean", None, 3.2e-9)]
    ['0.12', '-0.00', '1,234,567', 'mean', '', '3.20e-09']
    """
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    small = value != 0 and abs(value) < 10 ** -(decimals + 2)
    return f"{value:.{decimals}e}" if small else f"{value:,.{decimals}f}"
