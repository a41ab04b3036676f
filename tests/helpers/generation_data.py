"""A data folder for ``sempa generation`` in the documented layout, with a few questions of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUBJECTS = {"anatomy": "bone", "astronomy": "star"}
PAGES = (
    " = The lamp = \n \n A lamp gives light , and it is old . \n\n = = Use = = \n \n People read by it at night . \n",
    ' = The boat = \n \n A boat lies in the harbour @-@ side , near " the pier " . \n',
)
TRUTHS = [
    ("What do cats drink?", ["Ink", "Water", "Sand"], [0, 1, 0]),
    ("Where does rain fall from?", ["Clouds", "The moon"], [1, 0]),
    ("Who bakes bread?", ["A baker bakes it", "Nobody bakes it", "A cat", "The sea does"], [1, 0, 0, 0]),
]


def question(word: str, number: int) -> dict[str, Any]:
    choices = [f"{word} {number}", "a man", "the dog", f"no {word}"]
    return {"question": f" Which {word} is {number}?", "choices": choices, "answer": number % 4}


def write_generation_data(root: Path) -> Path:
    for folder in ("generation", "text"):
        (root / folder).mkdir()

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        pq.write_table(pa.Table.from_pylist(rows), root / "generation" / f"{name}.parquet")

    for split, numbers in (("dev", range(5)), ("test", range(5, 11))):
        write(f"mmlu_{split}", [{"subject": s, **question(w, n)} for n in numbers for s, w in SUBJECTS.items()])
    write("truthfulqa_mc1", [dict(zip(("question", "choices", "labels"), row, strict=True)) for row in TRUTHS])
    write("gsm8k_test", [{"question": f"What is {n} + 1?", "answer": f"It is\n#### {n + 1}"} for n in (10, 1199)])
    endings = {"activity_label": "Baking", "ctx_a": "A man stands.", "ctx_b": "he", "endings": ["eats.", "flies away."]}
    write("hellaswag_validation", [{**endings, "label": label} for label in ("0", "1", "0")])
    (root / "text" / "wikitext2.test.txt").write_text(" \n" + "".join(PAGES), encoding="utf-8")
    return root
