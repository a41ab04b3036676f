"""Echo embeddings (arXiv 2402.15449): the sentence twice, so that its second tokens have seen all of it."""

from __future__ import annotations

from dataclasses import dataclass

from sempa_st.methods.method import Method, Rendered
from sempa_st.prompts import normalize_sentence

_FIRST, _SECOND = "Rewrite the sentence: ", "\nThe rewritten sentence: "


@dataclass(frozen=True)
class Echo(Method):
    """The mean of the states of the second occurrence's tokens."""

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return a request to rewrite the sentence, and the sentence as its answer."""
        text = normalize_sentence(sentence)
        start = len(_FIRST) + len(text) + len(_SECOND)
        return (Rendered(f"{_FIRST}{text}{_SECOND}{text}", (start, start + len(text))),)
