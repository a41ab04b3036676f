"""Forward passes of the objectives: the state that is the embedding, logits of words, log-probabilities of answers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sempa_st.forward.batching import groups_by_length
from sempa_st.forward.embed import embed_rows_fast
from sempa_st.forward.packing import can_pack, states_packed, unpadded
from sempa_st.forward.prefix_cache import PrefixCache
from sempa_st.model.prompt_eol import PromptEOL


class ReadStates(NamedTuple):
    """States of shape (rows, hidden) under the model, and of the first rows under the reference, without gradients."""

    states: Tensor
    reference: Tensor


def last_states(module: PromptEOL, input_ids: Tensor, attention_mask: Tensor, reference_rows: int = 0) -> ReadStates:
    """Return the state at each row's last token, with gradients to the adapter.

    Padding, which would cost as much as text, is all but left out: rows are packed, or run with others of their length.

    Args:
        module: Embedding module around the live model.
        input_ids: Rendered templates, of shape (rows, tokens); padding may stand on either side.
        attention_mask: 0 on padding, of the same shape.
        reference_rows: Of how many rows, the first ones, the reference is wanted too. Only for an adapter that
            acts on the closing tokens alone, to which it comes for the price of these.
    """
    if module.num_suffix_tokens:
        return _suffix_states(module, unpadded(input_ids, attention_mask), reference_rows)
    states = embed_rows_fast(module, input_ids, attention_mask)
    return ReadStates(states, states[:0])


def _suffix_states(module: PromptEOL, rows: list[Tensor], reference_rows: int) -> ReadStates:
    """Return the states under an adapter of the closing tokens; rows of similar length are run together."""
    device = module.decoder.device
    states: dict[int, Tensor] = {}
    reference: dict[int, Tensor] = {}
    for group in groups_by_length([len(row) for row in rows]):
        ids, mask = (
            pad_sequence([make(rows[row]) for row in group], batch_first=True, padding_side="left").to(device)
            for make in (torch.clone, torch.ones_like)
        )
        open_rows = PrefixCache(module, ids, mask)
        states |= dict(zip(group, open_rows.suffix_states(), strict=True))
        wanted = [place for place, row in enumerate(group) if row < reference_rows]
        if wanted:
            base = open_rows.base_suffix_states(torch.tensor(wanted, device=device))
            reference |= dict(zip([group[place] for place in wanted], base, strict=True))
    ordered = [torch.stack([found[row] for row in sorted(found)]) for found in (states, reference or states)]
    return ReadStates(ordered[0], ordered[1][:reference_rows])


class TrainingForward:
    """The ``forward_rows`` of a module whose ``forward`` is trained through."""

    def __call__(self, module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the states of :func:`last_states`."""
        return last_states(module, input_ids, attention_mask).states

    def packs_batches(self, module: PromptEOL) -> bool:
        """Return False: the trainer's batches are drawn at random."""
        return False


def word_logits(causal_lm: PreTrainedModel, states: Tensor, words: Tensor) -> Tensor:
    """Return the LM head's logits of some words only.

    Args:
        causal_lm: Model with the head; its final soft cap, if any, is applied.
        states: Last hidden states of shape (rows, hidden).
        words: Token ids of shape (words,).

    Returns:
        Logits of shape (rows, words), in float32: what counts is their small distance from the reference's.
    """
    head = causal_lm.get_output_embeddings()
    bias = getattr(head, "bias", None)
    logits = functional.linear(
        states.float(), head.weight[words].float(), None if bias is None else bias[words].float()
    )
    return cap_logits(causal_lm, logits)


def cap_logits(causal_lm: PreTrainedModel, logits: Tensor) -> Tensor:
    """Apply the model's final soft cap, c tanh(logits / c), where it has one (Gemma 2)."""
    cap = getattr(causal_lm.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def answer_log_probabilities(causal_lm: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Return log pi(y | x) of whole answers, the LM head run on the answers' positions only.

    Args:
        causal_lm: Model with the head.
        batch: ``answer_input_ids``, ``answer_attention_mask`` and ``answer`` (True on answer tokens), each of shape
            (rows x answers, tokens), a row's answers next to each other, and ``answers``, of shape (rows,).

    Returns:
        Sums over each answer's tokens, of shape (rows x answers,).
    """
    input_ids = batch["answer_input_ids"]
    states = shared_states(causal_lm.base_model, input_ids, batch["answer_attention_mask"])
    answer = batch["answer"][:, 1:]
    logits = full_logits(causal_lm, states[:, :-1][answer])
    token_logps = -functional.cross_entropy(logits, input_ids[:, 1:][answer], reduction="none")
    rows = torch.arange(len(answer), device=answer.device)[:, None].expand_as(answer)[answer]
    return token_logps.new_zeros(len(answer)).index_add(0, rows, token_logps)


def full_logits(causal_lm: PreTrainedModel, states: Tensor) -> Tensor:
    """Return float32 logits over the whole vocabulary, of shape (..., vocabulary)."""
    return cap_logits(causal_lm, causal_lm.get_output_embeddings()(states).float())


def shared_states(decoder: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the last hidden states of rows, the beginning that some of them share run once, with its gradients.

    Args:
        decoder: Layers without the LM head.
        input_ids: Rows padded on the right, of shape (rows, tokens).
        attention_mask: 0 on padding, of the same shape.

    Returns:
        States of shape (rows, tokens, hidden); those of padding hold anything.
    """
    kept = attention_mask.bool()
    if not can_pack(decoder, int(kept.sum(dim=1).max())):
        output = decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        states: Tensor = output.last_hidden_state
        return states
    packed = states_packed(decoder, unpadded(input_ids, attention_mask))
    places = torch.zeros_like(input_ids)
    places[kept] = torch.cat(packed.indices).to(places.device)
    return packed.states.index_select(0, places.flatten()).view(*places.shape, -1)
