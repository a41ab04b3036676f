"""Score many systems on the seven STS tasks under both protocols, resumably, and set them beside the paper's table."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from sempa_st.data.sts import PROTOCOLS, STS_TASKS, GradedPairs
from sempa_st.errors import SempaError
from sempa_st.evaluation.encode_cache import EncodeCost
from sempa_st.evaluation.sts import PROTOCOLS_DIFFER, Cell, Score, load_cells, score_cells
from sempa_st.folder.resolve import find_model, source_digest
from sempa_st.loading import load
from sempa_st.utils.assets import asset_path
from sempa_st.utils.devices import pick_device
from sempa_st.utils.files import json_digest, read_json, write_json, write_text
from sempa_st.utils.portable import portable_name
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

_SHORT = {"STSBenchmark": "STS-B"}
COLUMNS = (
    "system",
    *(_SHORT.get(task, task) for task in STS_TASKS),
    "average",
    "SICK-R (MTEB)",
    "average (MTEB)",
    "tokens a sentence",
    "sentences/s",
)
"""Scores by SentEval's protocol, then those that differ by MTEB's (SICK-R and the mean), then the cost."""
Line = list[str | float | None]


@dataclass(frozen=True)
class System:
    """A row of the table.

    Args:
        model: Base, SemPA folder or any sentence-transformers model.
        method: Embedding method to apply to the model; its own when None.
    """

    model: str
    method: str | None = None

    @property
    def name(self) -> str:
        """Name of the row."""
        return self.method or Path(self.model).name


def score_systems(
    systems: Sequence[System],
    output: Path,
    *,
    data_dir: str | None,
    dtype: str = "auto",
    device: str | None = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Score systems on all tasks, except for scores that ``output`` already holds.

    Args:
        systems: Rows of the table.
        output: Folder for one file per system, written after each score.
        data_dir: Folder with ``sts/*.parquet``; the Hub when None.
        dtype: As for :func:`sempa_st.load`.
        device: As for :func:`sempa_st.load`.
        batch_size: Sentences per batch.

    Returns:
        Content of each system's file.

    Raises:
        SempaError: If a model, a method or data cannot be used; earlier scores are kept.
    """
    names = [system.name for system in systems]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise SempaError(f"Two systems have the name {twice[0]!r}. Expected names of their own: rename a folder.")
    cells = load_cells(list(STS_TASKS), protocols=PROTOCOLS, data_dir=data_dir)
    results = []
    for system in systems:
        file = output / "systems" / f"{_file_name(system.name)}.json"
        print(f"{system.name}:", file=sys.stderr, flush=True)
        results.append(_score(system, file, cells, dtype=dtype, device=device, batch_size=batch_size))
    return results


def _fingerprint(cell: Cell) -> str:
    rows = cell.task.dataset[cell.split]
    return GradedPairs(rows["sentence1"], rows["sentence2"], rows["score"]).fingerprint()


def _file_name(name: str) -> str:
    """Return a system's name as that of a file; of two names that look alike then, each has its own digits."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", name)
    return plain if plain == name else f"{plain}-{json_digest(name)[:8]}"


def _score(
    system: System, file: Path, cells: Sequence[Cell], *, dtype: str, device: str | None, batch_size: int
) -> dict[str, Any]:
    source = find_model(system.model, for_method=True)
    identity = {
        "digest": source_digest(source),
        "method": system.method,
        "dtype": dtype,
        "device": pick_device(device),
        "data": json_digest([_fingerprint(cell) for cell in cells]),
    }
    record: dict[str, Any] = read_json(file) if file.is_file() else {}
    if record.get("identity") != identity:
        record = {"system": system.name, "identity": identity, "scores": {}}
    record["model"] = portable_name(source.name)
    _share(record["scores"])
    missing = [cell for cell in cells if cell.task.metadata.name not in record["scores"].get(cell.protocol, {})]
    if not missing:
        return record
    model = load(system.model, method=system.method, dtype=dtype, device=device)
    record["tokens"] = _tokens(model, cells[0].task.dataset["test"]["sentence1"])

    def save(score: Score, cost: EncodeCost) -> None:
        record["scores"].setdefault(score.protocol, {})[score.task] = score.spearman
        if cost.encoded:
            record["speed"] = cost.encoded / cost.seconds
        record["run"] = run_info()
        write_json(file, record)

    score_cells(model, missing, output=file.parent.parent, batch_size=batch_size, report=save)
    return record


def _share(scores: dict[str, dict[str, float]]) -> None:
    """Give each protocol the scores that another has of the tasks in which they do not differ."""
    known = {task: score for row in scores.values() for task, score in row.items() if task not in PROTOCOLS_DIFFER}
    for protocol in PROTOCOLS:
        scores.setdefault(protocol, {}).update(known)


def _tokens(model: Any, sentences: Sequence[str]) -> float:
    """Return the mean number of tokens per sentence, over all texts that the method makes of it."""
    chosen = list(sentences)[:500]
    features = model.preprocess(chosen)
    masks = [tensor for name, tensor in features.items() if name.startswith("attention_mask")]
    return float(sum(mask.sum() for mask in masks) / len(chosen))


def published() -> list[dict[str, Any]]:
    """Return the rows of the paper's main table (arXiv 2601.05075): ``system`` and ``scores`` by task."""
    return read_json(asset_path("published.json"))


def lines_of(results: Sequence[dict[str, Any]]) -> list[Line]:
    """Return one line of :data:`COLUMNS` per scored system, then one per published system."""
    lines = []
    for system in results:
        scores, mteb = (system["scores"][protocol] for protocol in ("senteval", "mteb"))
        others = [mteb["SICK-R"], fmean(mteb[task] for task in STS_TASKS), system["tokens"], system.get("speed")]
        lines.append([*_line(system["system"], scores), *others])
    return [*lines, *([*_line(f"{row['system']} (paper)", row["scores"]), *[None] * 4] for row in published())]


def _line(name: str, scores: dict[str, float]) -> Line:
    in_order = [scores[task] for task in STS_TASKS]
    return [name, *in_order, fmean(in_order)]


def write_tables(output: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write ``table.md``, ``table.csv`` and ``table.json`` into a folder."""
    lines = lines_of(results)
    write_text(output / "table.md", f"{table(COLUMNS, lines, style='pipe')}\n")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *lines])
    write_text(output / "table.csv", text.getvalue())
    write_json(output / "table.json", {"systems": list(results), "published": published(), "run": run_info()})
