"""The runs of a sweep: their settings, folders and results, ranked by dev score."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sempa_st.folder.layout import ModelFolder
from sempa_st.training.config import TrainConfig
from sempa_st.training.record import dev_scores, settings_digest
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.files import read_json
from sempa_st.utils.tables import table

_LONGEST_NAME = 100
_STATES = ("finished", "failed", "waiting")


@dataclass
class RunResult:
    """A run of a sweep and its result, as far as it is known.

    Args:
        config: Settings of the run; their output is the sweep's folder.
        varied: The settings that differ between the runs of the sweep.
        folder: Model folder of the run. Once a better model is known, only the run record is kept in it.
    """

    config: TrainConfig
    varied: Mapping[str, Any]
    folder: Path

    @cached_property
    def digest(self) -> str:
        """Digest of the settings; see :func:`settings_digest`."""
        return settings_digest(asdict(self.config))

    @property
    def label(self) -> str:
        """The varied settings as text."""
        return ", ".join(f"{name}={value}" for name, value in self.varied.items())

    @property
    def record(self) -> dict[str, Any] | None:
        """The run record, or None until a run with these settings has finished."""
        record = ModelFolder(self.folder).record
        return record if record and record.get("settings_digest") == self.digest else None

    @property
    def has_model(self) -> bool:
        """Whether the folder still holds the model."""
        return any((self.folder / name).is_file() for name in ModelFolder(self.folder).weight_files)

    @property
    def failure(self) -> Path:
        """Path of the file that says why the run failed, if it did."""
        return self.folder.with_name(self.folder.name + ".failed.json")

    def settings(self) -> TrainConfig:
        """Return the settings to start the run with, or to resume it if it was interrupted."""
        run_folder = RunFolder(self.folder)
        started = run_folder.started_with() if run_folder.last_checkpoint() else None
        # A run cannot be resumed with other settings, or with dev pairs from another folder.
        resume = (
            started is not None
            and settings_digest(started) == self.digest
            and started.get("data_dir") == self.config.data_dir
        )
        return replace(self.config, output=str(self.folder), overwrite=True, resume=resume)

    def row(self) -> dict[str, Any]:
        """Return the run as an entry of ``results.json``; its dev score is that of the best checkpoint."""
        row: dict[str, Any] = {"name": self.folder.name, "settings": dict(self.varied), "state": "waiting"}
        if record := self.record:
            scores = dev_scores(record)
            return row | {
                "state": "finished",
                "triplets": record["data"]["triplets"],
                "base_score": scores[0],
                "dev_score": scores[record["best_step"]],
                "step": record["best_step"],
                "seconds": record["seconds"],
            }
        if self.failure.is_file():
            row |= {"state": "failed", "error": read_json(self.failure)["error"]}
        return row


def assign_folders(
    configs: Sequence[TrainConfig], varied: Sequence[str], folder: Path, names: Mapping[str, str]
) -> list[RunResult]:
    """Assign each point of a grid a run folder: the one of an earlier run with its settings, or a new one.

    Args:
        configs: Settings of each point.
        varied: Names of the settings that differ between them.
        folder: Parent folder of the runs.
        names: Folder name of each run started so far, by the digest of its settings. It takes precedence over the name
            made from the settings, since an earlier grid may have varied others.
    """
    taken = set(names.values())
    runs = []
    for config in configs:
        run = RunResult(config, {name: getattr(config, name) for name in varied}, folder)
        labels = (f"{name}={re.sub('[^A-Za-z0-9._+-]', '-', str(value))}" for name, value in run.varied.items())
        name = ",".join(labels)
        name = name if len(name) <= _LONGEST_NAME else run.digest
        name = names.get(run.digest) or (f"{name}-{run.digest}" if name in taken else name)
        taken.add(name)
        runs.append(replace(run, folder=folder / name))
    return runs


def sweep_results(runs: Sequence[RunResult]) -> dict[str, Any]:
    """Return the results of a sweep, best dev score first; of equal scores, the earlier run comes first."""
    rows = [run.row() for run in runs]
    rows.sort(key=lambda row: (_STATES.index(row["state"]), -row.get("dev_score", 0)))
    best = rows[0]["name"] if rows[0]["state"] == "finished" else None
    return {"dev": runs[0].config.dev, "best": best, "runs": rows}


def results_table(results: dict[str, Any]) -> str:
    """Format the results as a table for the terminal."""
    text = table(*_cells(results))
    best = results["runs"][0]
    if best["state"] == "finished" and best["dev_score"] <= best["base_score"]:
        text += f"\nThe best run does not beat the dev score of its base, {best['base_score']:.2f}."
    return text


def results_markdown(results: dict[str, Any]) -> str:
    """Format the results as a Markdown table."""
    header, rows = _cells(results)
    escaped = [[cell.replace("|", "\\|") if isinstance(cell, str) else cell for cell in row] for row in rows]
    return f"{table(header, escaped, style='pipe')}\n"


def _cells(results: dict[str, Any]) -> tuple[list[str], list[list[object]]]:
    rows: list[list[object]] = []
    for run in results["runs"]:
        measured: list[object] = [None] * 5
        note = "not run yet"
        if run["state"] == "finished":
            measured = [run["triplets"], run["base_score"], run["dev_score"], run["step"], round(run["seconds"])]
            note = "<- best" if run["name"] == results["best"] else ""
        elif run["state"] == "failed":
            note = "failed: " + " ".join(run["error"].split())
        # As text, since the table rounds numbers to two decimals, and with them learning rates.
        rows.append([*map(str, run["settings"].values()), *measured, note])
    names = list(results["runs"][0]["settings"])
    return [*names, "triplets", "base", f"dev ({results['dev']})", "step", "seconds", ""], rows
