"""Contrastive Prompting (arXiv 2505.12831): what an auxiliary prompt calls irrelevant is taken from the state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sempa_st.errors import SempaError
from sempa_st.forward.decoder import attention_output, entering, layers_of, states_after_layers, truncated
from sempa_st.forward.packing import can_pack, last_positions, prepare_packs, run_packs, unpadded
from sempa_st.methods.method import Method, Rendered, Rows, scaled_layer
from sempa_st.model.templates import EmbeddingTemplate, embedding_template

_AUXILIARY = EmbeddingTemplate("auxiliary", 'The irrelevant information of this sentence : "', '" means in one word:"')
VARIANTS = ("norm", "scaled", "scaled-norm", "head-norm")


@dataclass(frozen=True)
class ContrastivePrompting(Method):
    """At one layer the last token's mixture of values A loses that of the auxiliary prompt, B.

    ``scaled``: c (A - B); ``norm``: (A - B) |A| / |A - B|; ``scaled-norm``: c times that; ``head-norm``: ``norm`` in
    each attention head.

    Args:
        template: One-word template.
        at: Number of that layer, from 0; an eighth of the depth when None (4 of 32).
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

    def vectors(self, model: Any, rows: Rows, *others: Rows) -> Tensor:
        """Return the last token's states."""
        (auxiliary,) = others
        at = self._at(model)
        projection = attention_output(layers_of(model)[at])
        taken: list[Tensor] = []

        def take(mixtures: Tensor) -> Tensor:
            taken.append(mixtures)
            return mixtures

        def contrast(mixtures: Tensor) -> Tensor:
            return self._contrast(mixtures, taken[0], model.config.get_text_config())

        run = _packed if self.packs else _padded
        run(model, at + 1, auxiliary, projection, take)
        return run(model, self.layers_run(model), rows, projection, contrast)

    def check(self, model: Any) -> None:
        """Raise :class:`SempaError` if the layer is not there, not run, or has no output projection by a known name."""
        super().check(model)
        at, run = self._at(model), self.layers_run(model)
        if not 0 <= at < run:
            raise SempaError(f"contrastive-prompting at layer {at} of {run} that are run: expected 0 to {run - 1}.")
        attention_output(layers_of(model)[at])

    def _at(self, model: Any) -> int:
        return scaled_layer(len(layers_of(model)), 4) if self.at is None else self.at

    def _contrast(self, normal: Tensor, auxiliary: Tensor, config: Any) -> Tensor:
        scale = 1.0 if self.variant in ("norm", "head-norm") else self.strength
        difference = normal - auxiliary
        if self.variant == "scaled":
            return scale * difference
        heads = config.num_attention_heads if self.variant == "head-norm" else 1
        kept, size = (x.unflatten(-1, (heads, -1)).norm(dim=-1, keepdim=True) for x in (normal, difference))
        ratio = kept / size.clamp(min=torch.finfo(size.dtype).tiny)
        return scale * (difference.unflatten(-1, (heads, -1)) * ratio).flatten(-2)


_Change = Callable[[Tensor], Tensor]
"""Called with the rows' last tokens' states of shape (rows, width); what it returns takes their place."""


def _padded(model: Any, run: int, rows: Rows, module: nn.Module, change: _Change) -> Tensor:
    """Return the last tokens' states after ``run`` layers, what of these tokens enters a module of theirs changed."""
    starts = torch.arange(len(rows.read), device=rows.read.device) * rows.read.shape[1]
    last = starts + rows.read.argmax(dim=1)
    with entering(module, lambda inputs: _put(inputs, last, change)):
        return states_after_layers(model, run, rows.input_ids, rows.attention_mask).flatten(0, 1)[last]


def _packed(model: Any, run: int, rows: Rows, module: nn.Module, change: _Change) -> Tensor:
    """Return what :func:`_padded` returns, from packs where that can be."""
    if not can_pack(model, int(rows.attention_mask.sum(dim=1).max())):
        return _padded(model, run, rows, module, change)
    with truncated(model, run):
        packs = prepare_packs(model, unpadded(rows.input_ids, rows.attention_mask))
        places = last_positions(packs)
        if places is not None:
            last = places.to(rows.input_ids.device)
            with entering(module, lambda inputs: _put(inputs, last, change)):
                return run_packs(model, packs).flatten(0, 1)[last]
    return _padded(model, run, rows, module, change)


def _put(inputs: Tensor, places: Tensor, change: _Change) -> Tensor:
    flat = inputs.flatten(0, 1)
    return flat.index_copy(0, places, change(flat[places]).to(flat.dtype)).view_as(inputs)
