"""The chat format of paraphrase prompts: the base's own chat template, a shipped one, a file, or none."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from sempa_st.errors import SempaError
from sempa_st.model.chat_templates import MAX_TEMPLATE_LENGTH, check_embedding_template
from sempa_st.model.tokenizer import own_chat_template
from sempa_st.utils.assets import asset_path
from sempa_st.utils.files import UTF8

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT_TEMPLATES = ("llama2", "llama3", "chatml")
"""Chat templates of the package, in ``assets/chat_formats``. They begin with BOS if the tokenizer adds one to text."""
CHAT_FORMATS = ("none", *CHAT_TEMPLATES)
"""Chat formats by name, besides ``auto``."""
_BOS = "{{ bos_token }}"


def chat_template(chat_format: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template of a format, or None for plain text.

    Args:
        chat_format: ``auto`` for the base's own template (None if it has none), one of :data:`CHAT_FORMATS`, or the
            path of a file with a Jinja template.
        tokenizer: The base model's tokenizer.

    Raises:
        SempaError: If there is no such format or file, or its template is invalid, cannot be rendered for one sentence,
            or takes too much time or memory.
    """
    if chat_format == "auto":
        return own_chat_template(tokenizer)
    if chat_format == "none":
        return None
    if chat_format in CHAT_TEMPLATES:
        text = asset_path(f"chat_formats/{chat_format}.jinja").read_text(encoding=UTF8)
        return text if _adds_bos(tokenizer) else text.replace(_BOS, "")
    text = _read(chat_format)
    check_embedding_template(f"The chat template in {chat_format}", text, tokenizer.special_tokens_map)
    return text


def chat_template_sha256(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 digest (hex) of a tokenizer's default chat template, or None if it has none."""
    template = own_chat_template(tokenizer)
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def _read(name: str) -> str:
    path = Path(name)
    if not path.is_file():
        raise SempaError(
            f"Unknown chat format {name!r}. Expected auto, {', '.join(CHAT_FORMATS)}, or a file with a Jinja template."
        )
    try:
        with path.open(encoding=UTF8) as file:
            return file.read(MAX_TEMPLATE_LENGTH + 1)  # a longer one is refused by its length
    except (OSError, UnicodeDecodeError) as error:
        raise SempaError(f"The chat template in {name} cannot be read ({error}). Expected a file in UTF-8.") from error


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("A")["input_ids"][:1] == [tokenizer.bos_token_id]
