"""Linear layers with eight-bit integer products: an option for CPUs that trades accuracy for speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sempa_st.errors import SempaError
from sempa_st.model.patching import linear_int8, pack_int8, unpack_int8
from sempa_st.model.peft_models import invocation_tokens

_BALANCE = 0.65
_TOLERATED = 0.03
"""Largest relative error of a layer's output; a layer above it stays in float. An error of 4% in an MLP's second
projection, where few inputs matter most, costs a small decoder much of its score."""


class Int8Linear(nn.Module):
    """A linear layer whose inputs and weights are rounded to integers.

        y = r Q(x / (s r)) Q(W s)^T + b,  s = max|x|^a / max|W|^(1 - a) per input channel,  r = max|x / s| per token

    The factor s moves large input channels into the weights (SmoothQuant, arXiv 2211.10438). Weights are rounded once,
    to 8 bits per output channel. Inputs are rounded to 7 bits, so that sums do not overflow on older processors.

    Args:
        linear: The layer to replace.
        largest: Largest absolute input of each channel, of shape (inputs,).
    """

    inverse: Tensor

    def __init__(self, linear: nn.Linear, largest: Tensor) -> None:
        super().__init__()
        weight = linear.weight.detach()
        least = torch.finfo(weight.dtype).eps
        balance = largest.clamp(min=least) ** _BALANCE / weight.abs().amax(0).clamp(min=least) ** (1 - _BALANCE)
        self.register_buffer("inverse", 1 / balance, persistent=False)
        self.bias = linear.bias
        weight = weight * balance
        scales = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(weight.dtype).tiny).double()
        self._packed = pack_int8(weight, scales)

    def forward(self, states: Tensor) -> Tensor:
        """Return the layer's output, of shape (..., outputs)."""
        balanced = states * self.inverse
        # The maximum of the absolute values, without a copy of these.
        largest = torch.maximum(balanced.amax(-1, keepdim=True), -balanced.amin(-1, keepdim=True))
        scale = largest.clamp(min=torch.finfo(states.dtype).tiny)
        output = linear_int8(balanced.div_(scale), self._packed).mul_(scale)
        return output if self.bias is None else output + self.bias

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, with the packed weight as arrays.

        Torch would share tensors with that process, and they are gone by the time it starts.
        """
        integers, scales = unpack_int8(self._packed)
        return {**self.__dict__, "_packed": (integers.numpy(), scales.numpy())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state from :meth:`__getstate__`."""
        integers, scales = map(torch.from_numpy, state["_packed"])
        super().__setstate__({**state, "_packed": pack_int8(integers * scales[:, None].float(), scales)})

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        raise SempaError("A model with int8 layers cannot be saved. Load it without int8, and save that.")


def check_quantizable(model: Any) -> None:
    """Raise :class:`SempaError` unless a causal language model is in float32 on a CPU, without an activated adapter."""
    if model.device.type != "cpu" or model.dtype != torch.float32:
        raise SempaError(
            f"int8 is for float32 on a CPU, not for {model.dtype} on {model.device}. Leave it out, or choose "
            "device cpu and dtype float32."
        )
    if invocation_tokens(model):
        raise SempaError(
            "int8 needs the adapter merged, which an activated one cannot be. Make a plain copy of it first: sempa "
            "copy FOLDER DIR --format native."
        )


def quantize(decoder: nn.Module, calibrate: Callable[[], Any]) -> list[str]:
    """Replace a decoder's linear layers by :class:`Int8Linear` where the output stays close.

    Args:
        decoder: Layers without the LM head, in float32 on a CPU, without an adapter.
        calibrate: Runs the decoder on representative sentences. It is called twice: to measure the largest inputs, and
            to measure the error of the outputs.

    Returns:
        Names of the replaced layers.
    """
    linears = {name: layer for name, layer in decoder.named_modules() if isinstance(layer, nn.Linear)}
    largest: dict[str, Tensor] = {}

    def measure(name: str, states: Tensor, output: Tensor) -> None:
        size = states.flatten(0, -2).abs().amax(0)
        largest[name] = torch.maximum(largest[name], size) if name in largest else size

    with _observed(linears, measure):
        calibrate()
    rounded = {name: Int8Linear(linears[name], size) for name, size in largest.items()}
    squares = {name: torch.zeros(2) for name in rounded}

    def compare(name: str, states: Tensor, output: Tensor) -> None:
        squares[name] += torch.stack([(rounded[name](states) - output).square().sum(), output.square().sum()])

    with _observed(linears, compare):
        calibrate()
    close = [name for name, (error, total) in squares.items() if error <= _TOLERATED**2 * total]
    for name in close:
        parent, _, own = name.rpartition(".")
        setattr(decoder.get_submodule(parent), own, rounded[name])
    return close


@contextmanager
def _observed(linears: dict[str, nn.Linear], observe: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``observe`` with the name, the input and the output of each layer's calls, within a block."""

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        observe(name, args[0], output)

    handles = [layer.register_forward_hook(partial(hook, name)) for name, layer in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
