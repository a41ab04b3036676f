"""Trainer callbacks: a progress bar with metrics, and early stopping."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

DEV_METRIC = "eval_dev_spearman"
_SHOWN = {"loss": "loss", "rewards/accuracies": "accuracy", "rewards/margins": "margin", DEV_METRIC: "dev"}


class PairProgress(TrainerCallback):
    """Show progress in preference pairs on standard error, with loss, reward accuracy and dev score.

    Args:
        pairs_per_step: Number of pairs in an optimiser step, over all devices.
        total_pairs: Number of pairs in an epoch, whose last step may have fewer.
    """

    def __init__(self, pairs_per_step: int, total_pairs: int) -> None:
        self._pairs_per_step = pairs_per_step
        self._total_pairs = total_pairs
        self._bar: Any = None
        self._metrics: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        if state.is_world_process_zero:
            total = round(self._total_pairs * args.num_train_epochs)
            self._bar = tqdm(total=total, unit="pair", desc="train", file=sys.stderr, dynamic_ncols=True)
            self._move_to(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the bar."""
        self._move_to(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the latest metrics on the bar; a dev score is also printed on a line of its own."""
        if self._bar is None or logs is None:
            return
        self._metrics.update({short: f"{logs[key]:.4g}" for key, short in _SHOWN.items() if key in logs})
        self._bar.set_postfix(self._metrics)
        if DEV_METRIC in logs:
            self._bar.write(f"after {self._bar.n} pairs: dev Spearman {logs[DEV_METRIC]:.2f}", file=sys.stderr)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar of a run that has ended or was interrupted, so that what is printed next has its own line."""
        if self._bar is not None:
            self._bar.close()

    def _move_to(self, state: TrainerState) -> None:
        if self._bar is not None:
            self._bar.update(min(state.global_step * self._pairs_per_step, self._bar.total) - self._bar.n)


class Patience(TrainerCallback):
    """Stop a run early, after some checkpoints without a better dev score.

    It reads the trainer's log history, so that a resumed run stops at the same step as an uninterrupted one.

    Args:
        checkpoints: Number of scores after the best one at which to stop, at least 1.
    """

    def __init__(self, checkpoints: int) -> None:
        self._checkpoints = checkpoints

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ask the trainer to stop if the best score is that many checkpoints old."""
        scores = [line[DEV_METRIC] for line in state.log_history if DEV_METRIC in line]
        control.should_training_stop |= len(scores) - 1 - scores.index(max(scores)) >= self._checkpoints
