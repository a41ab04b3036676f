"""SentEval's transfer tasks (Conneau and Kiela 2018): a logistic regression on frozen sentence vectors.

For a pair of sentences with vectors u and v the features are ``[|u - v|, u * v]``. The inverse strength of the L2
penalty, C, is chosen among :data:`STRENGTHS` as SentEval chooses it for each task: on dev rows, or by 10 folds of the
training rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sempa_st.data.rows import find_columns, read_rows
from sempa_st.errors import SempaError, list_first
from sempa_st.evaluation.mteb_tasks import TaskScore, check_score
from sempa_st.utils.finite import check_finite
from sempa_st.utils.run_info import fingerprint

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

STRENGTHS = [2.0**power for power in range(-2, 4)]
"""Values of C that SentEval tries."""
_FOLDS, _SEED = 10, 1111  # SentEval's
_LEAST = 3
"""Rows of a label, so that one is left when folds of folds have taken theirs."""


@dataclass(frozen=True)
class TransferTask:
    """A transfer task and its local files, ``FOLDER/STEM.SPLIT.parquet`` in the data folder.

    Args:
        stem: Beginning of the files' names, with their folder.
        splits: Their splits. With one of them, the score is the mean over 10 folds; C is chosen on ``dev`` if there is
            one, else by folds.
        columns: Columns of the sentences, one or two, and of the label.
    """

    stem: str
    splits: tuple[str, ...] = ("train", "dev", "test")
    columns: tuple[str, ...] = ("sentence", "label")


_PAIR = ("sentence1", "sentence2", "label")
TRANSFER_TASKS: dict[str, TransferTask] = {
    "MR": TransferTask("transfer/mr", ("all",)),
    "CR": TransferTask("transfer/cr", ("all",)),
    "SUBJ": TransferTask("transfer/subj", ("all",)),
    "MPQA": TransferTask("transfer/mpqa", ("all",)),
    "SST2": TransferTask("transfer/sst2"),
    "TREC": TransferTask("transfer/trec", ("train", "test")),
    "MRPC": TransferTask("transfer/mrpc", ("train", "test"), _PAIR),
    "SICK-E": TransferTask("sts/sickr", columns=("sentence1", "sentence2", "entailment")),
}
"""SentEval's seven transfer tasks, and SICK's entailment."""
ALL = "transfer"
"""Name for all of them that are at hand."""


@dataclass(frozen=True)
class Rows:
    """Labelled sentences or pairs; ``sentences`` holds one or two sequences of equal length."""

    sentences: tuple[Sequence[str], ...]
    labels: Sequence[Any]


def read_task(name: str, data_dir: str | None) -> dict[str, Rows]:
    """Return the rows of a transfer task by split.

    Args:
        name: One of :data:`TRANSFER_TASKS`.
        data_dir: Folder with its files.

    Raises:
        SempaError: If there is no data folder, or a file is missing, or a row has no sentence or no label.
    """
    task = TRANSFER_TASKS[name]
    if data_dir is None:
        raise SempaError(f"{name} is read from local files. Give their folder with --data-dir, or SEMPA_DATA_DIR.")
    rows = {}
    for split in task.splits:
        path = Path(data_dir, f"{task.stem}.{split}.parquet")
        if not path.is_file():
            raise SempaError(f"{name} needs {path}, with the columns {', '.join(task.columns)}, which does not exist.")
        found = read_rows(path)
        find_columns(found, [task.columns], str(path))
        for number, row in enumerate(found, 1):
            *texts, label = (row.get(column) for column in task.columns)
            if label is None or not all(isinstance(text, str) for text in texts):
                raise SempaError(
                    f"{path}, row {number}: expected sentences and a label, got {row!a:.200}. Fix the row."
                )
        *sentences, labels = ([row[column] for row in found] for column in task.columns)
        _check_labels(path, split, labels)
        rows[split] = Rows(tuple(sentences), labels)
    return rows


def _check_labels(path: Path, split: str, labels: Sequence[Any]) -> None:
    """Raise :class:`SempaError` unless a classifier can learn the labels, in each fold where there are folds."""
    counts = Counter(labels) if all(isinstance(label, str | int) for label in labels) else Counter()
    learned = split in ("all", "train")
    few = len(labels) < _FOLDS or len(counts) < 2 or min(counts.values()) < _LEAST
    if not counts or (learned and few):
        raise SempaError(
            f"{path} has {len(labels)} rows with the labels {list_first(list(dict.fromkeys(map(str, labels))), 5)}. "
            f"Expected {_FOLDS} rows or more, and whole numbers or names, two or more of them, each in {_LEAST} rows "
            "or more."
        )


def load_transfer(names: Sequence[str], data_dir: str | None) -> dict[str, dict[str, Rows]]:
    """Return the rows of transfer tasks by task and split.

    Args:
        names: Some of :data:`TRANSFER_TASKS`, or :data:`ALL` for those whose files are all in the data folder.
        data_dir: Folder with their files.

    Raises:
        SempaError: If data is missing or wrong.
    """
    expanded = [task for name in names for task in (_available(data_dir) if name == ALL else [name])]
    if names and not expanded:
        raise SempaError(f"{data_dir or 'No data folder'} has the files of none of: {', '.join(TRANSFER_TASKS)}.")
    return {name: read_task(name, data_dir) for name in expanded}


def _available(data_dir: str | None) -> list[str]:
    return [
        name
        for name, task in TRANSFER_TASKS.items()
        if data_dir and all(Path(data_dir, f"{task.stem}.{split}.parquet").is_file() for split in task.splits)
    ]


def score_transfer(
    model: SentenceTransformer, tasks: Mapping[str, Mapping[str, Rows]], *, batch_size: int = 32
) -> list[TaskScore]:
    """Score a model on transfer tasks: accuracy times 100; the revision is a digest of the rows.

    Args:
        model: Any SentenceTransformer.
        tasks: What :func:`load_transfer` returned.
        batch_size: Sentences per batch.

    Raises:
        SempaError: If a vector is not finite.
    """
    scores = []
    for name, rows in tasks.items():
        splits = {split: (features(model, each.sentences, batch_size), each.labels) for split, each in rows.items()}
        check_score(accuracy := 100 * probe(splits), name)
        revision = fingerprint(row for each in rows.values() for row in zip(*each.sentences, each.labels, strict=True))
        scores.append(TaskScore(name, "Transfer", list(rows)[-1], "accuracy", accuracy, revision[:40]))
    return scores


def features(model: SentenceTransformer, sentences: Sequence[Sequence[str]], batch_size: int = 32) -> NDArray[Any]:
    """Return the features of sentences, of shape (rows, hidden), or of pairs, of shape (rows, 2 hidden).

    Args:
        model: Any SentenceTransformer.
        sentences: One sequence of sentences, or two of equal length.
        batch_size: Sentences per batch.
    """
    distinct = list(dict.fromkeys(text for side in sentences for text in side))
    vectors = model.encode(distinct, batch_size=batch_size, show_progress_bar=False)
    check_finite(vectors, distinct)
    index = {text: number for number, text in enumerate(distinct)}
    sides = [vectors[[index[text] for text in side]] for side in sentences]
    return sides[0] if len(sides) == 1 else np.hstack([np.abs(sides[0] - sides[1]), sides[0] * sides[1]])


def probe(splits: dict[str, tuple[NDArray[Any], Sequence[Any]]]) -> float:
    """Return the accuracy of a logistic regression, from 0 to 1.

    Args:
        splits: Features, of shape (rows, width), and labels by split: ``all``, or ``train``, ``test`` and maybe
            ``dev``.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score

    def classifier(strength: float = 1.0) -> Any:
        return LogisticRegression(C=strength, max_iter=1000, random_state=_SEED)

    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=_SEED)
    by_folds = GridSearchCV(classifier(), {"C": STRENGTHS}, cv=folds, error_score="raise")
    if "all" in splits:
        return fmean(cross_val_score(by_folds, *splits["all"], cv=folds, error_score="raise"))
    if "dev" not in splits:
        return float(by_folds.fit(*splits["train"]).score(*splits["test"]))
    fitted = [classifier(strength).fit(*splits["train"]) for strength in STRENGTHS]
    return float(max(fitted, key=lambda each: each.score(*splits["dev"])).score(*splits["test"]))
