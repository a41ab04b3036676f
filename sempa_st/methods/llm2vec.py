"""LLM2Vec (arXiv 2404.05961): every token sees every other, and the sentence is the mean of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sempa_st.errors import SempaError
from sempa_st.forward.decoder import states_after_layers
from sempa_st.forward.packing import DENSE_MASK_ATTENTION, additive_mask
from sempa_st.methods.method import Method, Rendered, Rows, mean_pooled
from sempa_st.model.patching import attention_implementation
from sempa_st.model.templates import normalize_sentence


@dataclass(frozen=True)
class LLM2Vec(Method):
    """The mean of the sentence's tokens without the causal mask.

    Args:
        before: Text before the sentence, which is not read: a chat format's, under which some checkpoints were trained.
        after: Text behind it, which is read too.
    """

    packs: ClassVar[bool] = False
    before: str = ""
    after: str = ""

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the sentence between the two texts."""
        text = f"{self.before}{normalize_sentence(sentence)}{self.after}"
        return (Rendered(text, (len(self.before), len(text))),)

    def vectors(self, model: Any, rows: Rows, *others: Rows) -> Tensor:
        """Return the means."""
        mask = rows.attention_mask
        added = additive_mask(mask[:, None, None].expand(-1, -1, mask.shape[1], -1).bool(), model.dtype)
        return mean_pooled(states_after_layers(model, self.layers_run(model), rows.input_ids, added), rows.read)

    def check(self, model: Any) -> None:
        """Raise :class:`SempaError` if the decoder's attention takes no mask of its own."""
        super().check(model)
        found = attention_implementation(model.config.get_text_config())
        if found not in DENSE_MASK_ATTENTION:
            raise SempaError(
                f"llm2vec cannot lift the causal mask of attention {found!r}. Use one of {DENSE_MASK_ATTENTION}."
            )
