"""Embedding templates, each defined once and rendered both as Python text and as Jinja.

The Jinja form is saved in the model folder as a *named chat template* of the tokenizer, so that plain
``SentenceTransformer(folder)`` embeds the same text as this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sempa_st.errors import check_known

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
    """A prompt around a sentence (PromptEOL); the hidden state of its last token is the embedding.

    Args:
        name: Name of the template among the tokenizer's chat templates.
        prefix: Text before the sentence.
        suffix: Text after the sentence; the embedding is pooled from its last token.
        normalize: Whether to apply :func:`normalize_sentence` to the sentence.
    """

    name: str
    prefix: str
    suffix: str
    normalize: bool = True

    def text(self, sentence: str, prompt: str = "") -> str:
        """Render as plain text without a BOS token; ``prompt`` is inserted directly before the sentence.

        >>> EMBEDDING_TEMPLATES["prompteol"].text("A cat sleeps")
        'This sentence : "A cat sleeps." means in one word:"'
        """
        sentence = prompt + sentence
        return self.prefix + (normalize_sentence(sentence) if self.normalize else sentence) + self.suffix

    def jinja(self, *, start: str = "") -> str:
        """Render as a Jinja chat template for one user message, optionally after a system message.

        sentence-transformers passes the prompt of ``encode(prompt=...)`` as the system message; it is inserted
        directly before the sentence. Other conversations raise an error.

        Args:
            start: Text at the start: the BOS token if the tokenizer adds one to plain text, since
                ``apply_chat_template`` adds no special tokens.
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
        # Jinja's lexer reads all escapes of ``ascii`` back; those of JSON break for characters outside the BMP.
        if self.normalize:
            ends = ", ".join(ascii(end) for end in _SENTENCE_ENDS)
            lines += [
                f"{{%- if s and s[-1] not in [{ends}] -%}}{{%- set s = s + '.' -%}}{{%- endif -%}}",
                f"{{%- set s = s | replace({chr(34)!a}, {chr(39)!a}) -%}}",
                "{%- if s and s[-1] == '?' -%}{%- set s = s[:-1] + '.' -%}{%- endif -%}",
            ]
        lines.append(f"{{{{- {start + self.prefix!a} + s + {self.suffix!a} -}}}}")
        return "\n".join(lines)


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
"""The two templates of the paper and that of Knowledge Enhancement (arXiv 2404.03921), by name."""
DEFAULT_TEMPLATE = "prompteol"


def embedding_template(name: str) -> EmbeddingTemplate:
    """Return an embedding template by name; raises :class:`SempaError` with the known names on an unknown one."""
    return look_up_name(EMBEDDING_TEMPLATES, name, "embedding template")


def look_up_name(table: dict[str, Any], name: str, what: str) -> Any:
    """Return an entry of ``table``; raises :class:`SempaError` with the known names on an unknown one.

    Args:
        table: Entries by name.
        name: Name of the entry.
        what: Kind of entry, for the message.
    """
    check_known(name, table, what)
    return table[name]
