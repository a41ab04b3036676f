"""Load graded sentence pairs for STS: find the files of a task and split, read and validate them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.data.rows import find_columns, read_rows
from sempa_st.errors import SempaError
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import lone_surrogates
from sempa_st.utils.run_info import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

DATA_DIR_VARIABLE = "SEMPA_DATA_DIR"
_SAMPLE = asset_path("sts_sample.jsonl")
COLUMNS = ("sentence1", "sentence2", "score")
PROTOCOLS = ("mteb", "senteval")
"""Both score all subsets of a year as one set. On SICK-R, MTEB uses all 9,927 pairs, SentEval the 4,927 test pairs."""
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
"""The paper's seven tasks: MTEB's name and the stem of the local file ``sts/<stem>.<split>.parquet``."""
MTEB_DATASETS = {task: f"mteb/{task.lower().replace('-', '')}-sts" for task in STS_TASKS}
"""The Hub's data sets of these tasks."""


@dataclass(frozen=True)
class GradedPairs:
    """Sentence pairs, each with a similarity grade; the three sequences have equal length."""

    first: Sequence[str]
    second: Sequence[str]
    scores: Sequence[float]

    def __len__(self) -> int:
        return len(self.scores)

    def fingerprint(self) -> str:
        """Return the SHA-256 digest (hex) of the pairs, order included."""
        return fingerprint(zip(self.first, self.second, self.scores, strict=True))

    @property
    def sentences(self) -> list[str]:
        """The distinct sentences, in order of first occurrence."""
        return list(dict.fromkeys([*self.first, *self.second]))

    def cosines(self, vectors: Tensor) -> Tensor:
        """Return the cosine similarity of each pair, of shape (pairs,).

        Args:
            vectors: Embeddings of :attr:`sentences`, of shape (sentences, hidden).
        """
        from sentence_transformers.util import pairwise_cos_sim

        index_of = {sentence: index for index, sentence in enumerate(self.sentences)}
        first, second = (vectors[[index_of[sentence] for sentence in side]] for side in (self.first, self.second))
        return pairwise_cos_sim(first, second)

    def spearman(self, vectors: Tensor) -> float:
        """Return the Spearman correlation, times 100, of :meth:`cosines` with the grades."""
        from scipy.stats import spearmanr

        return 100 * float(spearmanr(self.cosines(vectors).cpu(), self.scores).statistic)


def local_files(data_dir: str | Path, task: str, split: str, protocol: str) -> list[Path]:
    """Return the files in ``data_dir`` that hold a task's split under a protocol.

    Raises:
        SempaError: If the task or split has no local file, or the file is missing.
    """
    if task not in STS_TASKS:
        raise SempaError(f"{data_dir} cannot hold the task {task!r}. Local tasks: {', '.join(STS_TASKS)}.")
    file_splits: Sequence[str] = (split,)
    if task == "SICK-R" and protocol == "mteb":
        if split != "test":
            raise SempaError("MTEB's SICK-R has no dev split: it scores all pairs as test. Use --protocol senteval.")
        file_splits = ("train", "dev", "test")
    files = [Path(data_dir) / "sts" / f"{STS_TASKS[task]}.{name}.parquet" for name in file_splits]
    for file in files:
        if not file.is_file():
            raise SempaError(f"There is no {split} split of {task} in {data_dir}: {file} does not exist.")
    return files


def data_dir_or_default(data_dir: str | None) -> str | None:
    """Return ``data_dir``, or the environment variable ``SEMPA_DATA_DIR`` if that is set."""
    return data_dir or os.environ.get(DATA_DIR_VARIABLE) or None


def read_pairs(files: Sequence[str | Path]) -> GradedPairs:
    """Read and concatenate the graded pairs of one or more files with the columns sentence1, sentence2 and score.

    Raises:
        SempaError: On a missing column, or a row with an invalid sentence or a score that is not a finite number.
    """
    return _pairs(row for file in files for row in _checked(read_rows(file), str(file)))


def _pairs(rows: Iterable[tuple[str, str, float]]) -> GradedPairs:
    checked = list(rows)
    first, second, scores = ([row[column] for row in checked] for column in range(len(COLUMNS)))
    return GradedPairs(first, second, scores)  # type: ignore[arg-type]


def _checked(rows: Sequence[dict[str, Any]], source: str) -> Iterable[tuple[str, str, float]]:
    """Yield the :data:`COLUMNS` of each row; raises :class:`SempaError` on an invalid one."""
    find_columns(rows, [COLUMNS], source)
    for number, row in enumerate(rows, 1):
        first, second, score = (row.get(column) for column in COLUMNS)
        try:
            grade = float(score)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            grade = math.nan
        texts = all(isinstance(text, str) and not lone_surrogates(text) for text in (first, second))
        if not (texts and math.isfinite(grade)):
            raise SempaError(
                f"{source}, row {number}: expected two sentences and a number, got {row!a:.200}. Fix the row."
            )
        yield first, second, grade  # type: ignore[misc]


def dev_pairs(dev: str, data_dir: str | None) -> GradedPairs:
    """Return the dev pairs that checkpoints are selected on.

    Args:
        dev: ``stsb`` (STS-B dev, from ``data_dir`` or else from the Hub), ``sample`` (the pairs shipped with this
            package), or a csv, jsonl or parquet file.
        data_dir: Folder with ``sts/stsb.dev.parquet``; that of ``SEMPA_DATA_DIR``, if set, when None.

    Raises:
        SempaError: If the pairs cannot be read, or all have the same grade.
    """
    pairs = _stsb_dev(data_dir) if dev == "stsb" else read_pairs([_SAMPLE if dev == "sample" else dev])
    if len(set(pairs.scores)) < 2:
        raise SempaError(
            f"The dev pairs {dev!r} cannot rank a model: expected at least two different grades, got {len(pairs)} "
            "pair(s) with one grade. Choose other pairs with --dev."
        )
    return pairs


def _stsb_dev(data_dir: str | None) -> GradedPairs:
    if data_dir := data_dir_or_default(data_dir):
        return read_pairs(local_files(data_dir, "STSBenchmark", "dev", "mteb"))
    from sempa_st.utils.hub import hub_rows

    try:
        rows = hub_rows("mteb/stsbenchmark-sts", split="validation")
    except SempaError as error:
        raise SempaError(
            f"STS-B dev is needed to select the best checkpoint. {error} Offline, pass --data-dir with a folder that "
            "holds sts/stsb.dev.parquet, or --dev sample for the pairs shipped with this package."
        ) from error
    return _pairs(_checked(rows, "mteb/stsbenchmark-sts (validation)"))
