"""Score models on MTEB tasks of any type, and on MTEB's benchmarks."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.data.sts import STS_TASKS
from sempa_st.errors import SempaError, first_line
from sempa_st.evaluation.mteb_models import as_encoder
from sempa_st.evaluation.tasks import quiet
from sempa_st.utils.files import filled_folder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_OUTSIDE_BRACKETS = re.compile(r",(?![^(]*\))")


@dataclass(frozen=True)
class TaskScore:
    """Main score of a task on one of its splits, averaged over its subsets.

    Args:
        task: MTEB's name of the task.
        type: MTEB's type of the task, such as ``Retrieval``.
        split: MTEB's name of the split.
        metric: Name of the main score.
        score: The main score, times 100.
        revision: Revision of the task's data set.
    """

    task: str
    type: str
    split: str
    metric: str
    score: float
    revision: str


def split_names(names: str) -> list[str]:
    """Split a comma-separated list of tasks and benchmarks, in whose names commas stand between brackets.

    >>> split_names("STS12, MTEB(eng, v2)")
    ['STS12', 'MTEB(eng, v2)']
    """
    return list(dict.fromkeys(filter(None, (name.strip() for name in _OUTSIDE_BRACKETS.split(names)))))


def find_tasks(names: Sequence[str]) -> list[Any]:
    """Return MTEB's tasks of these names and of these benchmarks, without their data.

    Args:
        names: Tasks and benchmarks; ``sts`` is the paper's seven tasks.

    Raises:
        SempaError: If MTEB has no task or benchmark of a name.
    """
    tasks: dict[str, Any] = {}
    for name in names:
        found = [_task(task) for task in STS_TASKS] if name.lower() == "sts" else _tasks_of(name)
        for task in found:
            tasks.setdefault(task.metadata.name, task)
    if not tasks:
        raise SempaError(f"No task in {', '.join(names)!r}. Expected names such as STSBenchmark, or sts for all seven.")
    return list(tasks.values())


def _tasks_of(name: str) -> list[Any]:
    import mteb

    with quiet("mteb"):
        if name in {benchmark.name for benchmark in mteb.get_benchmarks()} or "(" in name:
            try:
                return list(mteb.get_benchmark(name).tasks)
            except KeyError as error:
                raise SempaError(f"MTEB has no benchmark {name!r}. {first_line(error)}") from error
    return [_task(name)]


def _task(name: str) -> Any:
    import mteb

    with quiet("mteb"):
        try:
            return mteb.get_task(name)
        except KeyError as error:
            raise SempaError(
                f"MTEB has no task {name!r} ({first_line(error)}). The paper's tasks: {', '.join(STS_TASKS)}."
            ) from error


def score_on_tasks(
    model: SentenceTransformer, tasks: Sequence[Any], *, output: Path, batch_size: int = 32
) -> list[TaskScore]:
    """Score a model on MTEB tasks of any type; tasks whose results ``output`` holds are not run again.

    Args:
        model: Any SentenceTransformer.
        tasks: What :func:`find_tasks` returned.
        output: Folder for MTEB's result files, in the layout of its results repository.
        batch_size: Texts per batch.

    Raises:
        SempaError: If the data of a task cannot be loaded. The results of the tasks before it are kept.
    """
    import mteb

    scores: list[TaskScore] = []
    if not tasks:
        return scores
    encoder = as_encoder(model)
    cache = whole_results(output)
    for task in tasks:
        meta = task.metadata
        with quiet("mteb"):
            if not (task.data_loaded or cache.load_task_result(meta.name, encoder.mteb_model_meta)):
                load_data(task)
            (result,) = mteb.evaluate(
                encoder,
                task,
                cache=cache,
                co2_tracker=False,
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
                show_progress_bar=False,
            ).task_results
        task.unload_data()
        for split in result.scores:
            score = 100 * float(result.get_score([split]))
            check_score(score, meta.name)
            scores.append(TaskScore(meta.name, meta.type, split, meta.main_score, score, meta.revision))
    return scores


def whole_results(folder: Path) -> Any:
    """Return MTEB's cache of results in a folder; each file appears whole, whatever ends or disturbs the process."""
    import mteb

    class WholeResults(mteb.ResultCache):
        def save_to_cache(self, task_result: Any, model_name: Any, *args: Any, **settings: Any) -> None:
            path = self.get_task_result_path(task_result.task_name, model_name, *args)
            with filled_folder(self.cache_path, ()) as scratch:
                earlier = path.with_name("run_settings.jsonl")  # MTEB adds lines to it
                if earlier.is_file():
                    copied = scratch / earlier.relative_to(self.cache_path.resolve())
                    copied.parent.mkdir(parents=True)
                    shutil.copy(earlier, copied)
                mteb.ResultCache(scratch).save_to_cache(task_result, model_name, *args, **settings)

    return WholeResults(folder.resolve())


def check_score(score: float, task: str) -> None:
    """Raise :class:`SempaError` if a score is not a number, as a correlation with equal cosines is."""
    if not math.isfinite(score):
        raise SempaError(
            f"The score of {task} is {score}: the model embeds all sentences alike, so that no cosine differs. Its "
            "weights are damaged, or its training has collapsed."
        )


def load_data(task: Any) -> None:
    """Load the data of a task from the Hub.

    Raises:
        SempaError: If it is out of reach.
    """
    from mteb.abstasks.aggregated_task import AbsTaskAggregate

    try:
        for part in task.metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]:
            part.load_data()
    except Exception as error:  # datasets raises many unrelated types for data that is out of reach
        hint = ", or give local files with --data-dir" if task.metadata.name in STS_TASKS else ""
        raise SempaError(
            f"The data of {task.metadata.name} cannot be loaded from the Hub ({type(error).__name__}). Check the "
            f"network{hint}."
        ) from error
