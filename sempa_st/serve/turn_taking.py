"""A model that generates in turns with other work on its device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from sempa_st.errors import SempaError
from sempa_st.serve.device import GENERATION, DeviceTurns
from sempa_st.serve.metrics import Metrics
from sempa_st.serve.sampling import Draws, Sampling
from sempa_st.serve.stops import first_stop
from sempa_st.utils.finite import OVERFLOW_ADVICE


class TurnTakingModel:
    """A causal language model whose ``generate`` holds the device for one token at a time.

    Everything else is the model's own.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        turns: Turns on its device.
        metrics: Where to count tokens.
        sampling: How to draw; None for a model that is asked for its properties only.
    """

    def __init__(
        self, model: Any, tokenizer: Any, turns: DeviceTurns, metrics: Metrics, sampling: Sampling | None = None
    ) -> None:
        self._model = model
        self._parts = tokenizer, turns, metrics
        self._sampling = sampling

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def drawing(self, sampling: Sampling) -> TurnTakingModel:
        """Return the same model, for one generation."""
        return TurnTakingModel(self._model, *self._parts, sampling)

    def generate(self, **kwargs: Any) -> Any:
        """Generate as the model does.

        Raises:
            SempaError: If a logit is infinite or NaN.
        """
        assert self._sampling is not None
        step = _NextTurn(self._model.device, *self._parts, self._sampling)
        try:
            step.begin()
            with torch.inference_mode():
                return self._model.generate(
                    **kwargs,
                    stopping_criteria=StoppingCriteriaList([step]),
                    logits_processor=LogitsProcessorList([_Finite()]),
                )
        finally:
            step.leave()  # what it drew with is not needed any more


class _Finite(LogitsProcessor):
    """Ends a generation whose logits are no numbers: the most probable of them would be the first token, in silence."""

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        if not scores.amax().isfinite():  # what other processors have ruled out is minus infinity
            raise SempaError(f"The model's logits are infinite or NaN. {OVERFLOW_ADVICE}")
        return scores


class _NextTurn(StoppingCriteria):
    """Called after each token: lets others have the device, and ends a text at a stop sequence."""

    def __init__(
        self, device: torch.device, tokenizer: Any, turns: DeviceTurns, metrics: Metrics, sampling: Sampling
    ) -> None:
        self._tokenizer = tokenizer
        self._turns = turns
        self._tokens = metrics.tokens.labels("completion")
        self._sampling = sampling
        self._draws = Draws(device, sampling.seed)
        self._written = 0
        self._since, self._holds = 0.0, False

    def begin(self) -> None:
        self._since = self._turns.acquire(GENERATION)
        self._holds = True
        self._turns.use_share()
        self._draws.resume()

    def end(self) -> None:
        try:
            self._draws.pause()
        finally:
            self.leave()

    def leave(self) -> None:
        """Give the place back, if there is one to give."""
        if self._holds:
            self._holds = False
            self._turns.release(GENERATION, self._since)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self._written += 1
        self._tokens.inc()
        self.end()
        self.begin()
        over = self._sampling.cancelled.is_set() or self._at_stop(input_ids[0])
        return torch.full((len(input_ids),), over, dtype=torch.bool, device=input_ids.device)

    def _at_stop(self, ids: Tensor) -> bool:
        stops = self._sampling.stops
        if not stops:
            return False
        # A token is a character or more, but for special tokens and parts of characters.
        last = min(self._written, 4 * max(map(len, stops)))
        text = self._tokenizer.decode(ids[-last:], skip_special_tokens=True)
        return first_stop(text, stops) is not None
