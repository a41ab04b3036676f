"""Rows under a template, run once up to its closing tokens and on from there as often as wanted."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from sempa_st.forward.decoder import forward_with_cache, within_sliding_window
from sempa_st.model.peft_models import alora_on_last
from sempa_st.model.prompt_eol import PromptEOL


class PrefixCache:
    """Rows that an activated adapter has yet to meet: a key/value cache of all but their closing tokens.

    What stands before the closing tokens is the base's, whatever the adapter, so it needs no gradients; and what all
    of the rows begin with is run for one of them.

    Args:
        module: Embedding module around a model with adapters that act on the template's closing tokens.
        input_ids: Rendered templates, padded on the left, of shape (rows, tokens).
        attention_mask: 0 on padding, of the same shape.
        closing: Number of closing tokens; those of the active adapter when left out.

    Attributes:
        mask: 0 on padding, of shape (rows, tokens): what the rows open with, padding, the rest.
    """

    def __init__(
        self, module: PromptEOL, input_ids: Tensor, attention_mask: Tensor, *, closing: int | None = None
    ) -> None:
        self._module = module
        self._closing = module.num_suffix_tokens if closing is None else closing
        self._cache = DynamicCache()
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        shared = self._shared_tokens(input_ids, attention_mask)
        # The rows' opening moves in front of the padding.
        self.mask = attention_mask * (positions >= shared)
        self.mask[:, :shared] = 1
        with torch.no_grad(), module.model.disable_adapter():
            if shared:
                start = int(attention_mask[0].argmax())
                self._run(input_ids[:1, start : start + shared], positions[:1, start : start + shared])
                self._cache.batch_repeat_interleave(len(input_ids))
            self._ids, self._positions = input_ids[:, shared:], positions[:, shared:]
            self._run(self._ids[:, : -self._closing], self._positions[:, : -self._closing])

    def last_states(self) -> Tensor:
        """Return the states at the rows' last tokens, of shape (rows, hidden), under the adapter that is active."""
        with alora_on_last(self._module.model, [self._closing] * len(self._ids)):
            return self._close()

    def base_states(self, rows: Tensor | None = None) -> Tensor:
        """Return the same under the base, without gradients.

        Args:
            rows: Numbers of the rows that are wanted; the others are dropped for good. All rows when left out.
        """
        if rows is not None:
            self._cache.batch_select_indices(rows)
            self.mask, self._ids, self._positions = self.mask[rows], self._ids[rows], self._positions[rows]
        with torch.no_grad(), self._module.model.disable_adapter():
            return self._close()

    def _close(self) -> Tensor:
        states = self._run(self._ids[:, -self._closing :], self._positions[:, -self._closing :])
        self._cache.crop(-self._closing)
        return states[:, -1]

    def _run(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        seen = self._cache.get_seq_length() + input_ids.shape[1]
        return forward_with_cache(
            self._module.decoder, self._cache, input_ids, self.mask[: len(input_ids), :seen], positions
        )

    def _shared_tokens(self, input_ids: Tensor, attention_mask: Tensor) -> int:
        """Return how many tokens all rows begin with, at least one before the closing tokens left out."""
        width = input_ids.shape[1]
        if not within_sliding_window(self._module.decoder, width):
            return 0
        starts = attention_mask.argmax(dim=1, keepdim=True)
        places = (starts + torch.arange(width, device=starts.device)).clamp(max=width - 1)
        aligned = input_ids.gather(1, places)
        same = (aligned == aligned[0]).all(dim=0)[: int(attention_mask.sum(dim=1).min()) - self._closing - 1]
        return int(same.long().cumprod(0).sum())
