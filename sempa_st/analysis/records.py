"""Read what other commands wrote: run records, STS scores and generation scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sempa_st.data.sts import STS_TASKS
from sempa_st.errors import SempaError
from sempa_st.folder.formats import RUN_RECORD
from sempa_st.model.templates import DEFAULT_TEMPLATE
from sempa_st.utils.files import read_json

_AS_IT_IS = (None, DEFAULT_TEMPLATE, "sempa", "sentence-transformers")
"""Labels of models that are embedded with as they are."""
_TWO = "Give one of the two files, or rename one of the models."
StsCell = tuple[str, str, str]
"""Task, split and protocol of a score."""


@dataclass
class Records:
    """Results of other commands, by model: the last part of its path, or ``METHOD:MODEL``.

    Args:
        runs: Run records of ``sempa train``.
        sts: Spearman correlations times 100, of ``sempa evaluate`` and ``sempa table``.
        generation: Scores of ``sempa generation``, each a :class:`~sempa_st.evaluation.generation.GenerationScore` as
            a mapping.
        methods: What ``sempa generation`` labelled each model with: ``sempa`` for a trained one, a template for a base.
    """

    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    sts: dict[str, dict[StsCell, float]] = field(default_factory=dict)
    generation: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    methods: dict[str, str] = field(default_factory=dict)

    def sts_average(self, name: str) -> float | None:
        """Return the mean of a model's seven test sets, by SentEval's protocol if known, else MTEB's, or None."""
        scores = self.sts.get(name, {})
        for protocol in ("senteval", "mteb"):
            found = [scores.get((task, "test", protocol)) for task in STS_TASKS]
            seven = [score for score in found if score is not None]
            if len(seven) == len(STS_TASKS):
                return sum(seven) / len(seven)
        return None


def read_records(paths: Iterable[str | Path]) -> Records:
    """Read run folders, and JSON files that ``sempa train``, ``evaluate``, ``table`` or ``generation`` wrote.

    Args:
        paths: Run folders or files. What a file holds is seen from its keys; a file may hold several results, in a
            list ``parts``.

    Raises:
        SempaError: If a file cannot be read or holds nothing of these, or a model has two run records.
    """
    records = Records()
    for path in map(Path, paths):
        file = record_file(path)
        name = file.resolve().parent.name if file.name == RUN_RECORD else file.stem
        _add(records, read_json(file), name, file)
    return records


def record_file(path: Path) -> Path:
    """Return the file with the results in a path: of a folder, its run record."""
    return path / RUN_RECORD if path.is_dir() else path


def _add(records: Records, value: Any, name: str, file: Path) -> None:
    keys = set(value) if isinstance(value, dict) else set()
    try:
        if keys >= {"parts"}:
            for part in value["parts"]:
                _add(records, part, name, file)
        elif keys >= {"systems"}:
            for system in value["systems"]:
                _add(records, system, name, file)
        elif keys >= {"dev", "config"}:
            if records.runs.setdefault(name, value) is not value:
                raise SempaError(f"{file} is a second run record of {name!r}. Rename one of the runs.")
        elif keys >= {"model", "results"}:
            cells = {(row["task"], row["split"], row["protocol"]): _score(row["spearman"]) for row in value["results"]}
            _add_cells(records, _system(value["model"], value.get("method")), cells, file)
        elif keys >= {"system", "scores"}:
            cells = {
                (task, "test", protocol): _score(score)
                for protocol, row in value["scores"].items()
                for task, score in row.items()
            }
            _add_cells(records, _system(value["model"], value["identity"]["method"]), cells, file)
        elif keys >= {"models", "run"}:
            for model in value["models"]:
                own = Path(model["model"]).name
                _add_generation(records.generation.setdefault(own, []), model["scores"], own, file)
                records.methods[own] = model["method"]
        else:
            raise KeyError("dev")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SempaError(
            f"{file} is no result of this package, or an incomplete one ({type(error).__name__}: {error}). Expected a "
            "run folder, or a JSON file of sempa train, evaluate, table or generation."
        ) from error


def _system(model: str, method: str | None) -> str:
    """Return the name of a model, or of a method to embed with it."""
    return Path(model).name if method in _AS_IT_IS else f"{method}:{Path(model).name}"


def _add_cells(records: Records, name: str, cells: Mapping[tuple[str, str, str], float], file: Path) -> None:
    own = records.sts.setdefault(name, {})
    for cell, score in cells.items():
        if own.setdefault(cell, score) != score:
            raise SempaError(f"{file} has another score of {name!r} on {cell[0]}. {_TWO}")


def _add_generation(known: list[dict[str, Any]], scores: Iterable[dict[str, Any]], name: str, file: Path) -> None:
    for score in scores:
        _score(score["score"])
        same = [each for each in known if all(each[key] == score[key] for key in ("task", "metric"))]
        if same and same[0]["score"] != score["score"]:
            raise SempaError(f"{file} has another {score['metric']} of {name!r} on {score['task']}. {_TWO}")
        known += [] if same else [score]


def _score(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError(f"a score is {value}")
    return float(value)


def unique(values: Iterable[Any], what: str, models: Sequence[str]) -> Any:
    """Return the only one of ``values``.

    Args:
        values: One value a model.
        what: What they are, for the message.
        models: Names of the models, in the order of the values.

    Raises:
        SempaError: If they differ, so that the scores cannot be compared.
    """
    listed = list(values)
    for name, value in zip(models, listed, strict=True):
        if value != listed[0]:
            raise SempaError(
                f"The {what} of {name} is {value}, and that of {models[0]} is {listed[0]}. Scores on different ones "
                "cannot be compared: pass records of one kind."
            )
    return listed[0]
