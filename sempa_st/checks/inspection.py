"""A model folder as a stranger's: it is looked through once, before anything in it is opened by a library."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.utils.files import read_json
from sempa_st.utils.hub import model_folder
from sempa_st.utils.names import check_entry, inside

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LARGEST_SETTINGS = 64 << 20
_LARGEST = {".jinja": 1 << 20, ".json": 1 << 29, ".txt": 1 << 29, ".model": 1 << 29}
"""Bytes of a file that a library reads whole, by its ending: a vocabulary's are many times those of the largest."""
_TEMPLATES = "additional_chat_templates"
_MODULES = "modules.json"
_WEIGHTS = "model.safetensors"
_PICKLED = {"pytorch_model.bin": _WEIGHTS, "adapter_model.bin": ADAPTER_WEIGHTS}
"""Pickled weights that a library takes where it does not find the others."""
_HOLDS_MODULES = re.compile(r"(^|\.)(Router|Asym)$")
"""Types of a module that has others in folders of its own."""
_MOST_FOLDERS = 256
_DEEPEST = 8
_FILES = (".json", ".safetensors", ".jinja")
"""Endings of what is looked for as a file, whatever it is."""
_READ = re.compile(
    r"(?!optimizer|training_args)(.*\.(json|safetensors|jinja|model|tiktoken|html)|(vocab|merges)\.txt|NOTICE.*)"
)
"""Names of the files that a reader opens or a copy takes along; what else lies in a folder is nobody's concern."""
_INDEX = ".safetensors.index.json"


def checked_folder(name: str) -> Path:
    """Return the local folder of a model, once :func:`check_folder` has looked through it.

    Args:
        name: A folder, or a Hub repository.
    """
    return check_folder(model_folder(name))


def check_folder(folder: Path) -> Path:
    """Return a model folder after a look at its files: links, settings, names of weights and ranks of an adapter.

    Raises:
        SempaError: On what cannot be read, or would lead out of the folder, run code, or fill the memory.
    """
    from sempa_st.checks.schemas import SETTINGS_FILES

    # Links first: nothing is read through one that leads elsewhere.
    files = [path for path in _read_in(folder, folder) if not path.is_dir() or path.suffix in _FILES]
    for path in files:
        check_entry(folder, path)
    places = _subfolders(folder)
    for place in places:
        inner = _read_in(folder, place)
        for path in inner:
            check_entry(folder, path)
        files += inner
    for place in (folder, *places):
        _check_unpickled(folder, place)
        for name in SETTINGS_FILES:
            if (place / name).exists():
                read_settings(place, name)
    for path in files:
        if path.is_dir() and path.suffix in _FILES:
            raise SempaError(f"{path} is a folder. Expected a file; restore or download the folder again.")
        _check_size(path, _LARGEST.get(path.suffix))
        if path.name.endswith(_INDEX):
            _check_index(path)
        if path.suffix == ".safetensors":
            _check_weights(path)
    return folder


def files_read(folder: Path) -> list[str]:
    """Return the names, inside a model folder, of the files that a reader may open."""
    places = [folder, *_subfolders(folder)]
    paths = [path for place in places for path in _read_in(folder, place) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in paths]


def _subfolders(folder: Path) -> list[Path]:
    """Return the folders inside a model folder that are read too, to the bottom: of its modules and named templates.

    Raises:
        SempaError: If one is a link that leads out of the model folder, or there are too many or too deep ones.
    """
    modules = settings_if_any(folder, _MODULES) or []
    waiting = {inside(folder, name) for name in (_TEMPLATES, *(module["path"] for module in modules))} - {folder}
    if any(module["path"] in ("", ".") and _HOLDS_MODULES.search(module["type"]) for module in modules):
        waiting |= set(_folders(folder, folder))
    found: set[Path] = set()
    while waiting:
        place = waiting.pop()
        if place in found or not place.exists():
            continue
        check_entry(folder, place)
        found.add(place)
        if len(found) > _MOST_FOLDERS or len(place.relative_to(folder).parts) > _DEEPEST:
            raise SempaError(
                f"The modules in {folder} have too many folders, or too deep ones ({place}). Expected at most "
                f"{_MOST_FOLDERS}, and {_DEEPEST} inside each other."
            )
        waiting |= set(_folders(folder, place))
    return sorted(found)


