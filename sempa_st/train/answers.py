"""Token rows of the sequence objectives: a paraphrase request with each of its ranked answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    shared = next((i for i, (a, b) in enumerate(zip(request, whole, strict=False)) if a != b), len(request))
    return request[:shared], whole[shared:]


def _chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Any, **kwargs: Any) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **kwargs)
    ids: list[int] = encoded["input_ids"]
    return ids
