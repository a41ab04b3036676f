"""The results of a sweep: its runs, best dev score first, for a program and for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sempa_st.console import table


@dataclass(frozen=True)
class Outcome:
    """What is known of one run of a sweep.

    Args:
        name: Name of its folder.
        varied: The settings in which the runs of the sweep differ.
        record: Its run record, once it is finished.
        error: Why it failed, where it did.
    """

    name: str
    varied: Mapping[str, Any]
    record: dict[str, Any] | None = None
    error: str | None = None

    @property
    def dev_score(self) -> float:
        """Dev score of the checkpoint that was kept; lower than any score where the run is not finished."""
        return float(self._kept["spearman"]) if self.record else float("-inf")

    @property
    def _kept(self) -> dict[str, Any]:
        assert self.record is not None
        best_step = self.record["best_step"]
        kept: dict[str, Any] = next(score for score in self.record["dev"]["scores"] if score["step"] == best_step)
        return kept

    def row(self) -> dict[str, Any]:
        """Return the run as a row of the results."""
        state = "finished" if self.record else "failed" if self.error else "waiting"
        row: dict[str, Any] = {"name": self.name, "settings": dict(self.varied), "state": state}
        if self.record:
            row |= {
                "triplets": self.record["data"]["triplets"],
                "base_score": self.record["dev"]["scores"][0]["spearman"],
                "dev_score": self.dev_score,
                "step": self.record["best_step"],
                "seconds": self.record["seconds"],
            }
        elif self.error:
            row["error"] = self.error
        return row


def sweep_results(outcomes: Sequence[Outcome], dev: str) -> dict[str, Any]:
    """Return the results of a sweep; of equal scores the earlier point of the grid is the better one.

    Args:
        outcomes: The runs, in the order of the grid.
        dev: The pairs that they are judged on.
    """
    rows = [outcome.row() for outcome in sorted(outcomes, key=lambda outcome: -outcome.dev_score)]
    rows.sort(key=lambda row: ("finished", "failed", "waiting").index(row["state"]))
    best = rows[0]["name"] if rows[0]["state"] == "finished" else None
    return {"dev": dev, "best": best, "runs": rows}


def results_table(results: dict[str, Any]) -> str:
    """Lay out the results for a terminal."""
    header, rows = _cells(results)
    text = table(header, rows)
    best = results["runs"][0]
    if best["state"] == "finished" and best["dev_score"] <= best["base_score"]:
        text += f"\nThe best run does not beat its base's own dev score, {best['base_score']:.2f}."
    return text


def results_markdown(results: dict[str, Any]) -> str:
    """Lay out the results as a table in Markdown."""
    header, rows = _cells(results)
    cells = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *cells]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _cells(results: dict[str, Any]) -> tuple[list[str], list[list[object]]]:
    names = list(results["runs"][0]["settings"])
    rows: list[list[object]] = []
    for run in results["runs"]:
        figures: list[object] = ["", "", "", "", ""]
        if run["state"] == "finished":
            figures = [run["triplets"], run["base_score"], run["dev_score"], run["step"], round(run["seconds"])]
        notes = {"finished": "<- best" if run["name"] == results["best"] else "", "waiting": "not run yet"}
        note = notes.get(run["state"]) if run["state"] != "failed" else "failed: " + " ".join(run["error"].split())
        # As text: a table of scores would cut a learning rate to two places.
        rows.append([*(str(run["settings"][name]) for name in names), *figures, str(note)])
    return [*names, "triplets", "base", f"dev ({results['dev']})", "step", "seconds", ""], rows
