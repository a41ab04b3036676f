"""Stop a run whose loss or gradient is infinite or NaN, before the weights take it up, and say which rows and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sempa_st.checks.weights import bad_weights
from sempa_st.errors import SempaError, list_first

_MAX_SKIPPED = 20
"""Optimiser steps that float16's gradient scaler may skip in a row; each halves its factor, 65,536 at first."""


class DivergedError(SempaError):
    """Error of a run that has diverged; going on from its checkpoints would lead there again."""


class GradientCheck(TrainerCallback):
    """Stop a run before an optimiser step with an infinite or NaN gradient.

    Under float16's gradient scaler such a step is skipped and the factor lowered; there the run ends once that has not
    helped for 20 steps in a row.

    Args:
        trainer: The trainer that calls this callback.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._skipped = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradients, which are clipped by now; raises :class:`DivergedError`."""
        model = self._trainer.generator()
        if all(_total(p.grad).isfinite() for p in model.parameters() if p.grad is not None):
            self._skipped = 0
            return
        self._skipped += 1
        if self._trainer.accelerator.scaler is None or self._skipped > _MAX_SKIPPED:
            raise DivergedError(
                f"The gradient of step {state.global_step + 1} is infinite or NaN. {likely_cause(model)}"
            )


def _total(gradient: Any) -> Tensor:
    """Return the sum of a gradient, of a sharded one over all processes."""
    total = gradient.detach().sum(dtype=torch.float32)
    return total.full_tensor() if hasattr(total, "full_tensor") else total


def diverged_loss(loss: Tensor, trainer: Any, module: Any, batch: Mapping[str, Any]) -> DivergedError:
    """Return the error for a loss that is infinite or NaN; it names the rows of the batch that lead to it.

    Args:
        loss: Scalar.
        trainer: The trainer.
        module: Embedding module around the model in training.
        batch: What the loss was computed from.
    """
    step, model = trainer.state.global_step + 1, trainer.generator()
    rows = [f"{text!r:.70}" for text in _bad_rows(module, batch)]
    named = f"It comes from {list_first(rows, 3)}. " if rows else "Each row of its batch is finite by itself. "
    return DivergedError(f"The loss of step {step} is {loss.item()}. {named}{likely_cause(model)}")


def likely_cause(model: torch.nn.Module) -> str:
    """Return why a model gives infinite or NaN values, as far as its weights and type say, and what to do."""
    if found := next(bad_weights(model), None):
        return f"The weights have diverged, in the tensor {found.name}: lower the learning rate."
    if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
        return "Many models overflow in float16: choose --dtype bfloat16 or float32."
    return "Training has diverged: lower the learning rate."


def _bad_rows(module: Any, batch: Mapping[str, Any]) -> Iterator[str]:
    """Yield the text of each row of a batch for which the decoder's states are infinite or NaN."""
    tokenizer, decoder = module.tokenizer, module.decoder
    for name, ids in batch.items():
        if not name.endswith("input_ids") or not isinstance(ids, Tensor) or ids.ndim != 2:
            continue
        mask = batch.get(name.replace("input_ids", "attention_mask"))
        for index, row in enumerate(ids):
            tokens = row[mask[index].bool()] if isinstance(mask, Tensor) else row
            with torch.no_grad():
                states = decoder(input_ids=tokens[None].to(decoder.device), use_cache=False).last_hidden_state
            if not states.isfinite().all():
                yield tokenizer.decode(tokens, skip_special_tokens=True)
