"""Methods for encoders that were not trained for sentences: mean pooling, and PromptBERT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sempa_st.methods.method import MASK, Batch, Method, Rendered, mean_pooled
from sempa_st.model.templates import normalize_sentence


@dataclass(frozen=True)
class EncoderMethod(Method):
    """A method for encoders, whose attention is bidirectional."""

    for_encoders: ClassVar[bool] = True
    packs: ClassVar[bool] = False

    def depth(self, model: Any) -> int:
        """Return the number of layers."""
        return int(model.config.num_hidden_layers)

    def states(self, model: Any, batch: Batch, attention_mask: Tensor) -> Tensor:
        """Return the hidden states of the layer that is pooled, of shape (batch, seq_len, hidden)."""
        output = model(input_ids=batch.input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return output.hidden_states[self.num_layers(model)]


@dataclass(frozen=True)
class EncoderMean(EncoderMethod):
    """Mean pooling over all tokens (BERT-avg, and the same for T5's encoder)."""

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the sentence."""
        return (Rendered(normalize_sentence(sentence)),)

    def vectors(self, model: Any, batch: Batch, *others: Batch) -> Tensor:
        """Return the means."""
        return mean_pooled(self.states(model, batch, batch.attention_mask), batch.attention_mask)


_PREFIX, _SUFFIX = 'This sentence of "', f'" means {MASK}.'


@dataclass(frozen=True)
class PromptBERT(EncoderMethod):
    """The hidden state at the mask of ``This sentence of "S" means [MASK].`` (arXiv 2201.04337).

    Args:
        denoise: Whether to subtract the state of the same template with the sentence masked.
    """

    denoise: bool = False

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the template around the sentence."""
        text = normalize_sentence(sentence)
        start, mask = len(_PREFIX), len(_PREFIX) + len(text) + len(_SUFFIX) - len(MASK) - 1
        return (Rendered(f"{_PREFIX}{text}{_SUFFIX}", (mask, mask + 1), hidden=(start, start + len(text))),)

    def vectors(self, model: Any, batch: Batch, *others: Batch) -> Tensor:
        """Return the hidden states at the mask."""
        states = mean_pooled(self.states(model, batch, batch.attention_mask), batch.read)
        if not self.denoise:
            return states
        return states - mean_pooled(self.states(model, batch, batch.attention_mask * (1 - batch.hidden)), batch.read)
