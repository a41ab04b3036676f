"""Graded sentence pairs: which task and split lies in which file, read and checked."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.data.rows import read_rows
from sempa_st.errors import SempaError
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import lone_surrogates

if TYPE_CHECKING:
    from torch import Tensor

DATA_DIR_VARIABLE = "SEMPA_DATA_DIR"
_SAMPLE = asset_path("sts_sample.jsonl")
COLUMNS = ("sentence1", "sentence2", "score")
PROTOCOLS = ("mteb", "senteval")
"""Both score all subsets of a year together; they differ in SICK-R: all 9,927 rows, or the 4,927 test rows."""
SPLITS = ("test", "dev")
STS_TASKS: dict[str, str] = {
    "STS12": "sts12",
    "STS13": "sts13",
    "STS14": "sts14",
    "STS15": "sts15",
    "STS16": "sts16",
    "STSBenchmark": "stsb",
    "SICK-R": "sickr",
}
"""The seven tasks of the paper: MTEB's name and the stem of the local file ``sts/<stem>.<split>.parquet``."""


@dataclass(frozen=True)
class GradedPairs:
    """Sentence pairs with a similarity grade each; the three sequences are of equal length."""

    first: Sequence[str]
    second: Sequence[str]
    scores: Sequence[float]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def sentences(self) -> list[str]:
        """The distinct sentences, in the order in which they come."""
        return list(dict.fromkeys([*self.first, *self.second]))

    def spearman(self, vectors: Tensor) -> float:
        """Return the Spearman correlation (times 100) of the cosine with the grades.

        Args:
            vectors: Of :attr:`sentences`, of shape (sentences, width).
        """
        from scipy.stats import spearmanr
        from sentence_transformers.util import pairwise_cos_sim

        place = {sentence: index for index, sentence in enumerate(self.sentences)}
        first, second = (vectors[[place[sentence] for sentence in side]] for side in (self.first, self.second))
        return 100 * float(spearmanr(pairwise_cos_sim(first, second).cpu(), self.scores).statistic)


def local_files(data_dir: str | Path, task: str, split: str, protocol: str) -> list[Path]:
    """Return the files in ``data_dir`` that make up a split of a task under a protocol.

    Raises:
        SempaError: If there is no local layout for it, or a file is missing.
    """
    if task not in STS_TASKS:
        raise SempaError(f"{data_dir} cannot hold the task {task!r}. Local tasks: {', '.join(STS_TASKS)}.")
    parts: Sequence[str] = (split,)
    if task == "SICK-R" and protocol == "mteb":
        if split != "test":
            raise SempaError("MTEB's SICK-R has no dev split: it scores all rows as test. Use --protocol senteval.")
        parts = ("train", "dev", "test")
    files = [Path(data_dir) / "sts" / f"{STS_TASKS[task]}.{part}.parquet" for part in parts]
    for file in files:
        if not file.is_file():
            raise SempaError(f"There is no {split} split of {task} in {data_dir}: {file} does not exist.")
    return files


def data_dir_or_default(data_dir: str | None) -> str | None:
    """Return ``data_dir``, or the environment variable ``SEMPA_DATA_DIR`` where it is set."""
    return data_dir or os.environ.get(DATA_DIR_VARIABLE) or None


def read_pairs(files: Sequence[str | Path]) -> GradedPairs:
    """Read graded pairs (columns sentence1, sentence2, score) from one or more files, one after another.

    Raises:
        SempaError: On missing columns, sentences that are no text, or scores that are no finite numbers; names the row.
    """
    return _pairs(row for file in files for row in _checked(read_rows(file), str(file)))


def _pairs(rows: Iterable[tuple[str, str, float]]) -> GradedPairs:
    held = list(rows)
    first, second, scores = ([row[place] for row in held] for place in range(len(COLUMNS)))
    return GradedPairs(first, second, scores)  # type: ignore[arg-type]


def _checked(rows: Sequence[dict[str, Any]], source: str) -> Iterable[tuple[str, str, float]]:
    """Yield what stands in :data:`COLUMNS`, or raise :class:`SempaError` that names the row."""
    if not rows or not set(COLUMNS) <= rows[0].keys():
        found = ", ".join(map(str, rows[0])) if rows else "none"
        raise SempaError(f"{source} has the columns ({found}). Expected ({', '.join(COLUMNS)}).")
    for number, row in enumerate(rows, 1):
        one, two, score = (row.get(column) for column in COLUMNS)
        try:
            grade = float(score)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            grade = math.nan
        texts = all(isinstance(text, str) and not lone_surrogates(text) for text in (one, two))
        if not (texts and math.isfinite(grade)):
            raise SempaError(f"{source}, row {number}: expected two sentences and a number, got {row!a:.200}.")
        yield one, two, grade  # type: ignore[misc]


def dev_pairs(dev: str, data_dir: str | None) -> GradedPairs:
    """Return the pairs that a checkpoint is chosen on; at least two, of different grades.

    Args:
        dev: ``stsb`` (STS-B dev, from ``data_dir`` or else from the Hub), ``sample`` (the pairs this package ships),
            or a csv, jsonl or parquet file.
        data_dir: Folder with ``sts/stsb.dev.parquet``, or None.

    Raises:
        SempaError: If the pairs cannot be read.
    """
    pairs = _stsb_dev(data_dir) if dev == "stsb" else read_pairs([_SAMPLE if dev == "sample" else dev])
    if len(set(pairs.scores)) < 2:
        raise SempaError(
            f"The dev pairs {dev!r} cannot rank a model: expected two grades at least, got {len(pairs)} pair(s)."
        )
    return pairs


def _stsb_dev(data_dir: str | None) -> GradedPairs:
    if data_dir:
        return read_pairs(local_files(data_dir, "STSBenchmark", "dev", "mteb"))
    from sempa_st.utils.hub import hub_rows

    try:
        rows = hub_rows("mteb/stsbenchmark-sts", split="validation")
    except SempaError as error:
        raise SempaError(
            f"STS-B dev is needed to choose the best checkpoint. {error} Offline, pass --data-dir with a folder that "
            "holds sts/stsb.dev.parquet, or --dev sample for the pairs that this package ships."
        ) from error
    return _pairs(_checked(rows, "mteb/stsbenchmark-sts (validation)"))
