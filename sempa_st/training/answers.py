"""Tokenise paraphrase prompts and their ranked answers, for the objectives ``dpo`` and ``listwise``."""

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

_CHUNK = 1024
"""Number of prompts tokenised in one call."""


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
    """Tokenise a prompt and one answer as TRL's DPO trainer does.

    A plain-text answer ends in the end-of-sequence token; the end of a chat answer is up to the chat template.

    Args:
        tokenizer: The base model's tokenizer.
        prompt: Prompt, as text or as chat messages.
        answer: Answer, in the same form.

    Returns:
        Token ids of the prompt and of the answer. If tokenising them together changes the prompt's last tokens, these
        belong to the answer.
    """
    if isinstance(prompt, str):
        prompt_ids = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + answer + str(tokenizer.eos_token))["input_ids"]
    else:
        prompt_ids = _chat_ids(tokenizer, prompt, add_generation_prompt=True)
        whole = _chat_ids(tokenizer, prompt + answer)
    shared = common_prefix([prompt_ids, whole])
    return prompt_ids[:shared], whole[shared:]


def drop_too_long(data: NliData, tokenizer: PreTrainedTokenizerBase, *, paraphrase: str, max_length: int) -> NliData:
    """Drop and count the triplets whose prompt alone reaches ``max_length`` with any of their answers.

    Truncation would leave no answer token to train on. TRL's trainer drops such examples too, but silently.

    Args:
        data: Triplets.
        tokenizer: The base model's tokenizer.
        paraphrase: Name of a paraphrase template, or the template.
        max_length: Maximum training sequence length in tokens.

    Raises:
        SempaError: If no triplet is left.
    """
    kept: list[Triplet] = []
    for start in range(0, len(data.triplets), _CHUNK):
        triplets = data.triplets[start : start + _CHUNK]
        examples = ranked_answers(triplets, tokenizer, paraphrase=paraphrase)
        lengths = _prompt_lengths(tokenizer, [prompt for prompt, _ in examples])
        for triplet, (prompt, answers), length in zip(triplets, examples, lengths, strict=True):
            # answer_ids may return fewer prompt tokens than the prompt has by itself, never more.
            if length < max_length or all(
                len(answer_ids(tokenizer, prompt, answer)[0]) < max_length for answer in answers
            ):
                kept.append(triplet)
    if not kept:
        raise SempaError(
            f"None of the {len(data.triplets)} triplets of {data.source} can be trained on: the paraphrase prompt "
            f"alone fills max_length, {max_length} tokens. Raise --max-length, or shorten the premises."
        )
    return replace(data, triplets=kept, too_long=len(data.triplets) - len(kept))


def _prompt_lengths(tokenizer: PreTrainedTokenizerBase, prompts: list[Any]) -> Iterator[int]:
    if isinstance(prompts[0], str):
        return map(len, tokenizer(prompts)["input_ids"])
    return map(len, _chat_ids(tokenizer, prompts, add_generation_prompt=True))


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Any, **kwargs: Any) -> Any:
    """Return the token ids of a conversation, or of each of a list of conversations."""
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    return encoded["input_ids"]
