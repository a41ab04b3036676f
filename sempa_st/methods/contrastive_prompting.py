"""Contrastive Prompting (arXiv 2505.12831): subtract what an auxiliary prompt calls irrelevant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sempa_st.errors import SempaError
from sempa_st.forward.decoder import attention_output, edit_input, layers_of, states_after_layers, truncated
from sempa_st.forward.packing import can_pack, last_positions, prepare_packs, run_packs, unpadded
from sempa_st.methods.method import Batch, Method, Rendered, scaled_layer
from sempa_st.model.templates import EmbeddingTemplate, embedding_template

_AUXILIARY = EmbeddingTemplate("auxiliary", 'The irrelevant information of this sentence : "', '" means in one word:"')
VARIANTS = ("norm", "scaled", "scaled-norm", "head-norm")


@dataclass(frozen=True)
class ContrastivePrompting(Method):
    """Replace the last token's attention output A at one layer, given that of the auxiliary prompt, B.

    A and B are the concatenated heads, before the output projection. ``scaled``: c (A - B); ``norm``: (A - B) |A| /
    |A - B|; ``scaled-norm``: c times that; ``head-norm``: ``norm`` in each attention head.

    Args:
        template: One-word template.
        at: Index of that layer, from 0; an eighth of the depth when None (4 of 32).
        variant: One of :data:`VARIANTS`.
        strength: c, above 0.
    """

    template: str = "prompteol"
    at: int | None = None
    variant: str = "scaled"
    strength: float = 0.5

    def __post_init__(self) -> None:
        embedding_template(self.template)
        if self.variant not in VARIANTS:
            raise SempaError(
                f"Unknown variant {self.variant!r} of contrastive-prompting. Expected one of: {', '.join(VARIANTS)}."
            )
        if not self.strength > 0:
            raise SempaError(f"The strength of contrastive-prompting is {self.strength}. Expected a number above 0.")

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the template and the auxiliary prompt around the sentence."""
        return (Rendered(embedding_template(self.template).text(sentence)), Rendered(_AUXILIARY.text(sentence)))

    def default_layer(self, depth: int) -> int:
        """Return the layer at five sixths of the depth (27 of 32); -2 under Knowledge Enhancement."""
        return -2 if self.template == "knowledge-enhancement" else scaled_layer(depth, 27)

    def vectors(self, model: Any, batch: Batch, *others: Batch) -> Tensor:
        """Return the last tokens' hidden states."""
        (auxiliary,) = others
        at = self._at(model)
        projection = attention_output(layers_of(model)[at])
        recorded: list[Tensor] = []

        def record(heads: Tensor) -> Tensor:
            recorded.append(heads)
            return heads

        def contrast(heads: Tensor) -> Tensor:
            return self._contrast(heads, recorded[0], model.config.get_text_config())

        run = _packed if self.packs else _padded
        run(model, at + 1, auxiliary, projection, record)
        return run(model, self.num_layers(model), batch, projection, contrast)

    def check(self, model: Any) -> None:
        """Raise :class:`SempaError` if the layer does not exist, does not run, or has an unknown output projection."""
        super().check(model)
        at, num_layers = self._at(model), self.num_layers(model)
        if not 0 <= at < num_layers:
            raise SempaError(
                f"contrastive-prompting at layer {at}, but {num_layers} layers run. Expected 0 to {num_layers - 1}."
            )
        attention_output(layers_of(model)[at])

    def _at(self, model: Any) -> int:
        return scaled_layer(len(layers_of(model)), 4) if self.at is None else self.at

    def _contrast(self, normal: Tensor, auxiliary: Tensor, config: Any) -> Tensor:
        scale = 1.0 if self.variant in ("norm", "head-norm") else self.strength
        difference = normal - auxiliary
        if self.variant == "scaled":
            return scale * difference
        heads = config.num_attention_heads if self.variant == "head-norm" else 1
        before, after = (x.unflatten(-1, (heads, -1)).norm(dim=-1, keepdim=True) for x in (normal, difference))
        ratio = before / after.clamp(min=torch.finfo(after.dtype).tiny)
        return scale * (difference.unflatten(-1, (heads, -1)) * ratio).flatten(-2)


_Change = Callable[[Tensor], Tensor]
"""Takes the states of the last tokens, of shape (batch, width), and returns those to use instead."""


def _padded(model: Any, num_layers: int, batch: Batch, module: nn.Module, change: _Change) -> Tensor:
    """Return the last tokens' hidden states after ``num_layers`` layers.

    The input of ``module``, a part of one of these layers, is changed for the last tokens.
    """
    starts = torch.arange(len(batch.read), device=batch.read.device) * batch.read.shape[1]
    last = starts + batch.read.argmax(dim=1)
    with edit_input(module, lambda states: _replace(states, last, change)):
        return states_after_layers(model, num_layers, batch.input_ids, batch.attention_mask).flatten(0, 1)[last]


def _packed(model: Any, num_layers: int, batch: Batch, module: nn.Module, change: _Change) -> Tensor:
    """Return what :func:`_padded` returns, by packing where the model and the sequences allow it."""
    if can_pack(model, int(batch.attention_mask.sum(dim=1).max())):
        with truncated(model, num_layers):
            packs = prepare_packs(model, unpadded(batch.input_ids, batch.attention_mask))
            positions = last_positions(packs)
            if positions is not None:
                last = positions.to(batch.input_ids.device)
                with edit_input(module, lambda states: _replace(states, last, change)):
                    return run_packs(model, packs).flatten(0, 1)[last]
    return _padded(model, num_layers, batch, module, change)


def _replace(states: Tensor, index: Tensor, change: _Change) -> Tensor:
    flat = states.flatten(0, 1)
    return flat.index_copy(0, index, change(flat[index]).to(flat.dtype)).view_as(states)
