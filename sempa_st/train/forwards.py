"""Forward passes of the objectives: the state that is the embedding, logits of words, log-probabilities of answers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from sempa_st.closing import OpenRows
from sempa_st.prompt_eol import PromptEOL, invocation_tokens

_ROWS_TOGETHER = 64
_PADDING = 128
"""Tokens of padding that a group of rows may hold: about what a forward pass of its own costs."""


class ReadStates(NamedTuple):
    """States of shape (rows, hidden) under the model, and of the first rows under the reference, without gradients."""

    states: Tensor
    reference: Tensor


def last_states(module: PromptEOL, input_ids: Tensor, attention_mask: Tensor, reference_rows: int = 0) -> ReadStates:
    """Return the state at each row's last token, with gradients to the adapter.

    Rows of similar length are run together: premises are longer than hypotheses, and padding costs as much as text.

    Args:
        module: Embedding module around the live model.
        input_ids: Rendered templates, padded on the left, of shape (rows, tokens).
        attention_mask: 0 on padding, of the same shape.
        reference_rows: Of how many rows, the first ones, the reference is wanted too. Only for an activated adapter,
            to which it comes for the price of the closing tokens.
    """
    lengths = attention_mask.sum(dim=1)
    states: dict[int, Tensor] = {}
    reference: dict[int, Tensor] = {}
    for rows in alike(lengths.tolist()):
        width = int(lengths[rows].max())
        ids, mask = input_ids[rows, -width:], attention_mask[rows, -width:]
        if not invocation_tokens(module.model):
            found = module({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
        else:
            open_rows = OpenRows(module, ids, mask)
            found = open_rows.last_states()
            wanted = [place for place, row in enumerate(rows) if row < reference_rows]
            if wanted:
                base = open_rows.base_states(torch.tensor(wanted, device=ids.device))
                reference |= dict(zip([rows[place] for place in wanted], base, strict=True))
        states |= dict(zip(rows, found, strict=True))
    ordered = [torch.stack([found[row] for row in sorted(found)]) for found in (states, reference or states)]
    return ReadStates(ordered[0], ordered[1][:reference_rows])


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

    The request is run once for all of its answers, as a key/value cache with gradients, unless the layers are to be
    run again for the gradients (checkpointing), which keeps no cache.

    Args:
        causal_lm: Model with the head.
        batch: ``answer_input_ids``, ``answer_attention_mask`` and ``answer`` (True on answer tokens), each of shape
            (rows x answers, tokens), and ``answers``, of shape (rows,).

    Returns:
        Sums over each answer's tokens, of shape (rows x answers,).
    """
    input_ids, answer = batch["answer_input_ids"], batch["answer"]
    if _shares_requests(causal_lm, input_ids.shape[1]):
        states, input_ids, answer = _states_after_requests(causal_lm, batch)
    else:
        mask = batch["answer_attention_mask"]
        output = causal_lm.base_model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        states, input_ids, answer = output.last_hidden_state[:, :-1], input_ids[:, 1:], answer[:, 1:]
    logits = full_logits(causal_lm, states[answer])
    token_logps = -functional.cross_entropy(logits, input_ids[answer], reduction="none")
    rows = torch.arange(len(answer), device=answer.device)[:, None].expand_as(answer)[answer]
    return token_logps.new_zeros(len(answer)).index_add(0, rows, token_logps)


def _shares_requests(causal_lm: PreTrainedModel, width: int) -> bool:
    decoder: Any = causal_lm.base_model
    runs_again = any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.modules())
    window = getattr(causal_lm.config.get_text_config(), "sliding_window", None)
    # Padding stands between a short request and its answers: positions must be told, and no window may count it.
    told = "position_ids" in inspect.signature(decoder.forward).parameters
    return told and not runs_again and (window is None or width <= window)


def _states_after_requests(causal_lm: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return states, the tokens that they predict and which of these are answer tokens, from the answers' start on."""
    input_ids, mask, answer = batch["answer_input_ids"], batch["answer_attention_mask"], batch["answer"]
    rows, width = len(batch["answers"]), input_ids.shape[1]
    every = len(input_ids) // rows
    places = torch.arange(width, device=input_ids.device)
    starts = torch.where(answer.any(dim=1), answer.int().argmax(dim=1), mask.sum(dim=1)).view(rows, every).amin(dim=1)
    longest = int(starts.max())
    request = (places[:longest] < starts[:, None]).to(mask.dtype)
    cache = DynamicCache()
    output = causal_lm.base_model(
        input_ids=input_ids[::every, :longest],
        attention_mask=request,
        position_ids=places[None, :longest],
        past_key_values=cache,
        use_cache=True,
    )
    last = output.last_hidden_state[torch.arange(rows, device=places.device), starts - 1]
    cache.batch_repeat_interleave(every)
    starts = starts.repeat_interleave(every)
    beyond = int((mask.sum(dim=1) - starts).max())
    positions = starts[:, None] + places[:beyond]
    inside = positions.clamp(max=width - 1)
    present = mask.gather(1, inside) * (positions < width)
    input_ids, answer = input_ids.gather(1, inside), answer.gather(1, inside) & present.bool()
    output = causal_lm.base_model(
        input_ids=input_ids,
        attention_mask=torch.cat([request.repeat_interleave(every, dim=0), present], dim=1),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    states = torch.cat([last.repeat_interleave(every, dim=0)[:, None], output.last_hidden_state[:, :-1]], dim=1)
    return states, input_ids, answer


def full_logits(causal_lm: PreTrainedModel, states: Tensor) -> Tensor:
    """Return float32 logits over the whole vocabulary, of shape (..., vocabulary)."""
    return cap_logits(causal_lm, causal_lm.get_output_embeddings()(states).float())
