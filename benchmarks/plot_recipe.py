"""Draw what the recipe costs and gains: the frontier of STS against perplexity, and the data-size curve.

    python -m benchmarks.plot_recipe frontier benchmarks/results/frontier.json benchmarks/results/frontier.png
    python -m benchmarks.plot_recipe curve benchmarks/results/data-size.json benchmarks/results/data-size.png

These are the pictures of ``sempa analyze``, from files of figures that were put together by hand: rows with ``name``,
``dev`` (STS-B dev) and ``perplexity``, or with ``triplets`` and ``dev``; both hold ``base``, the row of the untrained
model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.analysis.curve import RunCurve
from sempa_st.analysis.curve_part import draw_curves
from sempa_st.analysis.frontier import FrontierPoint, draw_frontier, perplexity_rise
from sempa_st.analysis.plotting import new_figure, save_figure
from sempa_st.utils.extras import require
from sempa_st.utils.files import atomic_file, read_json
from sempa_st.utils.tables import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DEV = ("STS-B", 1500)


def main() -> None:
    """Draw one of the two pictures and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("frontier", "curve"))
    parser.add_argument("data", help="JSON file")
    parser.add_argument("picture", help="PNG file to write")
    args = parser.parse_args()
    data = read_json(Path(args.data))
    require("matplotlib", extra="plots", purpose="Drawing a plot")
    figure = new_figure(7, 6.5 if args.what == "frontier" else 4.5)
    {"frontier": _frontier, "curve": _curve}[args.what](figure.subplots(), data)
    with atomic_file(args.picture) as scratch:
        save_figure(figure, scratch)
    columns = list(data["rows"][0])
    print(table(columns, [[row[column] for column in columns] for row in data["rows"]]))


def _frontier(axes: Axes, data: dict[str, Any]) -> None:
    base = data["base"]
    points = [
        FrontierPoint(
            name=row["name"],
            sts=row["dev"],
            perplexity=row["perplexity"],
            rise=perplexity_rise(row["perplexity"], base["perplexity"]),
            accuracy=None,
            is_base=row["name"] == base["name"],
        )
        for row in data["rows"]
    ]
    draw_frontier(axes, points, "STS-B dev")


def _curve(axes: Axes, data: dict[str, Any]) -> None:
    base = data["base"]["dev"]
    runs = [RunCurve("", _DEV, base, [row["triplets"]], [row["dev"]], 0, settings="") for row in data["rows"]]
    draw_curves(axes, runs)


if __name__ == "__main__":
    main()
