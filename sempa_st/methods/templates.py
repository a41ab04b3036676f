"""One-word templates, read at their last token: PromptEOL, Pretended CoT and Knowledge Enhancement."""

from __future__ import annotations

from dataclasses import dataclass

from sempa_st.methods.method import Method, Rendered
from sempa_st.prompts import embedding_template


@dataclass(frozen=True)
class OneWordTemplate(Method):
    """The last token's state under a template (arXiv 2307.16645; CoT and KE: arXiv 2404.03921)."""

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
    """A template that says what matters in a sentence first; read from the second-to-last layer."""

    template: str = "knowledge-enhancement"

    def default_layer(self, depth: int) -> int:
        """Return -2."""
        return -2
