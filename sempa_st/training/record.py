"""What a finished run leaves behind: its record, and the table that a person reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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
"""Where and how a run is made, and not what comes out of it."""


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
) -> dict[str, Any]:
    """Return the record of a run, as it is written to ``sempa_run.json``.

    The names in it are portable: of files and folders their last part. ``settings_digest`` tells the settings apart as
    they were given. In ``training``, null stands for a figure that was no finite number, such as the gradient norm of
    a step that overflowed.

    Args:
        config: Settings of the run.
        base: Base that was trained.
        data: Triplets that were trained on.
        state: The trainer's state after training.
        base_score: Dev score before training.
        dev_pairs: Number of dev pairs.
        seconds: Wall-clock time.
        kl_text_sha256: Digest of the KL term's text, where it has one of its own.
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
    return portable_record(record)


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return a short hash of the settings that decide the result of a run.

    Args:
        settings: Settings of a run, as in a config or a record. What is missing, as in the record of a version that
            had no such option, stands at its default; what is no setting is not looked at. Nor is what stands at its
            default, so that an option of a later version changes no digest.
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


def run_table(record: dict[str, Any]) -> str:
    """Lay out a run record: at each checkpoint, triplets seen, loss, reward accuracy and dev score."""
    rows: list[list[object]] = []
    since = 0
    scores = record["dev"]["scores"]
    for score in scores:
        lines = [line for line in record["training"] if since < line["step"] <= score["step"]]
        since = score["step"]
        means = [_mean(lines, key) for key in ("loss", "reward_accuracy")]
        kept = "<- kept" if score["step"] == record["best_step"] else ""
        rows.append([score["samples"], *means, score["spearman"], kept])
    text = table(["triplets", "loss", "reward accuracy", f"dev ({record['dev']['source']})", ""], rows)
    if skipped := record["data"]["skipped"]:
        text += f"\nLeft out as bad: {skipped} row(s) or premise(s) of {record['data']['source']}."
    if too_long := record["data"].get("too_long"):
        text += f"\nLeft out as too long: {too_long} triplet(s), whose request alone fills --max-length"
        text += f" {record['config']['max_length']}."
    best = max(score["spearman"] for score in scores[1:])
    if best <= scores[0]["spearman"]:
        text += (
            f"\nNo checkpoint beats the base's own dev score, {scores[0]['spearman']:.2f}; the best of them was kept."
        )
    return text


def _mean(lines: list[dict[str, float | None]], key: str) -> float | str:
    values = [value for line in lines if (value := line.get(key)) is not None]
    return sum(values) / len(values) if values else ""
