"""Find any model by its name: a shipped one, a SemPA folder, a bare decoder, encoder or adapter, or any other model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sempa_st.checks.inspection import checked_folder
from sempa_st.errors import SempaError
from sempa_st.folder.digests import combined_digest, folder_digest, module_folders
from sempa_st.folder.layout import (
    MODULES,
    RUN_RECORD,
    SETTINGS,
    base_of_adapter,
    folder_format,
    is_adapter_folder,
    template_name,
)
from sempa_st.folder.shipped import shipped_model, shipped_names
from sempa_st.model.base_model import Base, is_encoder, resolve_base
from sempa_st.model.gemma import EMBEDDED_BASE
from sempa_st.model.templates import DEFAULT_TEMPLATE

Kind = Literal["base", "sempa", "sentence-transformers", "encoder", "adapter"]


@dataclass(frozen=True)
class Source:
    """A model that is at hand.

    Args:
        name: What the user called it.
        folder: Its local folder.
        kind: ``base`` (a bare decoder), ``sempa`` (a folder of this package), ``sentence-transformers``, ``encoder``
            or ``adapter`` (bare ones).
    """

    name: str
    folder: Path
    kind: Kind

    @property
    def takes_encoder_methods(self) -> bool:
        """Whether methods for encoders apply to it, and not those for decoders."""
        return self.kind in ("encoder", "sentence-transformers")


def find_model(name: str, *, for_method: bool = False) -> Source:
    """Find a model by folder, Hub id, or name of the embedded base or of a shipped model, and tell what kind it is.

    A local folder comes before a shipped model and before a Hub repository of the same name.

    Args:
        name: The model.
        for_method: Whether a bare encoder or adapter will do, which only a method can embed with.

    Raises:
        SempaError: If it cannot be found or is none of the kinds.
    """
    if name == EMBEDDED_BASE:
        return Source(name, resolve_base(name).folder, "base")
    is_shipped = name in shipped_names() and not Path(name).is_dir()
    folder = shipped_model(name) if is_shipped else checked_folder(name)
    if folder_format(folder):
        return Source(name, folder, "sempa")
    if (folder / MODULES).is_file():
        return Source(name, folder, "sentence-transformers")
    if is_adapter_folder(folder):
        if for_method:
            return Source(name, folder, "adapter")
        raise bare_adapter(name)
    if for_method and is_encoder(folder):
        return Source(name, folder, "encoder")
    return Source(name, resolve_base(name).folder, "base")


def bare_adapter(name: str) -> SempaError:
    """Return the error for an adapter that is to be embedded with and no method is given."""
    return SempaError(
        f"{name} holds a bare adapter and no {MODULES} with {SETTINGS}, so its template is unknown. Expected a folder "
        "that `sempa train` or `sempa copy` wrote; sempa encode and evaluate read a bare one by a --method."
    )


def describe_method(source: Source, template: str | None = None, method: str | None = None) -> str:
    """Return how a model's vectors come about: a method, a template, ``sempa`` or ``sentence-transformers``."""
    if method:
        return method
    if source.kind == "base":
        return template or DEFAULT_TEMPLATE
    if source.kind == "sempa" and not (source.folder / RUN_RECORD).is_file():
        return template_name(source.folder) or DEFAULT_TEMPLATE
    return source.kind


def adapter_base(folder: Path, base: str | None = None) -> Base:
    """Return the base of an adapter folder, or ``base`` where one is given.

    Raises:
        SempaError: If it is not at hand; the message says how to name another.
    """
    with _named_for(folder):
        return resolve_base(base or base_of_adapter(folder))


@contextmanager
def _named_for(folder: Path) -> Iterator[None]:
    try:
        yield
    except SempaError as error:
        raise SempaError(f"The base of the adapter in {folder}: {error} To use another copy, pass --base.") from error


def adapters_over_base(folder: Path, base: str | None = None) -> tuple[list[Path], Base]:
    """Return the folders of adapters of which each was trained on top of the next one, and the base under them all.

    Args:
        folder: Folder of the outermost adapter.
        base: What it lies on, where that is not what it names.

    Raises:
        SempaError: If one of them is not at hand, or an adapter lies on itself.
    """
    folders = [folder]
    while True:
        name, base = base or base_of_adapter(folders[-1]), None
        with _named_for(folders[-1]):
            below = None if name == EMBEDDED_BASE else checked_folder(name)
            if below is None or not is_adapter_folder(below):
                return folders, resolve_base(name)
        if below in folders:
            raise SempaError(f"The adapter in {below} names itself as its base. Name the right one with --base.")
        folders.append(below)


def source_digest(source: Source, base: str | None = None) -> str:
    """Return a SHA-256 (hex) of all that a model is made of: its folder, and what its adapters lie on.

    Args:
        source: The model.
        base: What its adapter lies on, where that is not what it names.

    Raises:
        SempaError: If its base is not at hand.
    """
    parts = [source.folder]
    for place in (source.folder, *(source.folder / name for name in module_folders(source.folder))):
        if is_adapter_folder(place):
            (_, *adapters), below = adapters_over_base(place, base)
            parts += [*adapters, below.folder]
    return combined_digest({"folders": [folder_digest(part) for part in parts]})
