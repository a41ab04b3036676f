"""The methods by name, with their settings: ``token-prepending:template=pretended-cot:exit=5``."""

from __future__ import annotations

import re
from dataclasses import fields
from itertools import takewhile
from typing import Any

import yaml

from sempa_st.errors import SempaError, check_known
from sempa_st.methods.contrastive_prompting import ContrastivePrompting
from sempa_st.methods.encoders import EncoderMean, PromptBERT
from sempa_st.methods.llm2vec import LLM2Vec
from sempa_st.methods.method import Method
from sempa_st.methods.prompting import Echo, KnowledgeEnhancement, LastToken, MeanPooling, OneWordTemplate, PretendedCoT
from sempa_st.methods.token_prepending import TokenPrepending
from sempa_st.utils.options import convert_option

METHODS: dict[str, type[Method]] = {
    "mean": MeanPooling,
    "last-token": LastToken,
    "prompteol": OneWordTemplate,
    "pretended-cot": PretendedCoT,
    "knowledge-enhancement": KnowledgeEnhancement,
    "echo": Echo,
    "contrastive-prompting": ContrastivePrompting,
    "token-prepending": TokenPrepending,
    "llm2vec": LLM2Vec,
    "bert-avg": EncoderMean,
    "promptbert": PromptBERT,
}
_SETTINGS = re.compile(r"""(?:"(?:\\.|[^"\\])*"|'[^']*'|[^:])+""")
"""The text between colons; a colon inside quotes does not separate."""
_SETTING = re.compile(r"[\w-]+=")


def methods_for(*, encoders: bool) -> list[str]:
    """Return the names of the methods for encoders, or for decoders."""
    return [name for name, method in METHODS.items() if method.for_encoders == encoders]


def parse_method(text: str) -> Method:
    """Parse ``NAME:SETTING=VALUE:...`` into a method.

    >>> parse_method("prompteol:layer=-2")
    OneWordTemplate(layer=-2, template='prompteol')

    Raises:
        SempaError: On an unknown name or setting, or a value of the wrong type.
    """
    name, *settings = _SETTINGS.findall(text) or [text]
    check_known(name, METHODS, "method")
    values: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            known = ", ".join(field.name for field in fields(METHODS[name]))
            raise SempaError(f"The method {text!r} has {setting!r}. Expected SETTING=VALUE, with one of: {known}.")
        # As in a YAML file, where false is not a string.
        try:
            parsed = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise SempaError(
                f"The method {text!r} has a value that cannot be read: {value}. Put text into double quotes."
            ) from error
        field, converted = convert_option(METHODS[name], key, parsed, f"The method {text!r}")
        values[field] = converted
    return METHODS[name](**values)


def split_method(text: str) -> tuple[str | None, str]:
    """Split ``METHOD:MODEL`` into a method with its settings, and a model; the method is None if there is none.

    >>> split_method("prompteol:layer=-2:gemma3-270m")
    ('prompteol:layer=-2', 'gemma3-270m')
    >>> split_method("runs/best")
    (None, 'runs/best')

    Raises:
        SempaError: If there is a method and no model, or the method is wrong.
    """
    name, separator, rest = text.partition(":")
    if name not in METHODS or not separator:
        return None, text
    method = ":".join([name, *takewhile(_SETTING.match, _SETTINGS.findall(rest))])
    model = text[len(method) + 1 :]
    if not model:
        raise SempaError(f"{text!r} names a method and no model. Expected METHOD:MODEL, such as mean:gemma3-270m.")
    parse_method(method)
    return method, model
