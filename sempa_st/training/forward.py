"""Forward passes of the objectives: last hidden states, logits of words, log-probabilities of answers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sempa_st.forward.batching import group_by_length
from sempa_st.forward.decoder import can_cache, final_logits
from sempa_st.forward.embed import embed_rows_fast
from sempa_st.forward.packing import can_pack, states_packed, unpadded
from sempa_st.forward.prefix_cache import PrefixCache
from sempa_st.model.prompt_eol import PromptEOL, embed_rows

_MAX_SEQUENCES = 64
_MAX_PADDING = 128
"""Number of padding tokens in a group that costs about as much as another forward pass."""


class LastStates(NamedTuple):
    """Hidden states of shape (batch, hidden), with gradients, and reference states of the first sequences, without."""

    states: Tensor
    reference: Tensor


def last_states(module: PromptEOL, input_ids: Tensor, attention_mask: Tensor, num_reference: int = 0) -> LastStates:
    """Return the hidden state of the last token of each sequence, with gradients to the adapter.

    Little is computed for padding: sequences are packed, or grouped by length.

    Args:
        module: Embedding module around the trained model.
        input_ids: Sentences under the template, of shape (batch, seq_len), padded on either side.
        attention_mask: 0 on padding, of the same shape.
        num_reference: Number of leading sequences for which the reference states are returned as well. Only for an
            adapter that acts on the suffix alone, whose prefix cache the reference shares.
    """
    if module.num_suffix_tokens:
        return _suffix_states(module, unpadded(input_ids, attention_mask), num_reference)
    states = embed_rows_fast(module, input_ids, attention_mask)
    return LastStates(states, states[:0])


def _suffix_states(module: PromptEOL, sequences: list[Tensor], num_reference: int) -> LastStates:
    """Return the states for an adapter that acts on the suffix alone, in groups of similar length."""
    device = module.decoder.device
    states: dict[int, Tensor] = {}
    reference: dict[int, Tensor] = {}
    lengths = [len(sequence) for sequence in sequences]
    for group in group_by_length(lengths, max_sequences=_MAX_SEQUENCES, max_padding=_MAX_PADDING):
        ids, mask = (
            pad_sequence([make(sequences[index]) for index in group], batch_first=True, padding_side="left").to(device)
            for make in (torch.clone, torch.ones_like)
        )
        selected = [position for position, index in enumerate(group) if index < num_reference]
        found, base = _run_group(module, ids, mask, torch.tensor(selected, dtype=torch.long, device=device))
        states |= dict(zip(group, found, strict=True))
        reference |= dict(zip([group[position] for position in selected], base, strict=True))
    ordered = [torch.stack([by_index[i] for i in sorted(by_index)]) for by_index in (states, reference or states)]
    return LastStates(ordered[0], ordered[1][:num_reference])


def _run_group(module: PromptEOL, ids: Tensor, mask: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states of all sequences, and the base's of the selected ones, without gradients."""
    if can_cache(module.decoder):
        prefix_cache = PrefixCache(module, ids, mask)
        states = prefix_cache.suffix_states()
        return states, prefix_cache.base_suffix_states(selected) if len(selected) else states[:0]
    states = embed_rows(module, ids, mask)
    with torch.no_grad(), module.model.disable_adapter():
        return states, embed_rows(module, ids[selected], mask[selected]) if len(selected) else states[:0]


class TrainingForward:
    """Forward strategy of a module whose ``forward`` is differentiated."""

    def __call__(self, module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the states of :func:`last_states`, of shape (batch, hidden)."""
        return last_states(module, input_ids, attention_mask).states

    def packs_batches(self, module: PromptEOL) -> bool:
        """Return False, since training batches are drawn at random."""
        return False


def word_logits(causal_lm: PreTrainedModel, states: Tensor, words: Tensor) -> Tensor:
    """Return the logits of some tokens only.

    Args:
        causal_lm: Model with an LM head; its scale and final soft cap, if any, are applied.
        states: Last hidden states, of shape (batch, hidden).
        words: Token ids, of shape (words,).

    Returns:
        Logits of shape (batch, words), in float32, since the losses use small differences from the reference.
    """
    head = causal_lm.get_output_embeddings()
    bias = getattr(head, "bias", None)
    logits = functional.linear(
        states.float(), head.weight[words].float(), None if bias is None else bias[words].float()
    )
    return final_logits(causal_lm.config, logits)


def answer_log_probabilities(causal_lm: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return log pi(y | x) of whole answers, of shape (batch * num_answers,); see :func:`answer_token_logps`."""
    token_logps, answer_of_token = answer_token_logps(causal_lm, batch)
    return token_logps.new_zeros(len(batch["answer_mask"])).index_add(0, answer_of_token, token_logps)


def answer_token_logps(causal_lm: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each answer token; the LM head runs on answer positions only.

    Args:
        causal_lm: Model with an LM head.
        batch: A batch of :class:`sempa_st.training.batches.AnswerInputs`.

    Returns:
        Log-probabilities, and the number of the answer that each token belongs to, both of shape (tokens,).
    """
    input_ids = batch["answer_input_ids"]
    states = shared_states(causal_lm.base_model, input_ids, batch["answer_attention_mask"])
    mask = batch["answer_mask"][:, 1:]  # the state at a position predicts the next token
    logits = full_logits(causal_lm, states[:, :-1][mask])
    token_logps = -functional.cross_entropy(logits, input_ids[:, 1:][mask], reduction="none")
    return token_logps, torch.arange(len(mask), device=mask.device)[:, None].expand_as(mask)[mask]


def full_logits(causal_lm: PreTrainedModel, states: Tensor) -> Tensor:
    """Return float32 logits over the whole vocabulary, of shape (..., vocab_size)."""
    return final_logits(causal_lm.config, causal_lm.get_output_embeddings()(states).float())


def shared_states(decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last hidden states, with gradients; prefixes that sequences share are computed once.

    Args:
        decoder: Model without the LM head.
        input_ids: Sequences padded on the right, of shape (batch, seq_len).
        attention_mask: 0 on padding, of the same shape.

    Returns:
        Hidden states of shape (batch, seq_len, hidden), undefined on padding.
    """
    mask = attention_mask.bool()
    if not can_pack(decoder, int(mask.sum(dim=1).max())):
        output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return output.last_hidden_state
    packed = states_packed(decoder, unpadded(input_ids, attention_mask))
    index = torch.zeros_like(input_ids)  # of each token among the packed ones
    index[mask] = torch.cat(packed.indices).to(index.device)
    return packed.states.index_select(0, index.flatten()).view(*index.shape, -1)
