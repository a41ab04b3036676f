"""Ways to embed with an encoder that was not tuned for sentences: the mean of its states, and PromptBERT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sempa_st.methods.method import MASK, Method, Rendered, Rows, mean_pooled
from sempa_st.model.templates import normalize_sentence


@dataclass(frozen=True)
class EncoderMethod(Method):
    """A method for encoders, whose tokens see each other anyway."""

    for_encoders: ClassVar[bool] = True
    packs: ClassVar[bool] = False

    def depth(self, model: Any) -> int:
        """Return the number of layers."""
        return int(model.config.num_hidden_layers)

    def states(self, model: Any, rows: Rows, attention_mask: Tensor) -> Tensor:
        """Return the states of the layer that is read, of shape (rows, tokens, hidden)."""
        output = model(input_ids=rows.input_ids, attention_mask=attention_mask, output_hidden_states=True)
        states: Tensor = output.hidden_states[self.layers_run(model)]
        return states


@dataclass(frozen=True)
class EncoderMean(EncoderMethod):
    """The mean of the states of all tokens (BERT-avg, and T5's encoder likewise)."""

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the sentence."""
        return (Rendered(normalize_sentence(sentence)),)

    def vectors(self, model: Any, rows: Rows, *others: Rows) -> Tensor:
        """Return the means."""
        return mean_pooled(self.states(model, rows, rows.attention_mask), rows.attention_mask)


_PREFIX, _SUFFIX = 'This sentence of "', f'" means {MASK}.'


@dataclass(frozen=True)
class PromptBERT(EncoderMethod):
    """The state at the mask of ``This sentence of "S" means [MASK].`` (arXiv 2201.04337).

    Args:
        denoise: Whether that of the same template without the sentence, at the same positions, is subtracted.
    """

    denoise: bool = False

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the template around the sentence."""
        text = normalize_sentence(sentence)
        start, mask = len(_PREFIX), len(_PREFIX) + len(text) + len(_SUFFIX) - len(MASK) - 1
        return (Rendered(f"{_PREFIX}{text}{_SUFFIX}", (mask, mask + 1), hidden=(start, start + len(text))),)

    def vectors(self, model: Any, rows: Rows, *others: Rows) -> Tensor:
        """Return the states at the mask."""
        found = mean_pooled(self.states(model, rows, rows.attention_mask), rows.read)
        if not self.denoise:
            return found
        return found - mean_pooled(self.states(model, rows, rows.attention_mask * (1 - rows.hidden)), rows.read)
