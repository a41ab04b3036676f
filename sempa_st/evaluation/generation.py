"""Measure how well a model still generates, with lm-evaluation-harness's task definitions, but for DROP's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError
from sempa_st.evaluation.drop import DROP_CHANGES
from sempa_st.evaluation.generation_data import (
    FILES,
    MMLU_SHOTS,
    Splits,
    by_subject,
    check_local_files,
    read_splits,
    subset,
)
from sempa_st.evaluation.tasks import quiet
from sempa_st.model.tokenizer import own_chat_template
from sempa_st.utils.extras import require
from sempa_st.utils.options import split_list

if TYPE_CHECKING:
    from sempa_st.model.prompt_eol import PromptEOL

_FEWSHOT_SEED = 1234  # the harness's own default, for the tasks whose examples are drawn
_SPLIT_KEYS = {"training_split": "train", "validation_split": "validation"}


@dataclass(frozen=True)
class Measure:
    """A task of the harness, and the metric to read from its results.

    Args:
        folder: Folder of the task's definition in the harness.
        harness_task: The harness's name; MMLU has one task per subject.
        shots: Solved examples in the prompt.
        key: Metric and filter in the harness's results.
        metric: Name to display.
        percent: Whether the metric is a share, which is reported times 100 and averaged over tasks.
        changes: Fields of the harness's definition that are replaced.
    """

    folder: str
    harness_task: str
    shots: int
    key: str
    metric: str
    percent: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)


MEASURES: dict[str, Measure] = {
    "mmlu": Measure("mmlu/default", "mmlu", MMLU_SHOTS, "acc,none", "accuracy"),
    "truthfulqa_mc1": Measure("truthfulqa", "truthfulqa_mc1", 0, "acc,none", "accuracy"),
    "gsm8k": Measure("gsm8k", "gsm8k_cot", 8, "exact_match,strict-match", "exact match"),
    "hellaswag": Measure("hellaswag", "hellaswag", 0, "acc_norm,none", "accuracy (norm.)"),
    "drop": Measure("drop", "drop", 3, "f1,none", "F1", changes=DROP_CHANGES),
    "wikitext": Measure("wikitext", "wikitext", 0, "word_perplexity,none", "word perplexity", percent=False),
}
"""The paper's five tasks with its numbers of shots, and WikiText-2."""


@dataclass(frozen=True)
class GenerationScore:
    """Score of one task in one metric.

    Args:
        task: One of :data:`MEASURES`.
        metric: Name of the metric.
        n: Number of documents scored.
        shots: Solved examples in the prompt.
        score: Share times 100, or a perplexity (lower is better).
        stderr: Standard error of ``score``, or None if the harness gives none.
        percent: Whether ``score`` is a share times 100 and goes into the average.
    """

    task: str
    metric: str
    n: int
    shots: int
    score: float
    stderr: float | None
    percent: bool


@dataclass(frozen=True)
class LoadedTask:
    """A task with its data.

    Args:
        name: One of :data:`MEASURES`.
        group: The harness's group of the subtasks, which aggregates their scores if there are several.
        subtasks: The harness's tasks by name: MMLU's subjects, or the task alone.
        chosen: Indices of the documents to score, by subtask.
    """

    name: str
    group: Any
    subtasks: dict[str, Any]
    chosen: dict[str, list[int]]


def parse_tasks(names: str) -> list[str]:
    """Split and check a comma-separated list of tasks.

    >>> parse_tasks("mmlu, wikitext")
    ['mmlu', 'wikitext']

    Raises:
        SempaError: If it is empty or a task is unknown.
    """
    tasks = list(dict.fromkeys(filter(None, split_list(names))))
    for name in tasks or [names]:
        if name not in MEASURES:
            raise SempaError(f"Unknown generation task {name!r}. Expected some of: {', '.join(MEASURES)}.")
    return tasks


def load_tasks(
    names: Sequence[str], *, data_dir: str | None = None, limits: Mapping[str, int | None] | None = None
) -> list[LoadedTask]:
    """Load the harness's tasks with their data, and choose the documents to score.

    Args:
        names: Some of :data:`MEASURES`.
        data_dir: Folder with the files of :data:`sempa_st.evaluation.generation_data.FILES`; the Hub when None.
        limits: Number of documents to score by task; all if missing or None.

    Raises:
        SempaError: If the data of a task cannot be read, or a package is missing.
    """
    require("lm_eval", "datasets", extra="eval", purpose="Measuring generation")
    if data_dir:
        check_local_files(data_dir, names)
    return [_load(name, data_dir, (limits or {}).get(name)) for name in names]


