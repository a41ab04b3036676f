"""Cost per training sample: TRL's DPO trainer with its defaults, and this package's objectives."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from transformers import ProgressCallback, set_seed
from trl import DPOConfig, DPOTrainer

from benchmarks.speed.stream import run_watched
from sempa_st.data.nli import NliData, load_nli
from sempa_st.data.preferences import preference_rows
from sempa_st.errors import SempaError
from sempa_st.model.adapter import lora_config
from sempa_st.model.base_model import load_causal_lm, resolve_base
from sempa_st.model.embedded import EMBEDDED_BASE
from sempa_st.model.tokenizer import load_tokenizer
from sempa_st.training.build import build_trainer
from sempa_st.training.config import TrainConfig
from sempa_st.training.dev_score import DevScorer
from sempa_st.training.run import load_inputs
from sempa_st.training.run_folder import RunFolder

_BATCH = 8
_COMMON = {"batch_size": _BATCH, "gradient_accumulation": 1, "log_steps": 1, "device": "cpu", "dtype": "float32"}
Timed = tuple[float, float, list[float]]
"""Seconds before the first step (with a precomputed reference included), seconds of the steps, loss of each step."""


def trl_as_it_comes(precompute: bool) -> Callable[[NliData, Path], Timed]:
    """Train with TRL's own trainer and defaults; the reference is run in each step or precomputed."""

    def run(data: NliData, scratch: Path) -> Timed:
        folder = resolve_base(EMBEDDED_BASE).folder
        tokenizer, model = load_tokenizer(folder), load_causal_lm(folder, torch.float32)
        rows = preference_rows(data.triplets, tokenizer, paraphrase=TrainConfig.paraphrase)
        set_seed(TrainConfig.seed)
        started = time.perf_counter()
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(
                output_dir=str(scratch / "trl"), beta=TrainConfig.beta, learning_rate=TrainConfig.learning_rate,
                per_device_train_batch_size=_BATCH, gradient_accumulation_steps=1, num_train_epochs=1,
                lr_scheduler_type="cosine", warmup_steps=0, logging_steps=1, save_strategy="no", use_cpu=True,
                bf16=False, gradient_checkpointing=False, report_to="none", dataloader_pin_memory=False,
                seed=TrainConfig.seed, data_seed=TrainConfig.seed, precompute_ref_log_probs=precompute,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora_config(model),
        )  # fmt: skip
        return _timed(trainer, started)

    return run


def ours(**settings: Any) -> Callable[[NliData, Path], Timed]:
    """Train with this package, without a cached reference."""

    def run(data: NliData, scratch: Path) -> Timed:
        output = scratch / str(settings["objective"])
        config = TrainConfig(
            base=EMBEDDED_BASE, data="sample", dev="sample", output=str(output), warmup_ratio=0.0, **_COMMON, **settings
        )
        parts = replace(load_inputs(config, "cpu"), data=data)
        with steps_alone(output, scratch / "cache") as work:
            started = time.perf_counter()
            return _timed(build_trainer(parts, work), started)

    return run


@contextmanager
def steps_alone(output: Path, cache: Path) -> Iterator[RunFolder]:
    """Train within the block without dev scores, which are no part of a step, and without the user's cached reference.

    Args:
        output: Output folder of the run.
        cache: Folder to use as the cache.
    """
    work = RunFolder(output)
    work.checkpoints.mkdir(parents=True, exist_ok=True)
    with (
        mock.patch.dict(os.environ, {"SEMPA_CACHE_DIR": str(cache)}),
        mock.patch.object(DevScorer, "__call__", return_value=0.0),
    ):
        yield work


def _timed(trainer: Any, started: float) -> Timed:
    trainer.remove_callback(ProgressCallback)
    before = time.perf_counter()
    trainer.train()
    ended = time.perf_counter()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return before - started, ended - before, losses


TRAININGS: dict[str, Callable[[NliData, Path], Timed]] = {
    "TRL dpo": trl_as_it_comes(precompute=False),
    "TRL dpo, reference before": trl_as_it_comes(precompute=True),
    "dpo": ours(objective="dpo"),
    "contrastive": ours(objective="contrastive"),
    "one-word": ours(objective="one-word", activation="template"),
    "one-word-listwise": ours(objective="one-word-listwise", activation="template"),
}

_PROGRAM = ("-m", "benchmarks.speed.run")


def measure_training(args: argparse.Namespace) -> dict[str, Any]:
    """Run every training on the same triplets in several rounds, and compare losses and times with TRL's."""
    triplets = load_nli(str(Path(args.data_dir, "nli", "triplets.parquet"))).triplets
    names = chosen(args.systems, TRAININGS)
    found: dict[str, list[Timed]] = {name: [] for name in names}
    size = args.triplets // args.rounds
    for number in range(args.rounds):
        data = NliData(triplets[number * size : (number + 1) * size], "triplets.parquet")
        for name in names[number % len(names) :] + names[: number % len(names)]:
            with tempfile.TemporaryDirectory() as scratch:
                found[name].append(TRAININGS[name](data, Path(scratch)))
    return {"rounds": found, "tables": {"training": _rows(found, size)}}


def measure_memory(args: argparse.Namespace) -> dict[str, Any]:
    """Run every training in its own process, and compare peak memory with the first one's."""
    names = chosen(args.systems, TRAININGS)
    rows: list[dict[str, Any]] = []
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            data = ["--data-dir", args.data_dir, "--triplets", str(args.triplets), "--rounds", "1"]
            output = str(Path(scratch, "speed.json"))
            _, _, private = run_watched([*_PROGRAM, "train", "--systems", name, *data, "--output", output])
        first = rows[0]["private MiB"] if rows else private
        rows.append({"training": name, "private MiB": private, f"times {names[0]}": private / first})
    return {"tables": {"memory of training": rows}}


def chosen(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return the trainings named, or all if none is named.

    Raises:
        SempaError: On an unknown name.
    """
    for name in names:
        if name not in known:
            raise SempaError(f"Unknown system {name!r}. Expected some of: {', '.join(known)}.")
    return [name for name in known if not names or name in names]


def _rows(found: dict[str, list[Timed]], size: int) -> list[dict[str, Any]]:
    peers = list(found)
    whole = {name: [before + steps for before, steps, _ in timed] for name, timed in found.items()}
    rows = []
    for name, timed in found.items():
        first = found[peers[0]]
        same_loss = "dpo" in name
        rows.append(
            {
                "training": name,
                "samples/s": size * len(timed) / sum(whole[name]),
                "without the reference": size * len(timed) / sum(steps for _, steps, _ in timed),
                f"times {peers[0]}": _ratio(whole[peers[0]], whole[name]),
                "loss, largest difference": _difference(first, timed) if same_loss and "dpo" in peers[0] else None,
            }
        )
    return rows


def _ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    return sum(slow) / sum(fast)


def _difference(expected: Sequence[Timed], found: Sequence[Timed]) -> float:
    pairs = [
        pair for (_, _, one), (_, _, two) in zip(expected, found, strict=True) for pair in zip(one, two, strict=True)
    ]
    return max(abs(one - two) for one, two in pairs)
