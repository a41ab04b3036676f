"""The interface of an embedding method: texts to run for a sentence, and a vector from their hidden states."""

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
"""Placeholder for the tokenizer's mask token in a text."""
PLACEHOLDER = "<PST>"
"""A token of its own in a text, which splits the text around it."""


@dataclass(frozen=True)
class Rendered:
    """A text for the model. Spans are (start, end) in characters, the end exclusive.

    Args:
        text: The text, without special tokens.
        read: Span whose tokens are pooled by their mean; the last token is pooled when None.
        has_placeholder: Whether the text holds :data:`PLACEHOLDER`; its first occurrence counts.
        hidden: Span that a second forward pass may mask, if any.
    """

    text: str
    read: tuple[int, int] | None = None
    has_placeholder: bool = False
    hidden: tuple[int, int] | None = None


class Batch(NamedTuple):
    """Tokenised texts, padded on either side.

    Attributes:
        input_ids: Token ids of shape (batch, seq_len).
        attention_mask: 0 on padding, of the same shape.
        read: 1 on the tokens that are pooled, of the same shape.
        placeholder: 1 on placeholder tokens, of the same shape.
        hidden: 1 on the tokens that a second forward pass may mask, of the same shape.
    """

    input_ids: Tensor
    attention_mask: Tensor
    read: Tensor
    placeholder: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class Method(ABC):
    """A method to embed a sentence with a decoder or an encoder; its fields are the settings. For inference only.

    :meth:`render` gives the texts to run. Its span ``read`` covers mean and last-token pooling; a method with another
    pooling overrides :meth:`vectors`.

    Args:
        layer: Layer whose output is pooled, counted as in transformers' ``hidden_states``: -1 is the last layer with
            the final norm, -2 the input of the last layer, 1 the output of the first. The method's choice when None.
    """

    layer: int | None = None
    for_encoders: ClassVar[bool] = False
    packs: ClassVar[bool] = True
    """Whether sequences are packed, if the model allows it."""

    @abstractmethod
    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the texts to run for a sentence; the vector comes from the first one."""

    def vectors(self, model: Any, batch: Batch, *others: Batch) -> Tensor:
        """Return one vector per sentence, of shape (batch, hidden).

        Args:
            model: Layers without a head.
            batch: The first text of each sentence.
            *others: The other texts of each sentence.
        """
        num_layers = self.num_layers(model)
        if self.packs and can_pack(model, int(batch.attention_mask.sum(dim=1).max())):
            with truncated(model, num_layers):
                return _packed_means(model, batch)
        return mean_pooled(states_after_layers(model, num_layers, batch.input_ids, batch.attention_mask), batch.read)

    def check(self, model: Any) -> None:
        """Raise :class:`SempaError` if the method, with its settings, does not apply to a model."""
        self.num_layers(model)

    def depth(self, model: Any) -> int:
        """Return the number of layers."""
        return len(layers_of(model))

    def default_layer(self, depth: int) -> int:
        """Return the layer to pool when none is set.

        Args:
            depth: Number of the model's layers.
        """
        return -1

    def num_layers(self, model: Any) -> int:
        """Return the number of layers to run for the hidden states that are pooled.

        Raises:
            SempaError: If the model has no such layer.
        """
        depth = self.depth(model)
        layer = self.default_layer(depth) if self.layer is None else self.layer
        num_layers = layer if layer > 0 else depth + 1 + layer
        if not 1 <= num_layers <= depth:
            raise SempaError(
                f"There is no layer {layer} in {type(model).__name__} of {depth} layers. Expected -{depth} to -1, or "
                f"1 to {depth}."
            )
        return num_layers


def scaled_layer(depth: int, layer: int) -> int:
    """Scale a layer index that a paper gives for 32 layers to a decoder of ``depth`` layers."""
    return round(depth * layer / 32)


def gather_read(states: Tensor, read: Tensor) -> Tensor:
    """Return the hidden state at the one marked token of each sequence, of shape (batch, width)."""
    return states[torch.arange(len(states), device=states.device), read.argmax(dim=1)]


def mean_pooled(states: Tensor, read: Tensor) -> Tensor:
    """Return the mean of the hidden states at the marked tokens, of shape (batch, hidden)."""
    weights = read.to(states.dtype)[:, :, None]
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def _packed_means(model: Any, batch: Batch) -> Tensor:
    """Return what :func:`mean_pooled` returns, by packing."""
    packed = states_packed(model, unpadded(batch.input_ids, batch.attention_mask))
    read = unpadded(batch.read, batch.attention_mask)
    pooled = (
        indices[marked.bool()].to(packed.states.device) for indices, marked in zip(packed.indices, read, strict=True)
    )
    return torch.stack([packed.states[indices].mean(dim=0) for indices in pooled])
