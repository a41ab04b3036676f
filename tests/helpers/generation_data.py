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

NO_DATE = {"day": "", "month": "", "year": ""}
PASSAGE = "The Bears beat the Jets 24-10 in Chicago. Cody Ames kicked a 14.5 metre goal and Lee Ray one of 9 metres."


def drop_answer(
    *, number: str = "", spans: tuple[str, ...] = (), day: str = "", month: str = "", year: str = ""
) -> dict[str, Any]:
    return {"number": number, "date": {"day": day, "month": month, "year": year}, "spans": list(spans)}


def drop_row(question: str, *answers: dict[str, Any], passage: str = PASSAGE) -> dict[str, Any]:
    """Return a question as the Hub stores it: the first answer, and the others as one list per field."""
    main, *others = answers
    fields = ("number", "date", "spans")
    return {
        "section_id": "nfl_1",
        "query_id": question,
        "passage": passage,
        "question": question,
        "answer": {**main, "worker_id": "w", "hit_id": "h"},
        "validated_answers": {name: [answer[name] for answer in others] for name in fields},
    }


DROP_TRAIN = [
    drop_row("Who kicked goals?", drop_answer(spans=("Cody Ames", "Lee Ray"))),
    drop_row("How many points did the Bears win by?", drop_answer(number="14")),
    drop_row("How many metres did both goals take?", drop_answer(number="23.5")),
    drop_row("When was the game?", drop_answer(month="March", year="1990"), passage="It was in March 1990. "),
]
DROP_VALIDATION = [
    drop_row("How many metres was the longest goal?", drop_answer(number="14.5"), drop_answer(spans=("14.5 metre",))),
    drop_row("Which teams played?", drop_answer(spans=("Bears", "Jets")), drop_answer(spans=("The Bears", "the Jets"))),
    drop_row("When did they move?", drop_answer(month="May", year="1991"), passage="They moved in May 1991."),
]


def write_drop_data(root: Path) -> Path:
    """Add the two files of DROP to a data folder."""
    for split, rows in (("train", DROP_TRAIN), ("validation", DROP_VALIDATION)):
        pq.write_table(pa.Table.from_pylist(rows), root / "generation" / f"drop_{split}.parquet")
    return root


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
