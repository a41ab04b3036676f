"""The data-size curve: the score over the number of training triplets, from run records."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sempa_st.analysis.records import Records, unique
from sempa_st.errors import SempaError
from sempa_st.training.record import dev_scores

_NOT_A_SETTING = {"max_triplets", "checkpoint_samples", "dev_batch_size", "log_steps", "device", "data", "patience"}
"""Settings in which the runs of one curve over data sizes may differ."""


@dataclass(frozen=True)
class RunCurve:
    """The dev scores of one training run.

    Args:
        name: Name of the run.
        dev: Name of the dev pairs, and their number.
        base: Dev score before training, Spearman correlation times 100.
        samples: Triplets seen at each checkpoint, increasing.
        scores: Dev score at each checkpoint.
        kept: Index of the checkpoint that became the model.
        settings: What must be equal for two runs to differ in the number of triplets alone.
        average: Mean of the seven STS test sets; None if it is not known.
    """

    name: str
    dev: tuple[str, int]
    base: float
    samples: Sequence[int]
    scores: Sequence[float]
    kept: int
    settings: str
    average: float | None = None


def run_curve(name: str, record: Mapping[str, Any], *, average: float | None = None) -> RunCurve:
    """Return the curve in a run record.

    Args:
        name: Name of the run.
        record: Content of its ``sempa_run.json``.
        average: Mean of the seven STS test sets, if known.

    Raises:
        SempaError: If the record has no dev score of the base or of a checkpoint, or one that is not finite.
    """
    try:
        scores = {row["step"]: (row["samples"], row["spearman"]) for row in record["dev"]["scores"]}
        dev = (str(record["dev"]["source"]), int(record["dev"]["pairs"]))
        steps = [step for step in dev_scores(record) if step]
        base, points = scores[0][1], [scores[step] for step in steps]
        kept = steps.index(record["best_step"])
        finite = all(math.isfinite(score) for score in [base, *(score for _, score in points)])
    except (KeyError, TypeError, ValueError) as error:
        raise SempaError(
            f"The run record of {name} has no dev scores of the base and of a checkpoint that was kept "
            f"({type(error).__name__}: {error}). Expected the record of a finished sempa train."
        ) from error
    if not finite:
        raise SempaError(f"The run record of {name} has a dev score that is not finite. Train again.")
    settings = {key: value for key, value in record["config"].items() if key not in _NOT_A_SETTING}
    samples, values = zip(*points, strict=True)
    return RunCurve(name, dev, base, samples, values, kept, json.dumps(settings, sort_keys=True), average)


def run_curves(records: Records) -> list[RunCurve]:
    """Return the curves of all run records, in their order.

    Raises:
        SempaError: As :func:`run_curve`, or if there is none, or two were scored on different dev pairs.
    """
    if not records.runs:
        raise SempaError("There is no run record. Pass one or more run folders with --records.")
    curves = [run_curve(name, record, average=records.sts_average(name)) for name, record in records.runs.items()]
    unique([curve.dev for curve in curves], "set of dev pairs", [curve.name for curve in curves])
    return curves


def size_curves(curves: Sequence[RunCurve]) -> list[list[RunCurve]]:
    """Return the groups of runs that differ in the number of triplets alone, the smallest number first.

    Runs of other settings, and a run without such a sibling, are in no group.
    """
    groups: dict[str, list[RunCurve]] = defaultdict(list)
    for curve in curves:
        groups[curve.settings].append(curve)
    ordered = (sorted(group, key=lambda curve: curve.samples[-1]) for group in groups.values())
    return [group for group in ordered if group[0].samples[-1] < group[-1].samples[-1]]
