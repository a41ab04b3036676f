"""Strategies to run a batch of token ids through a decoder and pool the last token: varlen, packed or padded."""

from __future__ import annotations

from contextlib import suppress

from torch import Tensor

from sempa_st.forward.packing import can_pack, last_states_packed, unpadded
from sempa_st.forward.varlen import VarlenUnsupported, last_states_varlen, supports_varlen
from sempa_st.model.peft_models import alora_on_last
from sempa_st.model.prompt_eol import PromptEOL, embed_rows


def can_pack_rows(module: PromptEOL, longest: int) -> bool:
    """Whether rows of a module may run in packs; see :func:`~sempa_st.forward.packing.can_pack`.

    An adapter of the suffix counts its tokens from the end of a row, so each sequence needs its own.
    """
    return not module.num_suffix_tokens and can_pack(module.decoder, longest)


class FastForward:
    """The ``forward_rows`` of a :class:`PromptEOL` for inference: the first strategy that runs its decoder.

    These are varlen attention, and packing with common prefixes computed once; if neither does, the batch runs padded.
    """

    def __call__(self, module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the pooled hidden states, of shape (batch, hidden)."""
        decoder = module.decoder
        # An adapter of the suffix counts its tokens from the end of a row, so each sequence needs its own.
        if not module.num_suffix_tokens:
            with alora_on_last(module.model, None):
                if supports_varlen(decoder):
                    with suppress(VarlenUnsupported):
                        return last_states_varlen(decoder, input_ids, attention_mask)
                if can_pack(decoder, int(attention_mask.sum(dim=1).max())):
                    return last_states_packed(decoder, unpadded(input_ids, attention_mask))
        return embed_rows(module, input_ids, attention_mask)

    def packs_batches(self, module: PromptEOL) -> bool:
        """Whether sequences of a batch share prefixes, so that a batch should hold sequences that begin alike."""
        return can_pack_rows(module, 1)


embed_rows_fast = FastForward()
"""Varlen attention on a GPU, packing elsewhere, padding where the decoder supports neither."""
