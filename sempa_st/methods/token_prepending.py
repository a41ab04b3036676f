"""Token Prepending (arXiv 2412.11556): a summary of the sentence stands before it, where all its tokens see it."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sempa_st.errors import SempaError
from sempa_st.forward.decoder import at_tokens, entering, layers_of, states_after_layers
from sempa_st.methods.method import Method, Rendered, Rows, gather_read, mean_pooled, scaled_layer
from sempa_st.model.templates import embedding_template


@dataclass(frozen=True)
class TokenPrepending(Method):
    """Entering the layers from ``start`` to before ``exit``, a placeholder gets the last token's state.

    The placeholder stands right behind the colon, before the opening quote. The token in its place is EOS, whose own
    state counts in the layers before ``start`` only.

    Args:
        template: One-word template.
        start: First layer that is entered so, from 1.
        exit: First layer that is entered unchanged again; about a quarter of the depth when None.
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
        """Return the template around the sentence, with the place of the placeholder."""
        template = embedding_template(self.template)
        return (Rendered(template.text(sentence), placeholder=template.prefix.index(":") + 1),)

    def default_layer(self, depth: int) -> int:
        """Return the layer at five sixths of the depth (27 of 32)."""
        return scaled_layer(depth, 27)

    def vectors(self, model: Any, rows: Rows, *others: Rows) -> Tensor:
        """Return the last token's states."""
        layers = layers_of(model)

        def prepend(states: Tensor) -> Tensor:
            return at_tokens(states, rows.placeholder, gather_read(states, rows.read))

        with ExitStack() as stack:
            for layer in layers[self.start : self._exit(len(layers))]:
                stack.enter_context(entering(layer, prepend))
            states = states_after_layers(model, self.layers_run(model), rows.input_ids, rows.attention_mask)
        return mean_pooled(states, rows.read)

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
