"""The record of a finished run, and the table printed from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from statistics import fmean
from typing import TYPE_CHECKING, Any

from sempa_st.training.callbacks import DEV_METRIC
from sempa_st.training.config import TrainConfig
from sempa_st.utils.files import finite, json_digest
from sempa_st.utils.portable import portable_record
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

if TYPE_CHECKING:
    from sempa_st.training.inputs import RunInputs

_NOT_RECORDED = ("data_dir", "output", "resume", "overwrite", "report_to")
_NOT_IDENTITY = (*_NOT_RECORDED, "device", "log_steps", "keep_checkpoints")
"""Settings that say where and how a run is made, but do not affect its result."""


def run_record(
    config: TrainConfig, inputs: RunInputs, state: Any, *, step: int | None, base_score: float, seconds: float
) -> dict[str, Any]:
    """Return the record of a run, as it is written to ``sempa_run.json``.

    Paths are reduced to their last component, so that the record is portable; ``settings_digest`` is that of the full
    settings. In ``training``, null is a value that was not finite, such as the gradient norm of a step that overflowed.

    Args:
        config: Settings as they were asked for; those of ``inputs`` are fitted to the base. What the adapter of
            ``--from`` decides is recorded as it is.
        inputs: Data and model of the run.
        state: The trainer's state after training.
        step: Optimiser step of the model that the record is for.
        base_score: Dev score before training, times 100.
        seconds: Wall-clock time in seconds.
    """
    data = inputs.data
    triplets = len(data.triplets)
    triplets_per_step = config.epochs * triplets / state.max_steps
    scores = [{"step": 0, "samples": 0, "spearman": base_score}]
    scores += [
        {"step": line["step"], "samples": round(line["step"] * triplets_per_step), "spearman": line[DEV_METRIC]}
        for line in state.log_history
        if DEV_METRIC in line
    ]
    source = {
        "source": config.data,
        "triplets": triplets,
        "skipped": data.skipped,
        "too_long": data.too_long,
        "sha256": data.fingerprint(),
        **inputs.digests,
        **({"pairs": True} if data.is_pairs else {}),
    }
    settings = asdict(config)
    decided = dict(inputs.start.decided) if inputs.start else {}
    record: dict[str, Any] = {
        **run_info(),
        "objective": config.objective,
        "base": inputs.base.name,
        "data": source,
        "config": {name: value for name, value in settings.items() if name not in _NOT_RECORDED} | decided,
        "settings_digest": settings_digest(settings),
        "dev": {"source": config.dev, "pairs": len(inputs.scorer.pairs), "scores": scores},
        "best_step": step,
        "training": [_step(line) for line in state.log_history if "loss" in line],
        "seconds": round(seconds, 1),
    }
    if inputs.start:
        record["started_from"] = {"model": config.from_, "sha256": inputs.start.folder.digest}
    if inputs.left_out:
        record["left_out"] = inputs.left_out
    return portable_record(record)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return a short digest of the settings that affect the result of a run.

    Only settings that differ from their defaults count. So an option added in a later version changes no digest.

    Args:
        settings: Settings by name, as in a config or a record. Missing settings have their default; other keys are
            ignored.
    """
    identity = {
        item.name: settings[item.name]
        for item in fields(TrainConfig)
        if item.name not in _NOT_IDENTITY and settings.get(item.name, item.default) != item.default
    }
    return json_digest(identity)[:12]


def _step(line: dict[str, float]) -> dict[str, float | None]:
    names = {
        "step": "step",
        "loss": "loss",
        "reward_accuracy": "rewards/accuracies",
        "reward_margin": "rewards/margins",
        "kl": "kl",
        "gradient_norm": "grad_norm",
        "learning_rate": "learning_rate",
    }
    return {name: finite(line[key]) for name, key in names.items() if key in line}


def dev_scores(record: Mapping[str, Any]) -> dict[int, float]:
    """Return the dev scores in a run record by optimizer step; step 0 is the base, or the adapter of ``--from``."""
    return {score["step"]: score["spearman"] for score in record["dev"]["scores"]}


def run_table(record: dict[str, Any]) -> str:
    """Format a run record as a table: triplets seen, loss, reward accuracy and dev score at each checkpoint."""
    rows: list[list[object]] = []
    previous = 0
    scores = record["dev"]["scores"]
    for score in scores:
        lines = [line for line in record["training"] if previous < line["step"] <= score["step"]]
        previous = score["step"]
        means = [_mean(lines, key) for key in ("loss", "reward_accuracy")]
        kept = "<- kept" if score["step"] == record["best_step"] else ""
        rows.append([score["samples"], *means, score["spearman"], kept])
    text = table(["triplets", "loss", "reward accuracy", f"dev ({record['dev']['source']})", ""], rows)
    if skipped := record["data"]["skipped"]:
        text += f"\nSkipped as bad: {skipped} row(s) or premise(s) of {record['data']['source']}."
    if too_long := record["data"].get("too_long"):
        text += f"\nSkipped as too long: {too_long} triplet(s) whose prompt alone fills --max-length"
        text += f" {record['config']['max_length']}."
    best = max(score["spearman"] for score in scores[1:])
    if best <= scores[0]["spearman"]:
        start = "model that training started from" if "started_from" in record else "base"
        text += f"\nNo checkpoint beats the dev score of the {start}, {scores[0]['spearman']:.2f}; "
        text += "the best of them was kept."
    return text


def _mean(lines: list[dict[str, float | None]], key: str) -> float | None:
    values = [value for line in lines if (value := line.get(key)) is not None]
    return fmean(values) if values else None