def _load(name: str, data_dir: str | None, limit: int | None) -> LoadedTask:
    import lm_eval
    from lm_eval.config.group import AggMetricConfig
    from lm_eval.tasks import TaskManager

    measure = MEASURES[name]
    folder = Path(lm_eval.__file__).parent / "tasks" / measure.folder
    with _quiet_harness():
        manager = TaskManager(include_defaults=False, include_path=folder)
        configs = _local_configs(name, data_dir) if data_dir else _hub_configs(name, manager.all_subtasks)
        unknown = [config["task"] for config in configs if config["task"] not in manager.all_subtasks]
        if unknown:
            raise SempaError(
                f"{data_dir}/{FILES[name]['test']} has the unknown subject {unknown[0].removeprefix('mmlu_')!r}."
            )
        try:
            loaded = manager.load([{"group": f"sempa_{name}", "task": configs}])
        except Exception as error:  # datasets raises many unrelated types for data that is out of reach
            source = f"taken from {data_dir}" if data_dir else "loaded from the Hub"
            raise SempaError(
                f"The data of {name} cannot be {source} ({type(error).__name__}: {error}). Check the network, or give "
                "local files with --data-dir."
            ) from error
        group = loaded["groups"][f"sempa_{name}"]
        chosen = subset({subtask: len(task.eval_docs) for subtask, task in loaded["tasks"].items()}, limit)
    for subtask in loaded["tasks"].keys() - chosen.keys():
        group.pop(subtask)
    metric, kind = measure.key.split(",")
    group.aggregate_metric_list = [AggMetricConfig(metric, [kind])] if len(configs) > 1 else None
    return LoadedTask(name, group, {subtask: loaded["tasks"][subtask] for subtask in chosen}, chosen)


def _hub_configs(name: str, known: Sequence[str]) -> list[dict[str, Any]]:
    measure = MEASURES[name]
    names = [task for task in known if task.startswith("mmlu_")] if name == "mmlu" else [measure.harness_task]
    return [{"task": task, "num_fewshot": measure.shots, **measure.changes} for task in names]


def _local_configs(name: str, data_dir: str) -> list[dict[str, Any]]:
    """Return the harness's configuration of each subtask, with local data in place of its own."""
    measure = MEASURES[name]
    splits = read_splits(data_dir, name)
    splits_of = {measure.harness_task: splits}
    if name == "mmlu":
        splits_of = {f"mmlu_{subject}": rows for subject, rows in by_subject(splits, data_dir).items()}
    absent = {key: None for key, split in _SPLIT_KEYS.items() if split not in splits}
    common = {"num_fewshot": measure.shots, **measure.changes, **absent}
    return [{"task": task, "custom_dataset": _dataset(rows), **common} for task, rows in splits_of.items()]


def _dataset(splits: Splits) -> Callable[..., Any]:
    def build(**_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})

    return build


class GenerationEvaluator:
    """Scores one model on loaded tasks.

    Args:
        module: First module of what :func:`sempa_st.load` returns.
        batch_size: Prompts per batch.
        chat: Whether to put prompts into the tokenizer's chat template. The paper's authors do not, with Instruct bases
            either.

    Raises:
        SempaError: If ``chat`` is True and there is no chat template.
    """

    def __init__(self, module: PromptEOL, *, batch_size: int = 32, chat: bool = False) -> None:
        from sempa_st.evaluation.shared_prefix import SharedPrefixLM

        self.chat = chat
        if chat and own_chat_template(module.tokenizer) is None:
            raise SempaError("The tokenizer has no chat template of its own. Leave out --chat.")
        with _quiet_harness():
            self.lm = SharedPrefixLM(
                pretrained=module.model,
                tokenizer=module.tokenizer,
                backend="causal",
                batch_size=batch_size,
                softmax_dtype="float32",
            )

    def score(self, task: LoadedTask) -> list[GenerationScore]:
        """Score one task. WikiText gives two scores: perplexity per word and per token."""
        from lm_eval.evaluator import evaluate

        for subtask in task.subtasks.values():
            subtask.set_fewshot_seed(_FEWSHOT_SEED)
        groups = {task.group.name: task.group} if task.group.has_aggregation else {}
        with _quiet_harness():
            results = evaluate(
                lm=self.lm,
                task_dict={"tasks": task.subtasks, "groups": groups},
                samples=task.chosen,
                log_samples=False,
                apply_chat_template=self.chat,
                fewshot_as_multiturn=self.chat,
            )
        measure = MEASURES[task.name]
        metrics = results["results"][task.group.name if groups else measure.harness_task]
        metric, kind = measure.key.split(",")
        error = metrics.get(f"{metric}_stderr,{kind}")
        scale = 100 if measure.percent else 1
        if not math.isfinite(metrics[measure.key]):
            raise SempaError(
                f"The {measure.metric} of {task.name} is {metrics[measure.key]}: the model's probabilities overflow. "
                "Choose dtype float32 or bfloat16; with those, it has diverged or its files are damaged."
            )
        score = GenerationScore(
            task=task.name,
            metric=measure.metric,
            n=sum(map(len, task.chosen.values())),
            shots=measure.shots,
            score=scale * float(metrics[measure.key]),
            stderr=scale * float(error) if isinstance(error, int | float) else None,
            percent=measure.percent,
        )
        return [score] if measure.percent else [score, self._token_perplexity(task, score)]

    def _token_perplexity(self, task: LoadedTask, words: GenerationScore) -> GenerationScore:
        instances = [instance for subtask in task.subtasks.values() for instance in subtask.instances]
        total = sum(instance.resps[0] for instance in instances)
        tokens = sum(len(self.lm.tok_encode(instance.args[0])) for instance in instances)
        return GenerationScore(
            words.task, "token perplexity", words.n, words.shots, math.exp(-total / tokens), None, percent=False
        )


def average_share(scores: Sequence[GenerationScore]) -> float | None:
    """Return the mean of the scores that are shares, or None if there are fewer than two."""
    shares = [score.score for score in scores if score.percent]
    return fmean(shares) if len(shares) > 1 else None


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Hide the harness's warnings and log lines, and its progress bar for building the prompts of a task."""
    from sempa_st.model.patching import without_harness_bars  # here: it imports torch

    with without_harness_bars(), quiet("lm_eval"):
        yield
