"""How a SemPA folder embeds: its template and its longest input, checked against its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.errors import SempaError
from sempa_st.folder import SETTINGS, folder_max_seq_length, template_name
from sempa_st.jinja_bounds import check_embedding_template
from sempa_st.prompts import DEFAULT_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def embedding_settings(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[str, int]:
    """Return the name of a folder's embedding template and the longest input in tokens, checked against each other.

    Args:
        folder: Model folder.
        tokenizer: Its tokenizer.

    Raises:
        SempaError: If there is no such template, it is not fit or cannot be rendered, or leaves no room for a sentence.
    """
    name, length = template_name(folder) or DEFAULT_TEMPLATE, folder_max_seq_length(folder)
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if name not in templates:
        raise SempaError(
            f"{folder / SETTINGS} names the template {name!r:.80}, and the tokenizer has only: "
            f"{', '.join(sorted(templates)) or 'none'}. Restore the folder from where it came."
        )
    check_embedding_template(f"The template {name!r} in {folder}", templates[name], tokenizer.special_tokens_map)
    try:
        rendered: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": ""}], chat_template=name, tokenize=True, return_dict=True
        )
    except Exception as error:  # a template is a program, and may raise anything
        raise SempaError(f"The template {name!r} in {folder} cannot be rendered ({error}). Mend it.") from error
    shortest = len(rendered["input_ids"]) + 1
    if length < shortest:
        raise SempaError(
            f"{folder / SETTINGS}: max_seq_length is {length}, which leaves no room for a sentence. Expected at least "
            f"{shortest}: the template and one token."
        )
    return name, length
