"""LLM2Vec (arXiv 2404.05961): bidirectional attention and mean pooling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sempa_st.errors import SempaError
from sempa_st.forward.decoder import attention_only, states_after_layers
from sempa_st.forward.packing import DENSE_MASK_ATTENTION, additive_mask
from sempa_st.methods.method import Batch, Method, Rendered, mean_pooled
from sempa_st.model.patching import attention_implementation
from sempa_st.model.templates import normalize_sentence


@dataclass(frozen=True)
class LLM2Vec(Method):
    """Mean pooling over the sentence's tokens, without the causal mask.

    Args:
        before: Text before the sentence, not pooled: some checkpoints were trained under a chat format.
        after: Text after the sentence, pooled too.
    """

    packs: ClassVar[bool] = False
    before: str = ""
    after: str = ""

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the sentence between the two texts."""
        text = f"{self.before}{normalize_sentence(sentence)}{self.after}"
        return (Rendered(text, (len(self.before), len(text))),)

    def vectors(self, model: Any, batch: Batch, *others: Batch) -> Tensor:
        """Return the means."""
        mask = batch.attention_mask
        everywhere = additive_mask(mask[:, None, None].expand(-1, -1, mask.shape[1], -1).bool(), model.dtype)
        states = states_after_layers(model, self.num_layers(model), batch.input_ids, everywhere)
        return mean_pooled(states, batch.read)

    def check(self, model: Any) -> None:
        """Raise :class:`SempaError` if the decoder's attention takes no mask of queries by keys."""
        super().check(model)
        if not attention_only(model):
            raise SempaError(
                f"llm2vec cannot let the layers of {type(model).__name__} see what follows: they are not attention "
                "alone. Choose mean, or a decoder of attention layers."
            )
        attention = attention_implementation(model.config.get_text_config())
        if attention not in DENSE_MASK_ATTENTION:
            raise SempaError(
                f"llm2vec cannot remove the causal mask of attention {attention!r}. Expected one of: "
                f"{', '.join(DENSE_MASK_ATTENTION)}."
            )
