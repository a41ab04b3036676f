"""Run sequences up to the suffix of their template once, and the suffix as often as wanted."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from sempa_st.forward.decoder import forward_with_cache, reads_mask_and_positions, within_sliding_window
from sempa_st.model.peft_models import alora_on_last
from sempa_st.model.prompt_eol import PromptEOL


class PrefixCache:
    """KV cache of each sequence up to the adapter's invocation tokens; the suffix then runs with the aLoRA active.

    The cached part is the base model's, whatever the adapter, so it has no gradients. The prefix that all sequences
    share (P) runs for one of them, and moves in front of the padding (-)::

        input_ids                   cached, base model     run again and again, adapter active or not
        - - P P P a a S S           P P P - - a a          S S
        P P P b b b b S S           P P P b b b b          S S

    Args:
        module: Embedding module around a model whose adapters act on the template's suffix, with a decoder for which
            :func:`can_cache` holds.
        input_ids: Rendered templates, padded on the left, of shape (batch, seq_len).
        attention_mask: 0 on padding, of the same shape.
        num_suffix_tokens: Length of the suffix; that of the active adapter when None.

    Attributes:
        mask: 0 on padding, of shape (batch, seq_len), in the order of the cache: shared prefix, padding, the rest.
    """

    def __init__(
        self, module: PromptEOL, input_ids: Tensor, attention_mask: Tensor, *, num_suffix_tokens: int | None = None
    ) -> None:
        self._module = module
        self._suffix = module.num_suffix_tokens if num_suffix_tokens is None else num_suffix_tokens
        self._cache = DynamicCache()
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        shared = self._shared_prefix(input_ids, attention_mask)
        self.mask = attention_mask * (positions >= shared)
        self.mask[:, :shared] = 1
        with torch.no_grad(), module.model.disable_adapter():
            if shared:
                start = int(attention_mask[0].argmax())
                self._run(input_ids[:1, start : start + shared], positions[:1, start : start + shared])
                self._cache.batch_repeat_interleave(len(input_ids))
            self._ids, self._positions = input_ids[:, shared:], positions[:, shared:]
            self._run(self._ids[:, : -self._suffix], self._positions[:, : -self._suffix])

    def suffix_states(self) -> Tensor:
        """Return the last tokens' hidden states under the active adapter, of shape (batch, hidden)."""
        with alora_on_last(self._module.model, [self._suffix] * len(self._ids)):
            return self._run_suffix()

    def base_suffix_states(self, indices: Tensor | None = None) -> Tensor:
        """Return the last tokens' hidden states under the base model, without gradients.

        Args:
            indices: Indices of the sequences to run; the others are dropped for good. All sequences when None.
        """
        if indices is not None:
            self._cache.batch_select_indices(indices)
            self.mask, self._ids, self._positions = self.mask[indices], self._ids[indices], self._positions[indices]
        with torch.no_grad(), self._module.model.disable_adapter():
            return self._run_suffix()

    def _run_suffix(self) -> Tensor:
        states = self._run(self._ids[:, -self._suffix :], self._positions[:, -self._suffix :])
        self._cache.crop(-self._suffix)
        return states[:, -1]

    def _run(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        seen = self._cache.get_seq_length() + input_ids.shape[1]
        return forward_with_cache(
            self._module.decoder, self._cache, input_ids, self.mask[: len(input_ids), :seen], positions
        )

    def _shared_prefix(self, input_ids: Tensor, attention_mask: Tensor) -> int:
        """Return the length of the prefix that all sequences share, at least one token before the suffix left out."""
        width = input_ids.shape[1]
        decoder = self._module.decoder
        if not (reads_mask_and_positions(decoder) and within_sliding_window(decoder, width)):
            return 0  # padding moves into the middle of the rows
        starts = attention_mask.argmax(dim=1, keepdim=True)
        indices = (starts + torch.arange(width, device=starts.device)).clamp(max=width - 1)
        aligned = input_ids.gather(1, indices)
        same = (aligned == aligned[0]).all(dim=0)[: int(attention_mask.sum(dim=1).min()) - self._suffix - 1]
        return int(same.long().cumprod(0).sum())
