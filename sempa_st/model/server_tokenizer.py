r"""Move an embedding template into ``tokenizer.json``, for servers that know nothing of templates.

A tokenizer of the library `tokenizers` normalises a text before it splits it. So the template becomes rules of the
normaliser, in front of the base's own. For PromptEOL:

=====================  ===================================  ==========================
rule                   pattern                              replacement
=====================  ===================================  ==========================
quotes                 ``"``                                ``'``
prefix                 (the beginning)                      ``This sentence : "``
full stop              the end, unless after ``. ? ' "``    ``.``
question mark          ``?`` at the end                     ``.``
suffix                 ``\z`` (the end)                     ``" means in one word:"``
=====================  ===================================  ==========================

Added tokens, such as ``<b>`` of Gemma, are a difficulty: those that are matched before the normaliser cut the text, and
each piece would get a template of its own. So they are matched after it. But then the normaliser is applied to their
own text as well, when the tokenizer is built, and must leave it as it is. So the prefix is taken off again from a text
that is exactly an added token, and the rules after it act behind a prefix only.

Three kinds of text get other tokens than :func:`sempa_st.load` gives them. The empty text is not put under the
template, since no normaliser sees it; nor is one that is exactly the text of an added token. The text of a special
token, such as ``<eos>``, is read as any other text: a user of a server cannot write a special token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError
from sempa_st.model.templates import EmbeddingTemplate
from sempa_st.model.tokenizer import template_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_PROBES = (
    "A cat sleeps",
    'She said "no"?',
    "Ünïcode — 12 °C 😀",
    "it's",
    "?",
    '"',
    "a?\n",
    "one\r\n\n\ttwo  three ",
    " ",
    'This sentence : "x" means in one word:"',
    "...",
)


def tokenizer_with_template(tokenizer: PreTrainedTokenizerBase, template: EmbeddingTemplate) -> Tokenizer:
    """Return a tokenizer that puts every text under a template by itself, and adds what the template starts with.

    Args:
        tokenizer: Fast tokenizer with the template among its chat templates.
        template: The template.

    Raises:
        SempaError: If the tokenizer is a slow one, or the result gives other tokens than the chat template.
    """
    from tokenizers import Tokenizer

    if not tokenizer.is_fast:
        raise SempaError(
            f"The tokenizer {type(tokenizer).__name__} has no tokenizer.json, which servers read. Expected a fast one."
        )
    settings: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    settings["added_tokens"] = _needed_tokens(settings)
    own = [settings["normalizer"]] if settings["normalizer"] else []
    rules = _rules(template, [token["content"] for token in settings["added_tokens"]])
    settings |= {"normalizer": {"type": "Sequence", "normalizers": [*rules, *own]}, "truncation": None, "padding": None}
    moved = Tokenizer.from_str(json.dumps(settings))
    for text in (*_PROBES, *(f"a {token['content']} b" for token in settings["added_tokens"])):
        expected, found = template_ids(tokenizer, template.name, text), moved.encode(text).ids
        if found != expected:
            raise SempaError(
                f"The template cannot be moved into the tokenizer {type(tokenizer).__name__}: the text {text!r} gets "
                f"the tokens {found}, expected {expected}. Use another format."
            )
    return moved


def _needed_tokens(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the added tokens that are not special and not found by the model itself, matched after the normaliser."""
    from tokenizers import Tokenizer

    bare = Tokenizer.from_str(json.dumps({**settings, "added_tokens": [], "post_processor": None}))
    return [
        {**token, "normalized": True}
        for token in settings["added_tokens"]
        if not token["special"] and bare.encode(token["content"]).ids != [token["id"]]
    ]


def _rules(template: EmbeddingTemplate, tokens: list[str]) -> list[dict[str, Any]]:
    """Return the rules of the normaliser that put a text under a template, unless it is exactly one of ``tokens``."""
    behind = rf"\A{re.escape(template.prefix)}"
    whole = rf"{behind}[\s\S]*"  # \K keeps what it matched out of the replacement
    # A text cannot be inserted at \A, as it can at \z: pre-tokenizers would then cut the text at wrong places.
    prefix = [{"type": "Prepend", "prepend": template.prefix}]
    if tokens:
        prefix.append(_rule(rf"{behind}(?={_any_of(tokens)}\z)", ""))
    suffix = _rule(rf"{whole}\K\z", template.suffix)
    if not template.normalize:
        return [*prefix, suffix]
    quotes = {"type": "Replace", "pattern": {"String": '"'}, "content": "'"}
    return [quotes, *prefix, _rule(rf"{whole}[^.?'\"]\K\z", "."), _rule(rf"{whole}\K\?\z", "."), suffix]


def _rule(pattern: str, replacement: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": replacement}


def _any_of(words: Iterable[str]) -> str:
    """Return a regular expression for any of the words, as a tree of their common beginnings: ``a(?:b|c(?:d)?)``."""
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for char in word:
            node = node.setdefault(char, {})
        node[""] = {}  # a word ends here

    def render(node: dict[str, Any]) -> str:
        branches = [re.escape(char) + render(below) for char, below in sorted(node.items()) if char]
        if not branches:
            return ""
        return f"(?:{'|'.join(branches)})" + ("?" if "" in node else "")

    return render(root)
