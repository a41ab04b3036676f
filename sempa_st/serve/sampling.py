"""What a request says about how its text is drawn, and where it ends."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sempa_st.serve.protocol import RequestError
from sempa_st.serve.stops import stop_sequences

_RANGES = {"temperature": (0.0, 2.0), "top_p": (0.0, 1.0), "frequency_penalty": (0.0, 2.0)}
_COLDEST = 1e-4
"""Temperature below which the most probable token is as good as certain; the logits over it would overflow."""
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "generation_config": (),
    "chat_template_kwargs": ({},),
}
"""Fields that this server does not act on, with the values at which they ask for nothing."""
_OWN = (*_RANGES, *_REFUSED, "stop", "seed")


@dataclass
class Sampling:
    """How a text is drawn.

    Args:
        stops: Stop sequences.
        temperature: 0 for the most probable token each time; None for what the model's own settings say.
        top_p: Share of the probability to draw from; None for the model's own.
        frequency_penalty: 0 or more; 1 plus this is the repetition penalty of transformers.
        seed: Seed of the draws; None for another one each time.
        cancelled: Set when nobody waits for the text any more.
    """

    stops: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def apply(self, config: Any) -> None:
        """Set what the request says in a generation config."""
        if self.temperature is not None or self.top_p is not None:
            config.do_sample = self.temperature != 0
        if self.temperature:
            config.temperature = self.temperature
        if self.top_p is not None and config.do_sample:
            config.top_p = self.top_p
        if self.frequency_penalty is not None:
            config.repetition_penalty = 1.0 + self.frequency_penalty


def read_sampling(body: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """Return how to draw the text of a request, and the request without the fields that say it and without nulls.

    Raises:
        RequestError: On a value out of range, or a field that this server does not act on.
    """
    given = {name: value for name, value in body.items() if value is not None}
    for name, neutral in _REFUSED.items():
        if name in given and not any(type(given[name]) is type(value) and given[name] == value for value in neutral):
            raise RequestError(400, f"{name} is not supported, but is {given[name]!r:.80}. Leave it out.", param=name)
    numbers = {name: _number(name, given[name]) for name in _RANGES if name in given}
    if numbers.get("temperature", _COLDEST) < _COLDEST:
        numbers["temperature"] = 0.0
    seed = given.get("seed")
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**63):
        raise RequestError(400, f"seed is {seed!r:.80}. Expected a whole number of 64 bits.", param="seed")
    sampling = Sampling(
        stop_sequences(given.get("stop")),
        temperature=numbers.get("temperature"),
        top_p=numbers.get("top_p"),
        frequency_penalty=numbers.get("frequency_penalty"),
        seed=seed,
    )
    return sampling, {name: value for name, value in given.items() if name not in _OWN}


def _number(name: str, value: Any) -> float:
    low, high = _RANGES[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise RequestError(400, f"{name} is {value!r:.80}. Expected a number from {low:g} to {high:g}.", param=name)
    return float(value)


class Draws:
    """The state of the random numbers of one generation, which runs in turns with others in one process."""

    def __init__(self, device: torch.device, seed: int | None) -> None:
        self._device = device
        self._seed = seed
        self._states: list[torch.Tensor] | None = None

    def resume(self) -> None:
        """Go on with this generation's random numbers."""
        if self._states is None:
            torch.seed() if self._seed is None else torch.manual_seed(self._seed)
            return
        torch.set_rng_state(self._states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(self._states[1], self._device)

    def pause(self) -> None:
        """Keep the state for the next turn."""
        self._states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            self._states.append(torch.cuda.get_rng_state(self._device))
