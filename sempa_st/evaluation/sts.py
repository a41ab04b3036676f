"""Score models on STS tasks with MTEB's own task classes, on data from the Hub or from local files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.data.sts import PROTOCOLS, SPLITS, STS_TASKS, data_dir_or_default, local_files, read_pairs
from sempa_st.errors import SempaError, check_known
from sempa_st.evaluation.encode_cache import EncodeCost, encode_cache
from sempa_st.evaluation.mteb_models import as_encoder
from sempa_st.evaluation.mteb_tasks import (
    TaskScore,
    check_score,
    find_tasks,
    load_data,
    score_on_tasks,
    split_names,
    whole_results,
)
from sempa_st.evaluation.tasks import quiet
from sempa_st.evaluation.transfer import ALL, TRANSFER_TASKS, load_transfer, score_transfer
from sempa_st.loading import load
from sempa_st.utils.extras import require
from sempa_st.utils.options import split_list

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_HUB_SPLITS = {"test": "test", "dev": "validation"}
PROTOCOLS_DIFFER = ("SICK-R",)
_SENTEVAL_FROM_HUB = set(STS_TASKS).difference(PROTOCOLS_DIFFER)


def evaluate(
    model: str | SentenceTransformer,
    tasks: str | Sequence[str] = "sts",
    *,
    split: str = "test",
    protocol: str = "mteb",
    data_dir: str | None = None,
    output: str | Path | None = None,
    batch_size: int = 32,
    **options: Any,
) -> dict[str, float]:
    """Score a model on MTEB tasks of any type: ``sempa evaluate`` from Python.

    Args:
        model: What :func:`sempa_st.load` takes, or any SentenceTransformer.
        tasks: MTEB's names of tasks and benchmarks, such as ``MTEB(eng, v2)``, ``sts`` for the paper's seven tasks,
            SentEval's transfer tasks such as ``SICK-E``, or ``transfer`` for those that are in ``data_dir``.
        split: ``test``, or ``dev`` for the paper's seven tasks; other tasks are scored on their own splits.
        protocol: ``mteb`` or ``senteval``; they differ in SICK-R.
        data_dir: Folder with ``sts/*.parquet`` and ``transfer/*.parquet``; that of ``SEMPA_DATA_DIR`` or else the Hub
            when None.
        output: Folder for MTEB's result files; they are not kept when None.
        batch_size: Sentences per batch.
        **options: Arguments of :func:`sempa_st.load`, for a model that is to be loaded.

    Returns:
        Main score times 100 by task (for STS the Spearman correlation of the cosine with the grades); of a task with
        several splits, by task and split.

    Raises:
        SempaError: On an unknown model, task, split or protocol, or if data or a package is missing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pairs, others = score_tasks(
            model,
            tasks,
            split=split,
            protocols=[protocol],
            data_dir=data_dir,
            output=output or scratch,
            batch_size=batch_size,
            **options,
        )
    several = {score.task for score in others if sum(score.task == other.task for other in others) > 1}
    by_name = {
        f"{score.task} ({score.split})" if score.task in several else score.task: score.score for score in others
    }
    return {**{score.task: score.spearman for score in pairs}, **by_name}


def score_tasks(
    model: str | SentenceTransformer,
    tasks: str | Sequence[str],
    *,
    split: str,
    protocols: Sequence[str],
    data_dir: str | None,
    output: str | Path,
    batch_size: int,
    **options: Any,
) -> tuple[list[Score], list[TaskScore]]:
    """Load tasks and a model, and return the model's scores on the paper's seven tasks, and those on all others.

    Arguments are as for :func:`evaluate`.
    """
    require("mteb", "datasets", extra="eval", purpose="Evaluation")
    data_dir = data_dir_or_default(data_dir)
    names = split_names(tasks) if isinstance(tasks, str) else list(tasks)
    probes = [name for name in names if name in TRANSFER_TASKS or name == ALL]
    rest = [name for name in names if name not in probes]
    found = find_tasks(rest) if rest or not probes else []
    sts = [task.metadata.name for task in found if task.metadata.name in STS_TASKS]
    others = [task for task in found if task.metadata.name not in STS_TASKS]
    if split != "test" and (others or probes):
        name = probes[0] if probes else others[0].metadata.name
        raise SempaError(f"--split {split} is for the tasks {', '.join(STS_TASKS)}, not for {name}.")
    transfer = load_transfer(probes, data_dir)
    cells = load_cells(sts, split=split, protocols=protocols, data_dir=data_dir)
    opened = load(model, **options) if isinstance(model, str) else model
    pairs = score_cells(opened, cells, output=Path(output), batch_size=batch_size)
    probed = score_transfer(opened, transfer, batch_size=batch_size)
    results = Path(output) / "mteb" / "mteb"
    return pairs, [*probed, *score_on_tasks(opened, others, output=results, batch_size=batch_size)]


@dataclass(frozen=True)
class Score:
    """Score of one :class:`Cell`.

    Args:
        task: MTEB's name of the task.
        split: ``test`` or ``dev``.
        protocol: ``mteb`` or ``senteval``.
        pairs: Number of sentence pairs scored.
        spearman: Spearman correlation of the cosine with the grade, times 100.
    """

    task: str
    split: str
    protocol: str
    pairs: int
    spearman: float


def expand_tasks(names: str) -> list[str]:
    """Split a comma-separated list of tasks and replace ``sts`` by the paper's seven.

    >>> expand_tasks("STSBenchmark,STS12")
    ['STSBenchmark', 'STS12']

    Raises:
        SempaError: If it is empty.
    """
    tasks: list[str] = []
    for name in filter(None, split_list(names)):
        tasks += list(STS_TASKS) if name.lower() == "sts" else [name]
    if not tasks:
        raise SempaError(f"No task in {names!r}. Expected names such as STSBenchmark, or sts for all seven.")
    return list(dict.fromkeys(tasks))


@dataclass(frozen=True)
class Cell:
    """A loaded task, the split to score and the protocol to score it by."""

    task: Any
    split: str
    protocol: str


def load_cells(
    tasks: Sequence[str],
    *,
    split: str = "test",
    protocols: Sequence[str] = ("mteb",),
    data_dir: str | None = None,
) -> list[Cell]:
    """Load MTEB's task classes with their data.

    Args:
        tasks: MTEB names; see :func:`expand_tasks`.
        split: ``test`` or ``dev``.
        protocols: Any of ``mteb`` and ``senteval``.
        data_dir: Folder with ``sts/*.parquet``; that of ``SEMPA_DATA_DIR`` or else the Hub when None.

    Raises:
        SempaError: On an unknown task, split or protocol, or if data or a package is missing.
    """
    require("mteb", "datasets", extra="eval", purpose="Evaluation")
    check_known(split, SPLITS, "split")
    for protocol in protocols:
        check_known(protocol, PROTOCOLS, "protocol")
    data_dir = data_dir_or_default(data_dir)
    return [Cell(_task(task, split, protocol, data_dir), split, protocol) for task in tasks for protocol in protocols]


def score_cells(
    model: SentenceTransformer,
    cells: Sequence[Cell],
    *,
    output: Path,
    batch_size: int = 32,
    report: Callable[[Score, EncodeCost], None] | None = None,
) -> list[Score]:
    """Score a model on loaded tasks; a sentence that occurs several times is encoded once.

    Args:
        model: Any SentenceTransformer.
        cells: What :func:`load_cells` returned.
        output: Folder for MTEB's result files.
        batch_size: Sentences per batch.
        report: Called after each task with its score and the cost of encoding so far.
    """
    done: dict[tuple[str, str, str], Score] = {}
    scores: list[Score] = []
    if not cells:
        return scores
    encoder = as_encoder(model)
    with encode_cache(model) as cost:
        for cell in cells:
            name = cell.task.metadata.name
            key = (name, cell.split, cell.protocol if name in PROTOCOLS_DIFFER else "")
            if key not in done:
                done[key] = _score(encoder, cell, output, batch_size)
            scores.append(replace(done[key], protocol=cell.protocol))
            if report:
                report(scores[-1], cost)
    return scores


def _task(name: str, split: str, protocol: str, data_dir: str | None) -> Any:
    import mteb
    from datasets import Dataset, DatasetDict

    with quiet("mteb"):
        try:
            task = mteb.get_task(name, eval_splits=[_HUB_SPLITS[split]])
        except KeyError as error:
            raise SempaError(f"MTEB has no task {name!r}. The paper's tasks: {', '.join(STS_TASKS)}.") from error
        except ValueError as error:
            raise SempaError(f"MTEB's task {name} has no {split} split: {error}") from error
    if data_dir:
        pairs = read_pairs(local_files(data_dir, name, split, protocol))
        columns = {"sentence1": pairs.first, "sentence2": pairs.second, "score": pairs.scores}
        task.dataset = DatasetDict({_HUB_SPLITS[split]: Dataset.from_dict(columns)})
        task.data_loaded = True
    elif protocol == "senteval" and name not in _SENTEVAL_FROM_HUB:
        raise SempaError(f"The Hub's {name} does not mark SentEval's rows. Give local files with --data-dir.")
    else:
        load_data(task)
    if _HUB_SPLITS[split] not in task.dataset:
        raise SempaError(f"MTEB's {name} has no {split} split, only: {', '.join(task.dataset)}.")
    return task


def _score(encoder: Any, cell: Cell, output: Path, batch_size: int) -> Score:
    import mteb

    task = cell.task
    with quiet("mteb"):
        result = mteb.evaluate(
            encoder,
            task,
            cache=whole_results(output / "mteb" / cell.protocol),
            overwrite_strategy="always",
            co2_tracker=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": True},
            show_progress_bar=False,
        )
    hub_split = _HUB_SPLITS[cell.split]
    spearman = 100 * result.task_results[0].scores[hub_split][0]["cosine_spearman"]
    check_score(spearman, task.metadata.name)
    return Score(task.metadata.name, cell.split, cell.protocol, len(task.dataset[hub_split]), spearman)
