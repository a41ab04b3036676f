"""Token Prepending (arXiv 2412.11556): put a summary of the sentence before it, where all of its tokens see it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sempa_st.errors import SempaError
from sempa_st.forward.decoder import at_tokens, edit_input, layers_of, states_after_layers
from sempa_st.methods.method import PLACEHOLDER, Batch, Method, Rendered, gather_read, mean_pooled, scaled_layer
from sempa_st.model.templates import embedding_template


@dataclass(frozen=True)
class TokenPrepending(Method):
    """Before each layer in [start, exit), copy the last token's hidden state into the placeholder position.

    The placeholder is an EOS token between the template's colon and its quote, in spaces of its own. Its own state
    matters only in the layers before ``start``; the authors' is a new token with a random embedding.

    Args:
        template: One-word template.
        start: First layer with a changed input, at least 1.
        exit: First layer with an unchanged input again; about a quarter of the depth when None.
    """

    packs: ClassVar[bool] = False
    template: str = "prompteol"
    start: int = 1
    exit: int | None = None

    def __post_init__(self) -> None:
        embedding_template(self.template)
        if self.start < 1 or (self.exit is not None and self.exit <= self.start):
            raise SempaError(f"token-prepending from layer {self.start} to {self.exit}. Expected 1 <= start < exit.")

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the template around the sentence, with the placeholder."""
        before, colon, after = embedding_template(self.template).text(sentence).partition(":")
        return (Rendered(f"{before}{colon} {PLACEHOLDER}{after}", has_placeholder=True),)

    def default_layer(self, depth: int) -> int:
        """Return the layer at five sixths of the depth (27 of 32)."""
        return scaled_layer(depth, 27)

    def vectors(self, model: Any, batch: Batch, *others: Batch) -> Tensor:
        """Return the last tokens' hidden states."""
        layers = layers_of(model)

        def prepend(states: Tensor) -> Tensor:
            return at_tokens(states, batch.placeholder, gather_read(states, batch.read))

        with ExitStack() as stack:
            for layer in layers[self.start : self._exit(len(layers))]:
                stack.enter_context(edit_input(layer, prepend))
            states = states_after_layers(model, self.num_layers(model), batch.input_ids, batch.attention_mask)
        return mean_pooled(states, batch.read)

    def check(self, model: Any) -> None:
        """Raise :class:`SempaError` if the decoder has too few layers."""
        super().check(model)
        depth = len(layers_of(model))
        if not self.start < self._exit(depth) <= depth:
            raise SempaError(
                f"token-prepending from layer {self.start} to {self._exit(depth)} does not fit {depth} layers. "
                f"Expected start < exit <= {depth}."
            )

    def _exit(self, depth: int) -> int:
        return max(self.start + 1, scaled_layer(depth, 7)) if self.exit is None else self.exit
