"""Forward passes of the objectives: the state that is the embedding, logits of words, log-probabilities of answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sempa_st.closing import OpenRows
from sempa_st.embed import embed_packed
from sempa_st.packing import unpadded
from sempa_st.prompt_eol import PromptEOL
from sempa_st.train.prefixes import shared_states

_ROWS_TOGETHER = 64
_PADDING = 128
"""Tokens of padding that a group of rows may hold: about what a forward pass of its own costs."""


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
    if module.closing_only:
        return _closing_states(module, unpadded(input_ids, attention_mask), reference_rows)
    states = embed_packed(module, input_ids, attention_mask)
    return ReadStates(states, states[:0])


def _closing_states(module: PromptEOL, rows: list[Tensor], reference_rows: int) -> ReadStates:
    """Return the states under an adapter of the closing tokens; rows of similar length are run together."""
    device = module.decoder.device
    states: dict[int, Tensor] = {}
    reference: dict[int, Tensor] = {}
    for group in alike([len(row) for row in rows]):
        ids, mask = (
            pad_sequence([make(rows[row]) for row in group], batch_first=True, padding_side="left").to(device)
            for make in (torch.clone, torch.ones_like)
        )
        open_rows = OpenRows(module, ids, mask)
        states |= dict(zip(group, open_rows.last_states(), strict=True))
        wanted = [place for place, row in enumerate(group) if row < reference_rows]
        if wanted:
            base = open_rows.base_states(torch.tensor(wanted, device=device))
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


def alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the numbers of rows in groups of similar length, so that little of a group is padding.

    Args:
        lengths: Tokens of each row.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    group: list[int] = []
    for row in order:
        padding = sum(lengths[row] - lengths[other] for other in group)
        if len(group) == _ROWS_TOGETHER or padding > _PADDING:
            yield group
            group = []
        group.append(row)
    yield group


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
