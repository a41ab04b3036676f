"""The plain readings of a sentence without a template: the mean of its tokens, and its last token."""

from __future__ import annotations

from dataclasses import dataclass

from sempa_st.methods.method import Method, Rendered
from sempa_st.prompts import normalize_sentence


@dataclass(frozen=True)
class MeanPooling(Method):
    """The mean of the states of the sentence's tokens, BOS left out."""

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the sentence."""
        text = normalize_sentence(sentence)
        return (Rendered(text, (0, len(text))),)


@dataclass(frozen=True)
class LastToken(Method):
    """The state of the sentence's last token."""

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the sentence."""
        return (Rendered(normalize_sentence(sentence)),)
