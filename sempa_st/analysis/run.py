"""Run the parts of an analysis, resumably, and write the report."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sempa_st import __version__
from sempa_st.analysis.context import Context, find_models
from sempa_st.analysis.data import AnalysisData
from sempa_st.analysis.part import Part, PartResult, Table
from sempa_st.analysis.plotting import save_figure
from sempa_st.analysis.registry import find_parts
from sempa_st.analysis.report import write_report
from sempa_st.analysis.settings import AnalysisSettings
from sempa_st.errors import SempaError
from sempa_st.utils.extras import require
from sempa_st.utils.files import atomic_folder, json_digest, read_json, write_json
from sempa_st.utils.options import convert_option
from sempa_st.utils.run_info import run_info

RESULT = "result.json"
REPORT, RESULTS, KEPT = "report.html", "results.json", "kept"


def analyze(
    models: str | Sequence[str],
    output: str | Path,
    *,
    data_dir: str | Path | None = None,
    only: Sequence[str] | None = None,
    corpus: str | Path | None = None,
    records: Sequence[str | Path] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Compare how models embed, and write a report: ``sempa analyze`` from Python.

    Args:
        models: What :func:`sempa_st.load` takes, or ``METHOD:MODEL`` such as ``mean:gemma3-270m``.
        output: Folder for ``report.html``, ``results.json`` and the parts. The same call continues it: finished parts
            whose models, data and settings are the same are not computed again.
        data_dir: Folder with ``nli/triplets.parquet`` and ``sts/*.parquet``; the samples of this package when None.
        only: Names of the parts to run; when None, all of :data:`sempa_st.analysis.registry.PARTS` but those that run
            by name only (``templates``, which trains).
        corpus: File with the sentences for the geometry and the GAR; those of the triplets and STS sets when None.
        records: Run folders, and JSON files of ``sempa train``, ``evaluate``, ``table`` or ``generation``, for the
            curve and the frontier.
        **settings: Fields of :class:`~sempa_st.analysis.settings.AnalysisSettings`, such as ``sentences=1000``.

    Returns:
        The content of ``results.json``: ``models``, ``data``, ``parts`` with the values of each, and ``run``.

    Raises:
        SempaError: If a model, part, setting or data cannot be used.
    """
    require("matplotlib", extra="plots", purpose="An analysis")
    chosen = AnalysisSettings(**dict(convert_option(AnalysisSettings, *item, "analyze") for item in settings.items()))
    parts = find_parts(only)
    found = find_models([models] if isinstance(models, str) else models)
    data = AnalysisData(
        Path(data_dir) if data_dir else None, Path(corpus) if corpus else None, [Path(path) for path in records]
    )
    needed = {need: data.digest(need) for need in dict.fromkeys(need for part in parts for need in part.needs)}
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise SempaError(f"The output {folder} is a file. Expected a folder; choose another path.")
    identities = [model.identity(chosen) for model in found.values()]
    results = []
    with tempfile.TemporaryDirectory(prefix="sempa-analyze-") as scratch:
        context = Context(found, data, chosen, Path(scratch), folder / KEPT)
        for part in parts:
            if part.check:
                part.check(context)
        for part in parts:
            identity = {
                "version": __version__,
                "models": identities,
                "data": {need: needed[need] for need in part.needs},
                "settings": {name: getattr(chosen, name) for name in part.settings},
            }
            results.append(_finished(part, context, folder / "parts" / part.name, json_digest(identity)))
    summary = {
        "models": list(found),
        "data": data.source,
        "settings": asdict(chosen),
        "parts": {result["name"]: result["values"] for result in results},
        "run": run_info(),
    }
    write_json(folder / RESULTS, summary)
    write_report(folder / REPORT, results, folder / "parts", summary)
    return summary


def _finished(part: Part, context: Context, folder: Path, digest: str) -> dict[str, Any]:
    """Return the record of a part from its folder, after computing it if it is not there as ``digest`` says."""
    from tqdm.auto import tqdm

    record: dict[str, Any] = read_json(folder / RESULT) if (folder / RESULT).is_file() else {}
    pictures = [folder / f"{picture['name']}.png" for picture in record.get("pictures", ())]
    if record.get("digest") == digest and all(picture.is_file() for picture in pictures):
        return record
    total = part.steps(context) * len(context.models) if part.steps else None
    with tqdm(total=total, desc=part.title, unit="step", dynamic_ncols=True) as context.bar:
        result = part.run(context)
    context.bar = None
    record = {
        "name": part.name,
        "title": part.title,
        "digest": digest,
        "values": result.values,
        "tables": [asdict(table) for table in result.tables],
        "pictures": [{"name": picture.name, "caption": picture.caption} for picture in result.pictures],
        "notes": list(result.notes),
    }
    with atomic_folder(folder, overwrite=True) as partial:
        _write_files(result, partial)
        write_json(partial / RESULT, record)
    return dict(read_json(folder / RESULT))  # as the next run reads it


def _write_files(result: PartResult, folder: Path) -> None:
    for table in (*result.tables, *result.files):
        _write_csv(table, folder / f"{table.name}.csv")
    for picture in result.pictures:
        save_figure(picture.figure, folder / f"{picture.name}.png")


def _write_csv(table: Table, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([table.columns, *table.rows])
