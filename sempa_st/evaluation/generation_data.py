"""Local files of the generation tasks: read, check, and choose the documents to score."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sempa_st.data.rows import find_columns, read_rows
from sempa_st.errors import SempaError, list_first
from sempa_st.utils.files import UTF8
from sempa_st.utils.options import split_list

MMLU_SHOTS = 5
FILES: dict[str, dict[str, str]] = {
    "mmlu": {"dev": "generation/mmlu_dev.parquet", "test": "generation/mmlu_test.parquet"},
    "truthfulqa_mc1": {"validation": "generation/truthfulqa_mc1.parquet"},
    "gsm8k": {"test": "generation/gsm8k_test.parquet"},
    "hellaswag": {"validation": "generation/hellaswag_validation.parquet"},
    "drop": {"train": "generation/drop_train.parquet", "validation": "generation/drop_validation.parquet"},
    "wikitext": {"test": "text/wikitext2.test.txt"},
}
"""File in the data folder by task and split."""
_COLUMNS: dict[str, tuple[str, ...]] = {
    "mmlu": ("subject", "question", "choices", "answer"),
    "truthfulqa_mc1": ("question", "choices", "labels"),
    "gsm8k": ("question", "answer"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "drop": ("query_id", "passage", "question", "answer", "validated_answers"),
}
Splits = dict[str, list[dict[str, Any]]]
"""Rows by split, with the columns that the harness reads."""


def check_local_files(data_dir: str | Path, tasks: Sequence[str]) -> None:
    """Check that all files of the tasks are in a folder.

    Raises:
        SempaError: If one is missing; the message names it, and the tasks whose files are present.
    """
    missing = {task: _missing(data_dir, task) for task in FILES}
    for task in tasks:
        if missing[task]:
            present = ", ".join(name for name in FILES if not missing[name]) or "none"
            raise SempaError(
                f"The data of {task} is not in {data_dir}: {missing[task][0]} does not exist. Tasks whose data is "
                f"there: {present}. Leave {task} out, add the file, or leave out --data-dir to read from the Hub."
            )


def _missing(data_dir: str | Path, task: str) -> list[Path]:
    files = [Path(data_dir) / name for name in FILES[task].values()]
    return [file for file in files if not file.is_file()]


def read_splits(data_dir: str | Path, task: str) -> Splits:
    """Read the rows of a task by split, with the columns of the Hub's data set.

    Args:
        data_dir: Folder with the files of :data:`FILES`.
        task: One of :data:`FILES`.

    Raises:
        SempaError: If a file cannot be read, lacks a column, or holds a row that cannot be scored.
    """
    splits: Splits = {}
    for split, name in FILES[task].items():
        file = Path(data_dir) / name
        if task == "wikitext":
            splits[split] = _pages(file)
            continue
        rows = read_rows(file)
        find_columns(rows, [_COLUMNS[task]], str(file))
        splits[split] = _checked(file, task, rows)
    return splits


def _checked(file: Path, task: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    empty = [n for n, row in enumerate(rows, 1) if any(row.get(column) is None for column in _COLUMNS[task])]
    if empty:
        raise SempaError(f"{file}, rows {list_first(empty)}: expected a value in each of {', '.join(_COLUMNS[task])}.")
    if task == "mmlu":
        bad = [n for n, row in enumerate(rows, 1) if len(row["choices"]) != 4 or row["answer"] not in range(4)]
        if bad:
            raise SempaError(
                f"{file}, rows {list_first(bad)}: expected four choices and the index (0-3) of the answer."
            )
    if task == "truthfulqa_mc1":
        bad = [n for n, row in enumerate(rows, 1) if sorted(row["labels"]) != [0] * (len(row["choices"]) - 1) + [1]]
        if bad:
            raise SempaError(f"{file}, rows {list_first(bad)}: expected a label for each choice, 1 for one and 0 else.")
        return [_truth_first(row) for row in rows]
    return rows


def _truth_first(row: dict[str, Any]) -> dict[str, Any]:
    """Put the true choice first, where the harness expects it."""
    ranked = sorted(zip(row["labels"], row["choices"], strict=True), key=lambda pair: -pair[0])
    labels, choices = zip(*ranked, strict=True)
    return {"question": row["question"], "mc1_targets": {"choices": list(choices), "labels": list(labels)}}


def _pages(file: Path) -> list[dict[str, Any]]:
    """Split WikiText at its level-1 headings, like the document-level data set that the harness reads."""
    try:
        lines = file.read_text(encoding=UTF8).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SempaError(f"{file} cannot be read as UTF-8 text: {error}.") from error
    pages: list[list[str]] = [[]]
    for line in lines:
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            pages.append([])
        pages[-1].append(line)
    texts = ["\n".join(page) for page in pages]
    rows: list[dict[str, Any]] = [{"page": text} for text in texts if text.strip()]
    if not rows:
        raise SempaError(f"{file} is empty. Expected text with headings such as ' = Title = '.")
    return rows


def by_subject(splits: Splits, data_dir: str | Path) -> dict[str, Splits]:
    """Group MMLU's rows by subject, each with its own examples (split ``dev``).

    Args:
        splits: What :func:`read_splits` returned for ``mmlu``.
        data_dir: Folder that they were read from, for the error message.

    Raises:
        SempaError: If a subject has questions but too few examples for the prompt.
    """
    subjects: dict[str, Splits] = {}
    for split, rows in splits.items():
        for row in rows:
            subjects.setdefault(row["subject"], {"dev": [], "test": []})[split].append(row)
    asked = {name: subject for name, subject in sorted(subjects.items()) if subject["test"]}
    for name, subject in asked.items():
        if len(subject["dev"]) < MMLU_SHOTS:
            raise SempaError(
                f"{Path(data_dir) / FILES['mmlu']['dev']} has {len(subject['dev'])} examples of {name!r}. "
                f"Expected {MMLU_SHOTS}, which the prompt shows."
            )
    return asked


def parse_limits(text: str | None, tasks: Sequence[str]) -> dict[str, int | None]:
    """Parse ``--limit``: one number for all tasks, or numbers by task. A task without one is scored in full.

    >>> parse_limits("mmlu=2000,gsm8k=200", ["mmlu", "gsm8k", "wikitext"])
    {'mmlu': 2000, 'gsm8k': 200, 'wikitext': None}

    Raises:
        SempaError: If an entry is no number above 0, or names a task that is not scored.
    """
    limits: dict[str, int | None] = dict.fromkeys(tasks)
    for entry in filter(None, split_list(text or "")):
        name, _, number = entry.rpartition("=")
        if name and name not in limits:
            raise SempaError(f"--limit names {name!r}, which is not scored. Tasks of this run: {', '.join(tasks)}.")
        if not number.isdecimal() or int(number) < 1:
            raise SempaError(f"--limit has {entry!r}. Expected a number above 0, or parts such as mmlu=2000,gsm8k=200.")
        limits |= dict.fromkeys([name] if name else tasks, int(number))
    return limits


def subset(sizes: Mapping[str, int], limit: int | None) -> dict[str, list[int]]:
    """Choose the documents to score: the same ones in every run, in proportion to the size of each subtask.

    A smaller subset is contained in a larger one. A subtask without a chosen document is left out.

    Args:
        sizes: Number of documents by subtask (MMLU's subjects, or the task alone).
        limit: Number of documents to choose in total; all when None.

    >>> {name: len(chosen) for name, chosen in subset({"law": 60, "art": 30, "war": 10}, 10).items()}
    {'law': 6, 'art': 3, 'war': 1}
    """
    ranked = []
    for name, size in sizes.items():
        order = list(range(size))
        random.Random(f"sempa generation {name}").shuffle(order)
        ranked += [((rank + 0.5) / size, name, index) for rank, index in enumerate(order)]
    chosen: dict[str, list[int]] = {name: [] for name in sizes}
    for _, name, index in sorted(ranked)[:limit]:
        chosen[name].append(index)
    return {name: sorted(indices) for name, indices in chosen.items() if indices}
