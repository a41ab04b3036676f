"""Contrastive Prompting (arXiv 2505.12831): what an auxiliary prompt calls irrelevant is taken from the state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sempa_st.cached import layers_of
from sempa_st.errors import SempaError
from sempa_st.methods.layers import at_tokens, attention_output, entering, states_after
from sempa_st.methods.method import Method, Rendered, Rows, at_read, mean_of, of_32
from sempa_st.prompts import EmbeddingTemplate, embedding_template

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
        return -2 if self.template == "knowledge-enhancement" else of_32(depth, 27)

    def vectors(self, model: Any, rows: Rows, *others: Rows) -> Tensor:
        """Return the last token's states."""
        (auxiliary,) = others
        at = self._at(model)
        projection = attention_output(layers_of(model)[at])
        taken: list[Tensor] = []

        def take(mixtures: Tensor) -> Tensor:
            taken.append(at_read(mixtures, auxiliary.read))
            return mixtures

        def contrast(mixtures: Tensor) -> Tensor:
            new = self._contrast(at_read(mixtures, rows.read), taken[0], model.config.get_text_config())
            return at_tokens(mixtures, rows.read, new)

        with entering(projection, take):
            states_after(model, at + 1, auxiliary.input_ids, auxiliary.attention_mask)
        with entering(projection, contrast):
            states = states_after(model, self.layers_run(model), rows.input_ids, rows.attention_mask)
        return mean_of(states, rows.read)

    def check(self, model: Any) -> None:
        """Raise :class:`SempaError` if the layer is not there, not run, or has no output projection by a known name."""
        super().check(model)
        at, run = self._at(model), self.layers_run(model)
        if not 0 <= at < run:
            raise SempaError(f"contrastive-prompting at layer {at} of {run} that are run: expected 0 to {run - 1}.")
        attention_output(layers_of(model)[at])

    def _at(self, model: Any) -> int:
        return of_32(len(layers_of(model)), 4) if self.at is None else self.at

    def _contrast(self, normal: Tensor, auxiliary: Tensor, config: Any) -> Tensor:
        scale = 1.0 if self.variant in ("norm", "head-norm") else self.strength
        difference = normal - auxiliary
        if self.variant == "scaled":
            return scale * difference
        heads = config.num_attention_heads if self.variant == "head-norm" else 1
        kept, size = (x.unflatten(-1, (heads, -1)).norm(dim=-1, keepdim=True) for x in (normal, difference))
        ratio = kept / size.clamp(min=torch.finfo(size.dtype).tiny)
        return scale * (difference.unflatten(-1, (heads, -1)) * ratio).flatten(-2)
