"""Shards begin where the last one ended, whatever stands in the rows."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sempa_st.encoding.sentences import read_sentences

pytestmark = pytest.mark.names_dtype

TEXTS = [
    'A "cat"\nsleeps,\r\nhere.',
    "Ein Zweizeiler für 😀",
    "",
    "x" * 9000,
    " ",
    "\x0cform feed",
    "one\u2028two",
    "end",
]
"""Line breaks, quotes, characters of several bytes, more than a read buffer, and bad rows."""
KEPT = [(number, text) for number, text in enumerate(TEXTS, 1) if text.strip()]


def write(path: Path, mark: str) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"n": range(len(TEXTS)), "s": TEXTS}), path, row_group_size=3)
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        if path.suffix == ".csv":
            csv.writer(file).writerows([["n", "s"], *enumerate(TEXTS)])
        elif path.suffix == ".jsonl":
            file.writelines(json.dumps({"s": text}, ensure_ascii=False) + "\n\n" for text in TEXTS)
        elif path.suffix == ".json":
            json.dump([{"s": text} for text in TEXTS], file)
        else:
            file.writelines(text.partition("\n")[0] + "\r\n" for text in TEXTS)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("shard_size", [1, 2, 3, 100])
def test_shards_hold_every_row_once(tmp_path: Path, suffix: str, mark: str, shard_size: int) -> None:
    path = tmp_path / f"rows{suffix}"
    write(path, mark)
    column = None if suffix == ".txt" else "s"
    sentences = read_sentences(path, column=column, skip_bad_rows=True, shard_size=shard_size)
    kept = [(row, text.partition("\n")[0]) for row, text in KEPT] if suffix == ".txt" else KEPT
    assert list(sentences) == kept
    assert (sentences.count, sentences.skipped) == (len(KEPT), len(TEXTS) - len(KEPT))
    for shard in sentences.shards:
        rows = range(shard.first_row, shard.first_row + shard.rows)
        assert len(rows) <= shard_size
        assert shard.count == sum(row in rows for row, _ in KEPT) > 0
