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
    """A strategy to compute the last tokens' hidden states of a batch."""

    @abstractmethod
    def supports(self, decoder: Any, attention_mask: Tensor) -> bool:
        """Whether the strategy gives the hidden states that a padded batch gives.

        Args:
            decoder: Layers without the LM head.
            attention_mask: 0 on padding, of shape (batch, seq_len).
        """

    @abstractmethod
    def last_states(self, decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last tokens' hidden states, of shape (batch, hidden).

        Args:
            decoder: Layers without the LM head, for which :meth:`supports` holds.
            input_ids: Token ids of shape (batch, seq_len).
            attention_mask: 0 on padding, of the same shape.
        """


class Varlen(Strategy):
    """All sequences in one row, without padding, by variable-length attention on CUDA."""

    def supports(self, decoder: Any, attention_mask: Tensor) -> bool:
        """Whether the kernel runs the decoder; see :func:`supports_varlen`."""
        return supports_varlen(decoder)

    def last_states(self, decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states; raise :class:`VarlenUnsupported` if the pass shows that the kernel cannot."""
        return last_states_varlen(decoder, input_ids, attention_mask)


class Packed(Strategy):
    """Several sequences per row, common prefixes computed once."""

    def supports(self, decoder: Any, attention_mask: Tensor) -> bool:
        """Whether a mask of queries by keys keeps the sequences of a pack apart; see :func:`can_pack`."""
        return can_pack(decoder, int(attention_mask.sum(dim=1).max()))

    def last_states(self, decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the hidden states."""
        return last_states_packed(decoder, unpadded(input_ids, attention_mask))


class FastForward:
    """The ``forward_rows`` of a :class:`PromptEOL` for inference: the first strategy that supports its decoder.

    If none does, the batch runs padded.
    """

    _strategies: tuple[Strategy, ...] = (Varlen(), Packed())

    def __call__(self, module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the pooled hidden states, of shape (batch, hidden)."""
        decoder = module.decoder
        # An adapter of the suffix counts its tokens from the end of a row, so each sequence needs its own.
        if not module.num_suffix_tokens:
            with alora_on_last(module.model, None):
                for strategy in self._strategies:
                    if strategy.supports(decoder, attention_mask):
                        with suppress(VarlenUnsupported):
                            return strategy.last_states(decoder, input_ids, attention_mask)
        return embed_rows(module, input_ids, attention_mask)

    def packs_batches(self, module: PromptEOL) -> bool:
        """Whether sequences of a batch share prefixes, so that a batch should hold sequences that begin alike."""
        return not module.num_suffix_tokens and can_pack(module.decoder, 1)


embed_rows_fast = FastForward()
"""Varlen attention on a GPU, packing elsewhere, padding where the decoder supports neither."""
