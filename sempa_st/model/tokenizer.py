"""Load and save tokenizers, and install an embedding template as a named chat template."""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Sequence
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
from sempa_st.utils.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_CONFIG = "tokenizer_config.json"


def load_tokenizer(folder: str | Path, rows: int | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer for embedding: left padding, right truncation, a pad token other than EOS.

    Args:
        folder: Folder with the tokenizer.
        rows: Number of rows of the model's embedding matrix; taken from the folder's ``config.json`` when None.

    Raises:
        SempaError: If it cannot be read, has token ids outside the matrix, or has an unusable chat template.
    """
    with readable(folder, "tokenizer"):
        tokenizer = _read_tokenizer(Path(folder))
        check_growth(tokenizer)
        tokenizer("A cat.")  # raises on invalid settings that are only read on use
    trim_malloc()
    check_chat_templates(tokenizer.chat_template, folder, tokenizer.special_tokens_map)
    tokenizer.padding_side = "left"
    tokenizer.truncation_side = "right"
    fit_tokens(tokenizer, rows or embedding_rows(Path(folder)))
    return tokenizer


def padding_side(config: Any) -> str:
    """Return the side on which plain readers of a model folder should pad.

    Generation in batches needs padding on the left. Learned positions (GPT-2) count from the left edge in a plain
    forward pass, so that padding there would change the embeddings of plain sentence-transformers.

    Args:
        config: Configuration of the decoder.
    """
    text = config.get_text_config()
    relative = any(getattr(text, name, None) for name in ("rope_parameters", "rotary_dim", "alibi"))
    learned = getattr(text, "max_position_embeddings", None) is not None and not relative
    return "right" if learned else "left"


def embedding_rows(folder: Path) -> int | None:
    """Return the vocabulary size in a folder's ``config.json``, or None if it has none."""
    config = settings_if_any(folder, CONFIG) or {}
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


def _read_tokenizer(folder: Path) -> Any:
    """Read a folder's tokenizer, from the file as it was saved where that gives the same."""
    from transformers import AutoTokenizer

    from sempa_st.model.patching import tokenizer_as_saved

    config = settings_if_any(folder, _TOKENIZER_CONFIG) or {}
    tokenizer = None
    if config.get("backend") == "tokenizers" and (folder / "tokenizer.json").is_file() and "auto_map" not in config:
        tokenizer = tokenizer_as_saved(folder, str(config.get("tokenizer_class")))
    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False) if tokenizer is None else tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path, side: str | None = None) -> None:
    """Save a tokenizer, with ``tokenizer.json`` unindented: half the size, and loaded in half the time.

    Args:
        tokenizer: Tokenizer to save.
        folder: Folder to write to.
        side: Side on which readers of the folder pad; the tokenizer's own when None.
    """
    tokenizer.save_pretrained(folder)
    if side:
        settings = Path(folder, _TOKENIZER_CONFIG)
        write_json(settings, {**read_json(settings), "padding_side": side})
    path = Path(folder, "tokenizer.json")
    if path.is_file():
        write_text(path, json.dumps(read_json(path), ensure_ascii=False, separators=(",", ":")))


_ENDINGS = ("It ends.", "Really?", "Stop!", "And so on ...", "and so on...", "(he said)", "70%", "it's me'", "a.b.")
_BEGINNINGS = ("...", "....", "''", "--", "((", "?!", " A", "\n", '""', "«", "“Yes", "2", "ö")
_PROBES = ("", "A cat sleeps", 'She said "no"?', "Ünïcode — 12 °C 😀", "it's")


def install_template(tokenizer: PreTrainedTokenizerBase, template: EmbeddingTemplate) -> None:
    """Add ``template`` to the tokenizer's named chat templates; the base's own template stays the default.

    Raises:
        SempaError: If the chat template and plain tokenisation of the same text give different tokens.
    """
    own = tokenizer.chat_template or {}
    named = dict(own) if isinstance(own, dict) else {"default": own}
    expected = [_plain_ids(tokenizer, template.text(sentence)) for sentence in _PROBES]
    has_bos = tokenizer.bos_token_id is not None and expected[0][:1] == [tokenizer.bos_token_id]
    bos = str(tokenizer.bos_token) if has_bos else ""
    # Some SentencePiece tokenizers add a word-start marker at the start of a text, but not directly after BOS.
    for start in (bos, bos + " "):
        tokenizer.chat_template = {**named, template.name: template.jinja(start=start)}
        rendered = [template_ids(tokenizer, template.name, sentence) for sentence in _PROBES]
        if rendered == expected:
            return
    tokenizer.chat_template = own or None
    raise SempaError(
        f"The template {template.name!r} gives other tokens through this tokenizer's chat template than as plain text: "
        f"{rendered[0]}, expected {expected[0]}. This tokenizer ({type(tokenizer).__name__}) is not supported."
    )


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    # The embedding is read at the last token of the template, so an EOS that the tokenizer appends is dropped.
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids


def template_ids(tokenizer: PreTrainedTokenizerBase, name: str, sentence: str) -> list[int]:
    """Return the token ids of a sentence under the tokenizer's chat template of a name."""
    encoded: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": sentence}], chat_template=name, tokenize=True, return_dict=True
    )
    return encoded["input_ids"]


def prefix_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Return the token ids that all sentences under ``template`` start with, whatever their first character.

    Args:
        tokenizer: Tokenizer with the template installed.
        template: Name of the template.

    Raises:
        SempaError: If they share no token but BOS.
    """
    prefix = _shared_tokens(tokenizer, template, [*string.punctuation, *_BEGINNINGS], 1)
    if not set(prefix) - {tokenizer.bos_token_id}:
        raise SempaError(f"Sentences under the template {template!r} do not begin alike with this tokenizer.")
    return prefix


def suffix_tokens(tokenizer: PreTrainedTokenizerBase, template: str) -> list[int]:
    """Return the token ids that all sentences under ``template`` end with, whatever their last character.

    Args:
        tokenizer: Tokenizer with the template installed.
        template: Name of the template.

    Raises:
        SempaError: If they share no token.
    """
    suffix = _shared_tokens(tokenizer, template, _ENDINGS, -1)
    if not suffix:
        raise SempaError(f"Sentences under the template {template!r} do not end in the same token with this tokenizer.")
    return suffix


def _shared_tokens(tokenizer: PreTrainedTokenizerBase, template: str, sentences: Sequence[str], step: int) -> list[int]:
    """Return the token ids that :data:`_PROBES` and ``sentences`` begin with, or end with if ``step`` is -1."""
    sequences = [template_ids(tokenizer, template, sentence)[::step] for sentence in (*_PROBES, *sentences)]
    return sequences[0][: common_prefix(sequences)][::step]


def check_saved_tokenizer(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    """Save a tokenizer to an empty folder, load it again and compare their tokens under ``template``.

    An adapter folder must not contain a ``config.json``, or the adapter would not be loaded. For some bases that file
    determines which tokenizer class is loaded.

    Raises:
        SempaError: If a sentence gets different tokens.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, folder)
        reloaded = load_tokenizer(folder)
    for sentence in _PROBES:
        if template_ids(reloaded, template, sentence) != template_ids(tokenizer, template, sentence):
            raise SempaError(
                f"The tokenizer {type(tokenizer).__name__} gives other tokens for {sentence!r} when it is saved "
                f"without its model and loaded again, as {type(reloaded).__name__}. This base is not supported."
            )


def own_chat_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the base's own chat template, not one that this package added, or None."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return template.get("default")
    return template
