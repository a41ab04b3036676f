"""Draw what the recipe costs and gains: the frontier of STS against perplexity, and the data-size curve.

    python -m benchmarks.plot_recipe frontier benchmarks/results/frontier.json benchmarks/results/frontier.png
    python -m benchmarks.plot_recipe curve benchmarks/results/data-size.json benchmarks/results/data-size.png

The first file holds rows with ``name``, ``dev`` (STS-B dev) and ``perplexity``, the second rows with ``triplets`` and
``dev``; both hold ``base``, the row of the untrained model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.utils.extras import require
from sempa_st.utils.files import atomic_file, read_json
from sempa_st.utils.tables import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DEV = "STS-B dev, Spearman x 100"

_MARKERS = "osD^"
"""One marker per ten points, since only ten colours differ."""


def main() -> None:
    """Draw one of the two pictures and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("frontier", "curve"))
    parser.add_argument("data", help="JSON file")
    parser.add_argument("picture", help="PNG file to write")
    args = parser.parse_args()
    data = read_json(Path(args.data))
    draw: Callable[[Axes, dict[str, Any]], None] = {"frontier": draw_frontier, "curve": draw_curve}[args.what]
    require("matplotlib", extra="plots", purpose="Drawing a plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    draw(axes, data)
    axes.set_ylabel(_DEV)
    axes.grid(alpha=0.3)
    with atomic_file(args.picture) as scratch:
        figure.savefig(scratch, dpi=150)
    columns = list(data["rows"][0])
    print(table(columns, [[row[column] for column in columns] for row in data["rows"]]))


def draw_frontier(axes: Axes, data: dict[str, Any]) -> None:
    """Draw STS-B dev over the rise of the perplexity, with the bar of 2 per cent."""
    base = data["base"]
    for number, row in enumerate(data["rows"]):
        rise = 100 * (row["perplexity"] / base["perplexity"] - 1)
        axes.scatter(rise, row["dev"], s=40, marker=_MARKERS[number // 10], label=row["name"])
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.1))
    axes.axvline(2, linestyle="--", color="grey", linewidth=1)
    axes.axhline(base["dev"], linestyle=":", color="grey", linewidth=1)
    axes.set_xlabel(f"rise of the WikiText-2 perplexity in % (base: {base['perplexity']:.2f})")


def draw_curve(axes: Axes, data: dict[str, Any]) -> None:
    """Draw STS-B dev over the number of triplets, on a logarithmic axis."""
    axes.plot([row["triplets"] for row in data["rows"]], [row["dev"] for row in data["rows"]], marker="o")
    axes.axhline(data["base"]["dev"], linestyle=":", color="grey", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks([row["triplets"] for row in data["rows"]], [str(row["triplets"]) for row in data["rows"]])
    axes.minorticks_off()
    axes.set_xlabel("triplets")


if __name__ == "__main__":
    main()
