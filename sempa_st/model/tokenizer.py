"""Tokenizers: loading and saving them, and installing an embedding template among their chat templates."""

from __future__ import annotations

import json
import string
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sempa_st.checks.inspection import CONFIG, settings_if_any
from sempa_st.checks.library_errors import readable
from sempa_st.checks.tokens import check_growth, fit_tokens
from sempa_st.errors import SempaError
from sempa_st.model.chat_templates import check_chat_templates
from sempa_st.model.templates import EmbeddingTemplate
from sempa_st.model.token_rows import common_prefix
from sempa_st.utils.devices import trim_malloc
from sempa_st.utils.files import read_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_CONFIG = "tokenizer_config.json"


def load_tokenizer(folder: str | Path, rows: int | None = None) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer set up for embedding: left padding, right truncation, a pad token other than EOS.

    Args:
        folder: Folder with the tokenizer.
        rows: Rows of the embedding matrix that it is for; those that the folder's own ``config.json`` names when None.

    Raises:
        SempaError: If it cannot be read or gives tokens beyond the matrix, or a chat template of it is not fit.
    """
    with readable(folder, "tokenizer"):
        tokenizer = _read_tokenizer(Path(folder))
        check_growth(tokenizer)
        tokenizer("A cat.")  # some settings are not looked at before
    trim_malloc()
    check_chat_templates(tokenizer.chat_template, folder, tokenizer.special_tokens_map)
    tokenizer.padding_side = "left"
    tokenizer.truncation_side = "right"
    fit_tokens(tokenizer, rows or embedding_rows(Path(folder)))
    return tokenizer


def embedding_rows(folder: Path) -> int | None:
    """Return the number of rows of the embedding matrix that a folder's ``config.json`` names, if it does."""
    config = settings_if_any(folder, CONFIG) or {}
    rows: int | None = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return rows


def _read_tokenizer(folder: Path) -> Any:
    """Read a folder's tokenizer, from the file as it was saved where that gives the same."""
    from transformers import AutoTokenizer

    from sempa_st.model.patching import tokenizer_as_saved

    config = settings_if_any(folder, _TOKENIZER_CONFIG) or {}
    tokenizer = None
    if config.get("backend") == "tokenizers" and (folder / "tokenizer.json").is_file() and "auto_map" not in config:
        tokenizer = tokenizer_as_saved(folder, str(config.get("tokenizer_class")))
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False) if tokenizer is None else tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a tokenizer, its main file without indentation: half the size, and read in half the time."""
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer.json")
    if path.is_file():
        write_text(path, json.dumps(read_json(path), ensure_ascii=False, separators=(",", ":")))


_ENDINGS = ("It ends.", "Really?", "Stop!", "And so on ...", "and so on...", "(he said)", "70%", "it's me'", "a.b.")
_BEGINNINGS = ("...", "....", "''", "--", "((", "?!", " A", "\n", '""', "«", "“Yes", "2", "ö")
_PROBES = ("", "A cat sleeps", 'She said "no"?', "Ünïcode — 12 °C 😀", "it's")


def install_template(tokenizer: PreTrainedTokenizerBase, template: EmbeddingTemplate) -> None:
    """Add ``template`` to the tokenizer's named chat templates, leaving the base's own one as the default.

    Raises:
        SempaError: If the template and plain tokenisation of its text give different tokens.
    """
    own = tokenizer.chat_template or {}
    named = dict(own) if isinstance(own, dict) else {"default": own}
    expected = [_plain_ids(tokenizer, template.text(sentence)) for sentence in _PROBES]
    has_bos = tokenizer.bos_token_id is not None and expected[0][:1] == [tokenizer.bos_token_id]
    bos = str(tokenizer.bos_token) if has_bos else ""
    # Some SentencePiece tokenizers mark a word's start at the start of the text, but not right after BOS.
    for start in (bos, bos + " "):
        tokenizer.chat_template = {**named, template.name: template.jinja(start=start)}
        rendered = [_template_ids(tokenizer, template.name, sentence) for sentence in _PROBES]
        if rendered == expected:
            return
    tokenizer.chat_template = own or None
    raise SempaError(
        f"The template {template.name!r} gives other tokens through this tokenizer's chat template than as plain text: "
        f"{rendered[0]} against {expected[0]}. This tokenizer ({type(tokenizer).__name__}) is not supported."
    )


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    # An EOS that the tokenizer adds ends a text; the template's last token is where the text goes on.
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def _template_ids(tokenizer: PreTrainedTokenizerBase, name: str, sentence: str) -> list[int]:
    encoded: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": sentence}], chat_template=name, tokenize=True, return_dict=True
    )
    ids: list[int] = encoded["input_ids"]
    return ids


def prefix_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Return the token ids that every sentence under ``template`` begins with, whatever its own first character.

    Args:
        tokenizer: Tokenizer with the template installed.
        template: Name of the template.

    Raises:
        SempaError: If there are none but the start token.
    """
    sentences = [*_PROBES, *string.punctuation, *_BEGINNINGS]
    rows = [_template_ids(tokenizer, template, sentence) for sentence in sentences]
    shared = rows[0][: common_prefix(rows)]
    if not set(shared) - {tokenizer.bos_token_id}:
        raise SempaError(f"Sentences under the template {template!r} do not begin alike with this tokenizer.")
    return shared


def suffix_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Return the token ids that every sentence under ``template`` ends in, whatever its own last character.

    Args:
        tokenizer: Tokenizer with the template installed.
        template: Name of the template.

    Raises:
        SempaError: If there are none.
    """
    sentences = [*_PROBES, *_ENDINGS]
    rows = [_template_ids(tokenizer, template, sentence)[::-1] for sentence in sentences]
    shared = rows[0][: common_prefix(rows)]
    if not shared:
        raise SempaError(f"Sentences under the template {template!r} do not end in the same token with this tokenizer.")
    return shared[::-1]


def check_saved_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Save a tokenizer to an empty folder, load it from there and compare the two under ``template``.

    An adapter folder has no ``config.json`` (with one, the adapter would not be loaded), and with some bases that file
    has a say in which tokenizer class is loaded.

    Raises:
        SempaError: If a sentence gets other tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder)
        reloaded = load_tokenizer(folder)
    for sentence in _PROBES:
        if _template_ids(reloaded, template, sentence) != _template_ids(tokenizer, template, sentence):
            raise SempaError(
                f"The tokenizer {type(tokenizer).__name__} reads {sentence!r} otherwise once it is saved without its "
                f"model and loaded again, as {type(reloaded).__name__}. This base is not supported."
            )


def own_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the base's own chat template (not one that this package added), or None."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return template.get("default")
    return template
