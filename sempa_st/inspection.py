"""A model folder as a stranger's: it is looked through once, before anything in it is opened by a library."""

from __future__ import annotations

import re
import reprlib
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.files import read_json
from sempa_st.names import check_entry, inside

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LARGEST_SETTINGS = 64 << 20
_LARGEST = {".jinja": 1 << 20, ".json": 1 << 29, ".txt": 1 << 29, ".model": 1 << 29}
"""Bytes of a file that a library reads whole, by its ending: a vocabulary's are many times those of the largest."""
_TEMPLATES = "additional_chat_templates"
_FILES = (".json", ".safetensors", ".jinja")
"""Endings of what is looked for as a file, whatever it is."""
_READ = re.compile(
    r"(?!optimizer|training_args)(.*\.(json|safetensors|jinja|model|tiktoken|html)|(vocab|merges)\.txt|NOTICE.*)"
)
"""Names of the files that a reader opens or a copy takes along; what else lies in a folder is nobody's concern."""
_INDEX = ".safetensors.index.json"


def check_folder(folder: Path) -> Path:
    """Return a model folder after a look at its files: links, settings, names of weights and ranks of an adapter.

    Raises:
        SempaError: On what cannot be read, or would lead out of the folder, run code, or fill the memory.
    """
    from sempa_st.schemas import SETTINGS_FILES

    # Links first: nothing is read through one that leads elsewhere.
    files = [path for path in _read_in(folder, folder) if not path.is_dir() or path.suffix in _FILES]
    for path in files:
        check_entry(folder, path)
    for place in _subfolders(folder):
        check_entry(folder, place)
        inner = _read_in(folder, place)
        for path in inner:
            check_entry(folder, path)
        _check_unpickled(place, {path.name for path in _entries(folder, place)})
        files += inner
    for name in SETTINGS_FILES:
        if (folder / name).exists():
            read_settings(folder, name)
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
    """Return the folders inside a model folder that are read too: those of its modules and of named templates."""
    path = folder / "modules.json"
    modules = read_settings(folder, path.name) if path.is_file() else []
    names = sorted({_TEMPLATES, *(module["path"] for module in modules)} - {"", "."})
    return [inside(folder, name) for name in names if (folder / name).exists()]


def _read_in(folder: Path, place: Path) -> list[Path]:
    return [path for path in _entries(folder, place) if _READ.fullmatch(path.name)]


def _entries(folder: Path, place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise SempaError(
            f"{place}, in the folder {folder}, cannot be read: {error.strerror}. Expected a folder that you may read."
        ) from error


def read_settings(folder: Path, name: str) -> Any:
    """Return the content of a settings file.

    Args:
        folder: Model folder.
        name: One of :data:`sempa_st.schemas.SETTINGS_FILES`.

    Raises:
        SempaError: If it cannot be read, or departs from its schema; the message says where, what is there and what
            was expected.
    """
    return _read(folder / name, name)


def _read(path: Path, schema: str) -> Any:
    from sempa_st.schemas import first_fault

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


def _check_unpickled(place: Path, names: set[str]) -> None:
    if "pytorch_model.bin" in names and not any(name.endswith(".safetensors") for name in names):
        raise SempaError(f"{place} has no .safetensors file. Pickled weights are never loaded; convert them first.")


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
