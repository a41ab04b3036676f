"""Files of rows in every format that the package reads."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BOM = "\ufeff"
LONE_SURROGATE = "\ud800"


def write_rows(path: Path, rows: list[dict[str, Any]], *, bom: bool = False) -> str:
    """Write rows as csv, jsonl, json or parquet, by the extension of ``path``; return the path as text."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    if path.suffix == ".json":
        text = json.dumps(rows)
    elif path.suffix == ".jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    else:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
        text = buffer.getvalue()
    path.write_text(bom * BOM + text, encoding="utf-8", newline="")
    return str(path)
