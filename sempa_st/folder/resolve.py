"""Find a model by its name, tell its kind, and find the base of its adapter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sempa_st.checks.inspection import checked_folder
from sempa_st.errors import SempaError
from sempa_st.folder.formats import MODULES, SETTINGS
from sempa_st.folder.layout import ModelFolder
from sempa_st.folder.shipped import shipped_model, shipped_names
from sempa_st.model.base_model import Base, is_encoder, resolve_base
from sempa_st.model.embedded import EMBEDDED_BASES
from sempa_st.model.prompt_eol import DEFAULT_MAX_SEQ_LENGTH
from sempa_st.model.templates import DEFAULT_TEMPLATE, embedding_template
from sempa_st.model.tokenizer import embedding_rows, install_template, load_tokenizer
from sempa_st.utils.files import json_digest
from sempa_st.utils.hub import check_no_revision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["base", "sempa", "sentence-transformers", "encoder", "adapter"]


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Args:
        name: What the user called it.
        folder: Its local folder.
        kind: ``sempa`` (a folder of this package), ``sentence-transformers``, or a bare ``base`` (a decoder),
            ``encoder`` or ``adapter``.
        revision: Branch, tag or commit that was asked for, of a model on the Hub.
    """

    name: str
    folder: ModelFolder
    kind: Kind
    revision: str | None = None

    @property
    def takes_encoder_methods(self) -> bool:
        """Whether the methods for encoders apply to it; otherwise those for decoders do."""
        return self.kind in ("encoder", "sentence-transformers")


def find_model(name: str, *, for_method: bool = False, revision: str | None = None) -> Source:
    """Find a model and tell its kind.

    Args:
        name: An embedded base, a folder, a shipped model or a Hub id. If a name fits several, the first of this list
            is taken.
        for_method: Accept a bare encoder or adapter as well, which can be embedded with by a method only.
        revision: Branch, tag or commit of a model on the Hub; the newest commit when None. The base of an adapter is
            not of this revision.

    Raises:
        SempaError: If the model is not found or is of no known kind, or a revision is given for one of this machine.
    """
    is_shipped = name in shipped_names() and not Path(name).is_dir()
    if name in EMBEDDED_BASES or is_shipped:
        check_no_revision(name, revision)
    if name in EMBEDDED_BASES:
        return _base_source(name)
    folder = ModelFolder(shipped_model(name) if is_shipped else checked_folder(name, revision))
    if folder.format:
        return Source(name, folder, "sempa", revision)
    if folder.modules:
        return Source(name, folder, "sentence-transformers", revision)
    if folder.is_adapter:
        if for_method:
            return Source(name, folder, "adapter", revision)
        raise bare_adapter(name)
    if for_method and is_encoder(folder.path):
        return Source(name, folder, "encoder", revision)
    return _base_source(name, revision)


def _base_source(name: str, revision: str | None = None) -> Source:
    return Source(name, ModelFolder(resolve_base(name, revision).folder), "base", revision)


def bare_adapter(name: str) -> SempaError:
    """Return the error for a bare adapter without a method to embed by."""
    return SempaError(
        f"{name} holds a bare adapter and no {MODULES} with {SETTINGS}, so its template is unknown. Expected a folder "
        "that `sempa train` or `sempa copy` wrote; sempa encode and evaluate read a bare one by a --method."
    )


def describe_method(source: Source, template: str | None = None, method: str | None = None) -> str:
    """Return what the scores of a model are labelled with.

    That is the method, the template of a model that was not trained, ``sempa`` for a trained one, or
    ``sentence-transformers``.
    """
    if method:
        return method
    if source.kind == "base":
        return template or DEFAULT_TEMPLATE
    if source.kind == "sempa" and source.folder.record is None:
        return source.folder.template or DEFAULT_TEMPLATE
    return source.kind


def adapter_base(folder: ModelFolder, base: str | None = None) -> Base:
    """Find the base of an adapter.

    Args:
        folder: Folder of the adapter.
        base: Base to take instead of the one that the adapter names.

    Raises:
        SempaError: If the base is not found; the message says how to name another.
    """
    with _explain_base_of(folder):
        return resolve_base(base or folder.base)


def embedding_tokenizer(
    source: Source, base: Base | None, template: str | None
) -> tuple[PreTrainedTokenizerBase, str, int]:
    """Return a model's tokenizer with its embedding template, that template's name, and the longest input in tokens.

    Args:
        source: A SemPA folder or a base.
        base: Base of its adapter; None for a whole model.
        template: Embedding template of a base (default ``prompteol``); a SemPA folder brings its own.

    Raises:
        SempaError: If the tokenizer or the template cannot be used.
    """
    definition = embedding_template(template or DEFAULT_TEMPLATE)
    tokenizer = load_tokenizer(source.folder.path, embedding_rows(base.folder) if base else None)
    if source.kind != "base":
        return tokenizer, *source.folder.embedding_settings(tokenizer)
    install_template(tokenizer, definition)
    return tokenizer, definition.name, DEFAULT_MAX_SEQ_LENGTH


@contextmanager
def _explain_base_of(folder: ModelFolder) -> Iterator[None]:
    try:
        yield
    except SempaError as error:
        raise SempaError(
            f"The base of the adapter in {folder.path}: {error} To use another copy, pass --base."
        ) from error


def adapters_over_base(folder: ModelFolder, base: str | None = None) -> tuple[list[ModelFolder], Base]:
    """Find all adapters of a stack, from the top down, and the base below them.

    An adapter may have been trained on a base with another adapter merged into it, and then names that one as its base.

    Args:
        folder: Folder of the adapter on top.
        base: Base or adapter to take instead of the one that it names.

    Raises:
        SempaError: If one of them is not found, or an adapter names itself.
    """
    folders = [folder]
    while True:
        name, base = base or folders[-1].base, None
        with _explain_base_of(folders[-1]):
            below = None if name in EMBEDDED_BASES else ModelFolder(checked_folder(name))
            if below is None or not below.is_adapter:
                return folders, resolve_base(name)
        if below in folders:
            raise SempaError(f"The adapter in {below.path} names itself as its base. Name the right one with --base.")
        folders.append(below)


def source_digest(source: Source, base: str | None = None) -> str:
    """Return a SHA-256 (hex) of all folders that a model is made of: its own, and those under its adapters.

    Args:
        source: The model.
        base: Base to take instead of the one that its adapter names.

    Raises:
        SempaError: If a base is not found.
    """
    folders = [source.folder]
    inner = [ModelFolder(source.folder.path / name) for name in source.folder.module_folders]
    for folder in (source.folder, *inner):
        if folder.is_adapter:
            (_, *adapters), below = adapters_over_base(folder, base)
            folders += [*adapters, ModelFolder(below.folder)]
    return json_digest({"folders": [folder.digest for folder in folders]})
