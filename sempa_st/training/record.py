"""The record of a finished run, and the table printed from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from sempa_st.data.nli import NliData
from sempa_st.model.base_model import Base
from sempa_st.training.callbacks import DEV_METRIC
from sempa_st.training.config import TrainConfig
from sempa_st.utils.files import finite
from sempa_st.utils.portable import portable_record
from sempa_st.utils.run_info import run_info
from sempa_st.utils.tables import table

_NOT_RECORDED = ("data_dir", "output", "resume", "overwrite")
_NOT_IDENTITY = (*_NOT_RECORDED, "device", "log_steps")
"""Settings that say where and how a run is made, but do not affect its result."""


def run_record(
    config: TrainConfig,
    base: Base,
    data: NliData,
    state: Any,
    *,
    base_score: float,
    dev_pairs: int,
    seconds: float,
    kl_text_sha256: str | None = None,
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the record of a run, as it is written to ``sempa_run.json``.

    Paths are reduced to their last component, so that the record is portable; ``settings_digest`` is that of the full
    settings. In ``training``, null is a value that was not finite, such as the gradient norm of a step that overflowed.

    Args:
        config: Settings of the run.
        base: Base model of the run.
        data: Training triplets.
        state: The trainer's state after training.
        base_score: Dev score before training, times 100.
        dev_pairs: Number of dev pairs.
        seconds: Wall-clock time in seconds.
        kl_text_sha256: SHA-256 digest (hex) of the text of the KL term; None without such a text.
        left_out: Weights that the adapter leaves out, by their names within a layer.
    """
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
    }
    if kl_text_sha256:
        source["kl_text_sha256"] = kl_text_sha256
    settings = asdict(config)
    record = {
        **run_info(),
        "objective": config.objective,
        "base": base.name,
        "data": source,
        "config": {name: value for name, value in settings.items() if name not in _NOT_RECORDED},
        "settings_digest": settings_digest(settings),
        "dev": {"source": config.dev, "pairs": dev_pairs, "scores": scores},
        "best_step": state.best_global_step,
        "training": [_step(line) for line in state.log_history if "loss" in line],
        "seconds": round(seconds, 1),
    }
    if left_out:
        record["left_out"] = list(left_out)
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
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


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
    """Return the dev scores in a run record by optimizer step; step 0 is the base."""
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
        text += (
            f"\nNo checkpoint beats the dev score of the base, {scores[0]['spearman']:.2f}; the best of them was kept."
        )
    return text


def _mean(lines: list[dict[str, float | None]], key: str) -> float | str:
    values = [value for line in lines if (value := line.get(key)) is not None]
    return sum(values) / len(values) if values else ""
