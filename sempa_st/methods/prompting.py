"""Methods that only choose the text and the pooled tokens: templates, mean and last-token pooling, Echo."""

from __future__ import annotations

from dataclasses import dataclass

from sempa_st.methods.method import Method, Rendered
from sempa_st.model.templates import embedding_template, normalize_sentence


@dataclass(frozen=True)
class OneWordTemplate(Method):
    """Last-token pooling under a template (arXiv 2307.16645; CoT and KE: arXiv 2404.03921)."""

    template: str = "prompteol"

    def __post_init__(self) -> None:
        embedding_template(self.template)

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the template around the sentence."""
        return (Rendered(embedding_template(self.template).text(sentence)),)


@dataclass(frozen=True)
class PretendedCoT(OneWordTemplate):
    """A template that pretends to have thought step by step."""

    template: str = "pretended-cot"


@dataclass(frozen=True)
class KnowledgeEnhancement(OneWordTemplate):
    """A template that first says what matters in a sentence; pooled from the second-to-last layer."""

    template: str = "knowledge-enhancement"

    def default_layer(self, depth: int) -> int:
        """Return -2."""
        return -2


@dataclass(frozen=True)
class MeanPooling(Method):
    """Mean pooling over the sentence's tokens, without BOS."""

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the sentence."""
        text = normalize_sentence(sentence)
        return (Rendered(text, (0, len(text))),)


@dataclass(frozen=True)
class LastToken(Method):
    """Last-token pooling of the sentence alone."""

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return the sentence."""
        return (Rendered(normalize_sentence(sentence)),)


_FIRST, _SECOND = "Rewrite the sentence: ", "\nThe rewritten sentence: "


@dataclass(frozen=True)
class Echo(Method):
    """Echo embeddings (arXiv 2402.15449): the sentence twice, mean pooling over its second occurrence."""

    def render(self, sentence: str) -> tuple[Rendered, ...]:
        """Return a request to rewrite the sentence, and the sentence as its answer."""
        text = normalize_sentence(sentence)
        start = len(_FIRST) + len(text) + len(_SECOND)
        return (Rendered(f"{_FIRST}{text}{_SECOND}{text}", (start, start + len(text))),)
