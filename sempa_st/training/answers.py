"""Token rows of the sequence objectives: a paraphrase request with each of its ranked answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sempa_st.data.nli import NliData, Triplet
from sempa_st.data.preferences import ranked_answers
from sempa_st.errors import SempaError
from sempa_st.model.token_rows import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOGETHER = 1024
"""Requests that are tokenised at once."""


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
    """Tokenise a request and one answer as TRL's DPO trainer does.

    A plain-text answer ends in the end-of-sequence token; what ends a chat answer is the chat template's business.

    Args:
        tokenizer: The base's tokenizer.
        prompt: Request, as text or as chat messages.
        answer: Answer, in the same form.

    Returns:
        Token ids of the request, up to where the whole text still agrees with it, and of the answer.
    """
    if isinstance(prompt, str):
        request = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + answer + str(tokenizer.eos_token))["input_ids"]
    else:
        request = _chat_ids(tokenizer, prompt, add_generation_prompt=True)
        whole = _chat_ids(tokenizer, prompt + answer)
    shared = common_prefix([request, whole])
    return request[:shared], whole[shared:]


def drop_too_long(data: NliData, tokenizer: PreTrainedTokenizerBase, *, paraphrase: str, max_length: int) -> NliData:
    """Leave out, and count, the triplets whose request leaves no token of ``max_length`` to one of their answers.

    Cut to that length they would have nothing left to learn from. TRL's trainer drops such rows too, without a word.

    Args:
        data: Triplets.
        tokenizer: The base's tokenizer.
        paraphrase: Name of a paraphrase template.
        max_length: Longest training sequence in tokens.

    Raises:
        SempaError: If none is left.
    """
    kept: list[Triplet] = []
    for start in range(0, len(data.triplets), _TOGETHER):
        triplets = data.triplets[start : start + _TOGETHER]
        rows = ranked_answers(triplets, tokenizer, paraphrase=paraphrase)
        lengths = _request_lengths(tokenizer, [request for request, _ in rows])
        for triplet, (request, answers), length in zip(triplets, rows, lengths, strict=True):
            # What counts is where request and answer part, which is never behind the request's own end.
            if length < max_length or all(
                len(answer_ids(tokenizer, request, answer)[0]) < max_length for answer in answers
            ):
                kept.append(triplet)
    if not kept:
        raise SempaError(
            f"None of the {len(data.triplets)} triplets of {data.source} can be trained on: the paraphrase request "
            f"alone fills max_length, {max_length} tokens. Raise --max-length, or shorten the premises."
        )
    return replace(data, triplets=kept, too_long=len(data.triplets) - len(kept))


def _request_lengths(tokenizer: PreTrainedTokenizerBase, requests: list[Any]) -> Iterator[int]:
    if isinstance(requests[0], str):
        return map(len, tokenizer(requests)["input_ids"])
    return map(len, _chat_ids(tokenizer, requests, add_generation_prompt=True))


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Any, **kwargs: Any) -> Any:
    """Return the token ids of a conversation, or of each of a list of conversations."""
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    return encoded["input_ids"]
