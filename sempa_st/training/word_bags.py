"""Bags of words for the one-word objectives: the words of a sentence that may answer the template's "one word"."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WORD_TOKENS = ("first", "all")
WORD_FORMS = ("written", "lower", "both")
"""``both`` is lower case and capitalised, since either may follow the template."""
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?")
_STOP_WORDS = """
a an the is are was were be been being am of to in on at for with by and or but not no it its this that these those he
she they him his her their them i you we my your our as from there do does did has have had will would can could should
may might
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())
"""Function words, dropped from a sentence unless it has no others."""


@dataclass(frozen=True)
class WordBags:
    """Turn a sentence into a bag of words: token ids with weights.

    Args:
        tokenizer: The base model's tokenizer.
        tokens: ``first`` for the first token of each word, ``all`` for all its tokens, which share the word's weight.
        forms: Spellings of a word to include, one of :data:`WORD_FORMS`.
        stop_words: Whether to drop :data:`STOP_WORDS`.
        frequencies: Document frequency n of each lower-case word, for the idf weight log(1 + N / (1 + n)); None for
            equal weights.
        num_sentences: N, the number of sentences counted; needed with ``frequencies``.
    """

    tokenizer: PreTrainedTokenizerBase
    tokens: str = "first"
    forms: str = "both"
    stop_words: bool = True
    frequencies: Mapping[str, int] | None = None
    num_sentences: int = 0
    _ids: dict[str, list[int]] = field(default_factory=dict, init=False)

    def __call__(self, sentence: str) -> dict[int, float]:
        """Return the weight of each token id; the weights sum to 1.

        A sentence without words (only punctuation) counts as one word.
        """
        words = content_words(sentence, stop_words=self.stop_words) or [sentence]
        weights: dict[int, float] = defaultdict(float)
        for word in words:
            for form in self._spellings(word):
                ids = self._token_ids(form)
                for token in ids:
                    weights[token] += self._weight(word) / len(ids)
        total = sum(weights.values())
        return {token: weight / total for token, weight in weights.items()}

    def _spellings(self, word: str) -> list[str]:
        if self.forms == "written":
            return [word]
        lower = word.lower()
        return [lower] if self.forms == "lower" else [lower, lower.capitalize()]

    def _token_ids(self, form: str) -> list[int]:
        if form not in self._ids:
            # Tokenise the word as it follows the template's opening quote: some tokenizers add a space before text.
            quote, ids = (self._plain_ids(text) for text in ('"', '"' + form))
            ids = ids[len(quote) :] if ids[: len(quote)] == quote else self._plain_ids(form)
            self._ids[form] = ids if self.tokens == "all" else ids[:1]
        return self._ids[form]

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _weight(self, word: str) -> float:
        if self.frequencies is None:
            return 1.0
        return math.log(1 + self.num_sentences / (1 + self.frequencies.get(word.lower(), 0)))


def content_words(sentence: str, *, stop_words: bool = True) -> list[str]:
    """Return the words of a sentence in order, without :data:`STOP_WORDS` unless there are no others."""
    words: list[str] = _WORD.findall(sentence)
    content = [word for word in words if word.lower() not in STOP_WORDS]
    return content or words if stop_words else words


def document_frequencies(sentences: Iterable[str]) -> Counter[str]:
    """Count the sentences that contain each lower-case word."""
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update({word.lower() for word in _WORD.findall(sentence)})
    return counts


def without_shared(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[dict[int, float], ...]:
    """Return two bags without their common tokens, renormalised; a bag that would be empty keeps all of its tokens."""
    bags = []
    for own, other in ((first, second), (second, first)):
        remaining = {token: weight for token, weight in own.items() if token not in other} or dict(own)
        total = sum(remaining.values())
        bags.append({token: weight / total for token, weight in remaining.items()})
    return tuple(bags)


def bag_matrix(bags: Sequence[Mapping[int, float]]) -> tuple[list[int], list[list[float]]]:
    """Return the sorted distinct tokens of some bags, and a matrix of weights, of shape (bags, tokens)."""
    tokens = sorted({token for bag in bags for token in bag})
    return tokens, [[bag.get(token, 0.0) for token in tokens] for bag in bags]
