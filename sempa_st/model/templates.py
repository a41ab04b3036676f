"""Embedding and paraphrase templates, each defined once and rendered both as Python text and as Jinja.

The Jinja form is what travels inside a model folder (as a *named chat template* of the tokenizer), so that a plain
``SentenceTransformer(folder)`` embeds with the same text as this package does. Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sempa_st.errors import SempaError

_SENTENCE_ENDS = (".", "?", '"', "'")


def normalize_sentence(text: str) -> str:
    """Normalise a sentence as the paper's evaluation does (PromptEOL's rules, in this order).

    A ``.`` is added when the text does not end in one of ``. ? " '``; every ``"`` becomes ``'``; a final ``?``
    becomes ``.``. The empty string stays empty.

    >>> normalize_sentence('Who said "hello"?')
    "Who said 'hello'."
    >>> normalize_sentence("A cat sleeps")
    'A cat sleeps.'
    """
    if text and not text.endswith(_SENTENCE_ENDS):
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


@dataclass(frozen=True)
class EmbeddingTemplate:
    """A text around a sentence, read at its last token (PAPER section "PromptEOL").

    Args:
        name: Key of the template among the tokenizer's named chat templates.
        prefix: Text before the sentence.
        suffix: Text after the sentence; its last token is where the embedding is read.
        normalize: Whether the sentence goes through :func:`normalize_sentence` first.
    """

    name: str
    prefix: str
    suffix: str
    normalize: bool = True

    def text(self, sentence: str, prompt: str = "") -> str:
        """Render as plain text, without a BOS token; ``prompt`` goes right before the sentence, inside the quotes.

        >>> EMBEDDING_TEMPLATES["prompteol"].text("A cat sleeps")
        'This sentence : "A cat sleeps." means in one word:"'
        """
        sentence = prompt + sentence
        return self.prefix + (normalize_sentence(sentence) if self.normalize else sentence) + self.suffix

    def jinja(self, *, start: str = "") -> str:
        """Render as a chat template that takes one user message and, before it, an optional system message.

        The system message is what ``encode(prompt=...)`` of sentence-transformers becomes; it is put right before the
        sentence. Any other shape of conversation is refused.

        Args:
            start: What to write first: the BOS token where the tokenizer starts plain text with it, since
                ``apply_chat_template`` adds no special token by itself.
        """
        lines = [
            "{%- set last = messages[-1] -%}",
            "{%- if last['role'] != 'user' or messages | length > 2 "
            "or (messages | length == 2 and messages[0]['role'] != 'system') -%}",
            f"{{{{- raise_exception('The {self.name} template embeds one user message, "
            "optionally after one system message') -}}",
            "{%- endif -%}",
            "{%- set s = (messages[0]['content'] if messages | length == 2 else '') + last['content'] -%}",
        ]
        if self.normalize:
            ends = ", ".join(_jinja_string(end) for end in _SENTENCE_ENDS)
            lines += [
                f"{{%- if s and s[-1] not in [{ends}] -%}}{{%- set s = s + '.' -%}}{{%- endif -%}}",
                f"{{%- set s = s | replace({_jinja_string(chr(34))}, {_jinja_string(chr(39))}) -%}}",
                "{%- if s and s[-1] == '?' -%}{%- set s = s[:-1] + '.' -%}{%- endif -%}",
            ]
        lines.append(f"{{{{- {_jinja_string(start + self.prefix)} + s + {_jinja_string(self.suffix)} -}}}}")
        return "\n".join(lines)


def _jinja_string(text: str) -> str:
    # ``ascii`` writes every escape that Jinja's lexer reads back, astral characters included (JSON's would break).
    return ascii(text)


EMBEDDING_TEMPLATES: dict[str, EmbeddingTemplate] = {
    template.name: template
    for template in (
        EmbeddingTemplate("prompteol", 'This sentence : "', '" means in one word:"'),
        EmbeddingTemplate("pretended-cot", 'After thinking step by step , this sentence : "', '" means in one word:"'),
        EmbeddingTemplate(
            "knowledge-enhancement",
            "The essence of a sentence is often captured by its main subjects and actions, while descriptive terms "
            'provide additional but less central details. With this in mind , this sentence : "',
            '" means in one word:"',
        ),
    )
}
"""The paper's two templates by name, and that of Knowledge Enhancement (arXiv 2404.03921)."""
DEFAULT_TEMPLATE = "prompteol"


def embedding_template(name: str) -> EmbeddingTemplate:
    """Return the embedding template called ``name``; raises :class:`SempaError` listing the known names."""
    return look_up_name(EMBEDDING_TEMPLATES, name, "embedding template")


def look_up_name(table: dict[str, Any], name: str, what: str) -> Any:
    """Return a template by its name; raises :class:`SempaError` on an unknown one."""
    if name not in table:
        raise SempaError(f"Unknown {what} {name!r}. Expected one of: {', '.join(table)}.")
    return table[name]