def _read_in(folder: Path, place: Path) -> list[Path]:
    return [path for path in _entries(folder, place) if _READ.fullmatch(path.name)]


def _folders(folder: Path, place: Path) -> list[Path]:
    """Return the folders in a place, hidden ones too: a module may name them."""
    return [path for path in _entries(folder, place, hidden=True) if path.is_dir()]


def _entries(folder: Path, place: Path, *, hidden: bool = False) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if hidden or not path.name.startswith("."))
    except OSError as error:
        raise SempaError(
            f"{place}, in the folder {folder}, cannot be read: {error.strerror}. Expected a folder that you may read."
        ) from error


def read_settings(folder: Path, name: str) -> Any:
    """Return the content of a settings file.

    Args:
        folder: Model folder.
        name: One of :data:`sempa_st.checks.schemas.SETTINGS_FILES`.

    Raises:
        SempaError: If it cannot be read, or departs from its schema; the message says where, what is there and what
            was expected.
    """
    return _read(folder / name, name)


def settings_if_any(folder: Path, name: str) -> Any:
    """Return the content of a settings file as :func:`read_settings` does, or None if it is not there."""
    return read_settings(folder, name) if (folder / name).is_file() else None


def _read(path: Path, schema: str) -> Any:
    from sempa_st.checks.schemas import first_fault

    _check_size(path, _LARGEST_SETTINGS)
    content = read_json(path)
    if fault := first_fault(schema, content):
        where, found, expected = fault
        raise SempaError(
            f"{path}: {where or 'its content'} is {reprlib.repr(found)}. Expected {expected}. Mend the file, or "
            "restore it from where it came."
        )
    return content


def _check_size(path: Path, largest: int | None) -> None:
    if largest is not None and path.is_file() and path.stat().st_size > largest:
        raise SempaError(f"{path} has {path.stat().st_size:,} bytes. Expected {largest:,} at most.")


def _check_unpickled(folder: Path, place: Path) -> None:
    """Check that a library finds safetensors where it would otherwise take pickled weights.

    The modules of sentence-transformers take no weights in parts, so for them an index is none.
    """
    for pickled, safe in _PICKLED.items():
        parts = safe == _WEIGHTS and not (folder / _MODULES).exists() and (place / (_WEIGHTS + ".index.json")).exists()
        if (place / pickled).exists() and not (place / safe).exists() and not parts:
            raise SempaError(
                f"{place / pickled} has no .safetensors file beside it. Pickled weights are never loaded; convert them "
                f"to {safe}, or remove them if they are not needed."
            )


def _check_index(index: Path) -> None:
    for name in sorted(set(_read(index, "model.safetensors.index.json")["weight_map"].values())):
        if not inside(index.parent, name).is_file():
            raise SempaError(f"{index} names {name}, which is not there. Restore or download the folder again.")


def _check_weights(path: Path) -> None:
    """Check the header of a file of weights, and that an adapter's settings name no rank far beyond its tensors'.

    PEFT would take memory for the ranks of the settings before it looked at the tensors. With ranks by layer each one
    may be one of no layer, so they are only kept from being wider than the layers.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            downwards = [name for name in file.keys() if "lora_A" in name or "lora_embedding_A" in name]  # noqa: SIM118
            shapes = [file.get_slice(name).get_shape() for name in downwards]
            highest = max((shape[0] for shape in shapes), default=None)
            widest = max((shape[1] for shape in shapes), default=0)
    except (SafetensorError, OSError, IndexError) as error:
        raise SempaError(f"{path} is corrupted ({error}). Restore the file from where it came.") from error
    settings = path.with_name("adapter_config.json")
    if highest is None or path.name != ADAPTER_WEIGHTS or not settings.is_file():
        return
    found = read_settings(path.parent, settings.name)
    by_layer = found.get("rank_pattern") or {}
    bound, whose = (max(highest, widest), "width of its layers") if by_layer else (highest, "rank")
    for name, rank in {"r": found.get("r", 8), **by_layer}.items():
        if rank > bound:
            raise SempaError(f"{settings}: {name} is {rank}. Expected {bound} at most, the {whose} in {path.name}.")


CONFIG = "config.json"
