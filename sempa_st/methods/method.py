"""What a way to embed with a model is: texts to run, and vectors from their states."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from sempa_st.errors import SempaError
from sempa_st.forward.decoder import layers_of, states_after_layers, truncated
from sempa_st.forward.packing import can_pack, states_packed, unpadded

MASK = "[MASK]"
"""Stands for the tokenizer's mask token in a text."""


@dataclass(frozen=True)
class Rendered:
    """A text for the model.

    Args:
        text: The text, without special tokens.
        read: First character, and the one behind the last, of what is averaged; the last token is read when None.
        placeholder: Character before whose token a placeholder token is put, if any.
        hidden: First character, and the one behind the last, of what a second run may hide, if anything.
    """

    text: str
    read: tuple[int, int] | None = None
    placeholder: int | None = None
    hidden: tuple[int, int] | None = None


class Rows(NamedTuple):
    """Texts as the model reads them, padded on either side.

    Attributes:
        input_ids: Token ids of shape (rows, tokens).
        attention_mask: 0 on padding, of the same shape.
        read: 1 on the tokens that are read, of the same shape.
        placeholder: 1 on placeholder tokens, of the same shape.
        hidden: 1 on what a second run may hide, of the same shape.
    """

    input_ids: Tensor
    attention_mask: Tensor
    read: Tensor
    placeholder: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Method(ABC):
    """A way to embed a sentence with a decoder, or an encoder; its fields are the settings.

    Args:
        layer: Whose output is read, counted as in transformers' ``hidden_states``: -1 is the last one with the final
            norm, -2 what enters the last layer, 1 the first layer's output. The method's own choice when None.
    """

    layer: int | None = None
    for_encoders: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    """Whether rows are run in packs, on a model that allows it."""

    @abstractmethod
    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the texts to run for a sentence; the first one is read."""

    def vectors(self, model: Any, rows: Rows, *others: Rows) -> Tensor:
        """Return one vector a row, of shape (rows, hidden).

        Args:
            model: Layers without a head.
            rows: The first text of each sentence.
            *others: Its further texts.
        """
        run = self.layers_run(model)
        if self.packs and can_pack(model, int(rows.attention_mask.sum(dim=1).max())):
            with truncated(model, run):
                return _packed_means(model, rows)
        return mean_pooled(states_after_layers(model, run, rows.input_ids, rows.attention_mask), rows.read)

    def check(self, model: Any) -> None:
        """Raise :class:`SempaError` if the method cannot be applied to a model as it is set."""
        self.layers_run(model)

    def depth(self, model: Any) -> int:
        """Return the number of layers."""
        return len(layers_of(model))

    def default_layer(self, depth: int) -> int:
        """Return the layer to read where none is set.

        Args:
            depth: Number of layers of the model.
        """
        return -1

    def layers_run(self, model: Any) -> int:
        """Return how many layers are run for the state that is read."""
        depth = self.depth(model)
        layer = self.default_layer(depth) if self.layer is None else self.layer
        run = layer if layer > 0 else depth + 1 + layer
        if not 1 <= run <= depth:
            raise SempaError(
                f"There is no layer {layer} in {type(model).__name__} of {depth} layers. Expected -{depth} to -1, or "
                f"1 to {depth}."
            )
        return run


def scaled_layer(depth: int, layer: int) -> int:
    """Return the layer of a decoder of ``depth`` layers that stands where ``layer`` does among a paper's 32."""
    return round(depth * layer / 32)


def gather_read(states: Tensor, read: Tensor) -> Tensor:
    """Return the state at each row's one token that is read, of shape (rows, width)."""
    return states[torch.arange(len(states), device=states.device), read.argmax(dim=1)]


def mean_pooled(states: Tensor, read: Tensor) -> Tensor:
    """Return the mean of the states at the tokens that are read, of shape (rows, hidden)."""
    weights = read.to(states.dtype)[:, :, None]
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def _packed_means(model: Any, rows: Rows) -> Tensor:
    """Return :func:`mean_pooled` the states at the tokens that are read, the rows run in packs."""
    packed = states_packed(model, unpadded(rows.input_ids, rows.attention_mask))
    read = unpadded(rows.read, rows.attention_mask)
    chosen = (places[kept.bool()].to(packed.states.device) for places, kept in zip(packed.places, read, strict=True))
    return torch.stack([packed.states[places].mean(dim=0) for places in chosen])
