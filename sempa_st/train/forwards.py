"""Forward passes of the objectives: the state that is the embedding, logits of words, log-probabilities of answers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel

from sempa_st.prompt_eol import PromptEOL, activated, invocation_tokens

_ROWS_TOGETHER = 32


def last_states(module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the state at each row's last token, with gradients to the adapter.

    Rows of similar length are run together: premises are longer than hypotheses, and padding costs as much as text.

    Args:
        module: Embedding module around the live model.
        input_ids: Rendered templates, padded on the left, of shape (rows, tokens).
        attention_mask: 0 on padding, of the same shape.

    Returns:
        States of shape (rows, hidden).
    """
    lengths = attention_mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    states = []
    for rows in order.split(_ROWS_TOGETHER):
        longest = int(lengths[rows[-1]])
        states.append(_run_together(module, input_ids[rows, -longest:], attention_mask[rows, -longest:]))
    return torch.cat(states)[order.argsort()]


def _run_together(module: PromptEOL, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Run rows padded on the left.

    What stands before an activated adapter's closing tokens never meets the adapter, so it is run without gradients,
    as a key/value cache for the few tokens that are trained.
    """
    closing = len(invocation_tokens(module.model))
    if not closing:
        features = module({"input_ids": input_ids, "attention_mask": attention_mask})
        states: Tensor = features["sentence_embedding"]
        return states
    decoder = module.decoder
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=decoder.config)
    with torch.no_grad():
        decoder(
            input_ids=input_ids[:, :-closing],
            attention_mask=attention_mask[:, :-closing],
            position_ids=positions[:, :-closing],
            past_key_values=cache,
            use_cache=True,
        )
    with activated(module.model, torch.zeros(len(input_ids), dtype=torch.long)):
        output = decoder(
            input_ids=input_ids[:, -closing:],
            attention_mask=attention_mask,
            position_ids=positions[:, -closing:],
            past_key_values=cache,
            use_cache=True,
        )
    last: Tensor = output.last_hidden_state[:, -1]
    return last


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
            (rows, tokens).

    Returns:
        Sums over each answer's tokens, of shape (rows,).
    """
    input_ids = batch["answer_input_ids"]
    output = causal_lm.base_model(input_ids=input_ids, attention_mask=batch["answer_attention_mask"], use_cache=False)
    answer = batch["answer"][:, 1:]
    states = output.last_hidden_state[:, :-1][answer]
    logits = full_logits(causal_lm, states)
    token_logps = -functional.cross_entropy(logits, input_ids[:, 1:][answer], reduction="none")
    rows = torch.arange(len(answer), device=answer.device)[:, None].expand_as(answer)[answer]
    return token_logps.new_zeros(len(answer)).index_add(0, rows, token_logps)


def full_logits(causal_lm: PreTrainedModel, states: Tensor) -> Tensor:
    """Return float32 logits over the whole vocabulary, of shape (..., vocabulary)."""
    return cap_logits(causal_lm, causal_lm.get_output_embeddings()(states).float())
