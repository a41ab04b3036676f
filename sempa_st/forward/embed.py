"""Strategies to run a batch of token ids through a decoder and pool the last token: varlen, packed or padded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any

from torch import Tensor

from sempa_st.forward.packing import can_pack, last_states_packed, unpadded
from sempa_st.forward.varlen import VarlenUnsupported, last_states_varlen, supports_varlen
from sempa_st.model.peft_models import alora_on_last
from sempa_st.model.prompt_eol import PromptEOL, embed_rows


class Strategy(ABC):
    """A way to compute the last tokens' hidden states of a batch."""

    @abstractmethod
    def supports(self, decoder: Any, attention_mask: Tensor) -> bool:
        """Whether it gives the hidden states that a padded batch gives.

        Args:
            decoder: Layers without the LM head.
            attention_mask: 0 on padding, of shape (batch, seq_len).
        """

    @abstractmethod
    def last_states(self, decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states at the sequences' last tokens, of shape (batch, hidden).

        Args:
            decoder: Layers without the LM head, for which :meth:`supports` holds.
            input_ids: Token ids of shape (batch, seq_len).
            attention_mask: 0 on padding, of the same shape.
        """


class Varlen(Strategy):
    """All sequences in one row, without padding, by variable-length attention on CUDA."""

    def supports(self, decoder: Any, attention_mask: Tensor) -> bool:
        """Whether the decoder is on a GPU, in 16 bits, and asks no more of its attention than the kernel does."""
        return supports_varlen(decoder)

    def last_states(self, decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states; raises :class:`VarlenUnsupported` on what only the pass itself shows."""
        return last_states_varlen(decoder, input_ids, attention_mask)


class Packed(Strategy):
    """Several sequences a row, with what they begin with alike computed once."""

    def supports(self, decoder: Any, attention_mask: Tensor) -> bool:
        """Whether a mask of queries by keys tells the sequences of a pack apart."""
        return can_pack(decoder, int(attention_mask.sum(dim=1).max()))

    def last_states(self, decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states."""
        return last_states_packed(decoder, unpadded(input_ids, attention_mask))


class FastForward:
    """The ``forward_rows`` of a :class:`PromptEOL` for inference: the first strategy that its decoder supports.

    Args:
        strategies: Strategies in the order in which they are tried; a padded batch where none is supported.
    """

    def __init__(self, *strategies: Strategy) -> None:
        self._strategies = strategies or (Varlen(), Packed())

    def __call__(self, module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the pooled hidden states, of shape (batch, hidden)."""
        decoder = module.decoder
        # PEFT finds the closing tokens by their place in a row of its own.
        if not module.num_suffix_tokens:
            with alora_on_last(module.model, None):
                for strategy in self._strategies:
                    if strategy.supports(decoder, attention_mask):
                        with suppress(VarlenUnsupported):
                            return strategy.last_states(decoder, input_ids, attention_mask)
        return embed_rows(module, input_ids, attention_mask)

    def packs_batches(self, module: PromptEOL) -> bool:
        """Whether sequences of a batch share what they begin with, so that it is best made of such ones."""
        return not module.num_suffix_tokens and can_pack(module.decoder, 1)


embed_rows_fast = FastForward()
"""Varlen attention on a GPU, packs elsewhere, padding where neither can be."""
