"""A model folder as a stranger's: it is looked through once, before anything in it is opened by a library."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.files import read_json
from sempa_st.names import check_entry, inside

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_LARGEST_SETTINGS = 64 << 20
_TEMPLATES = "additional_chat_templates"
_INDEX = ".safetensors.index.json"


def check_folder(folder: Path) -> Path:
    """Return a model folder after a look at its files: links, settings, names of weights and ranks of an adapter.

    Raises:
        SempaError: On what cannot be read, or would lead out of the folder, run code, or fill the memory.
    """
    from sempa_st.schemas import SETTINGS_FILES

    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise SempaError(
            f"The folder {folder} cannot be read: {error.strerror}. Check the path and its owner."
        ) from error
    for path in entries:
        # A folder that nothing reads may be a link to anywhere.
        if not path.is_dir():
            check_entry(folder, path)
    for name in SETTINGS_FILES:
        if (folder / name).exists():
            read_settings(folder, name)
    for name in {_TEMPLATES, *module_paths(folder)} - {""}:
        _check_subfolder(folder, name)
    for path in entries:
        if path.name.endswith(_INDEX):
            _check_index(folder, path.name)
        if path.suffix == ".safetensors":
            _check_weights(folder, path)
    return folder


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

    if path.is_file() and path.stat().st_size > _LARGEST_SETTINGS:
        raise SempaError(
            f"{path} has {path.stat().st_size} bytes. Expected a settings file, of {_LARGEST_SETTINGS} at most."
        )
    content = read_json(path)
    if fault := first_fault(schema, content):
        where, found, expected = fault
        raise SempaError(
            f"{path}: {where or 'its content'} is {reprlib.repr(found)}. Expected {expected}. Mend the file, or "
            "restore it from where it came."
        )
    return content


def module_paths(folder: Path) -> list[str]:
    """Return the subfolders of a folder's modules, as its list of modules has them."""
    path = folder / "modules.json"
    return [module["path"] for module in read_settings(folder, path.name)] if path.is_file() else []


def _check_subfolder(folder: Path, name: str) -> None:
    path = inside(folder, name)
    if not path.exists():
        return
    check_entry(folder, path)
    if not path.is_dir():
        raise SempaError(f"{path} is a file. Expected a folder.")
    files = sorted(path.iterdir())
    for file in files:
        check_entry(folder, file)
    names = {file.name for file in files}
    if "pytorch_model.bin" in names and not any(file.suffix == ".safetensors" for file in files):
        raise SempaError(f"{path} has no .safetensors file. Pickled weights are never loaded; convert them first.")


def _check_index(folder: Path, name: str) -> None:
    files = sorted(set(_read(folder / name, "model.safetensors.index.json")["weight_map"].values()))
    for file in files:
        if not inside(folder, file).is_file():
            raise SempaError(f"{folder / name} names {file}, which is not there. Restore or download the folder again.")


def _check_weights(folder: Path, path: Path) -> None:
    """Check the header of a file of weights, and that an adapter's settings name no higher rank than its tensors have.

    PEFT would take memory for the ranks of the settings before it looked at the tensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            downwards = [name for name in file.keys() if "lora_A" in name or "lora_embedding_A" in name]  # noqa: SIM118
            highest = max((file.get_slice(name).get_shape()[0] for name in downwards), default=None)
    except (SafetensorError, OSError, IndexError) as error:
        raise SempaError(f"{path} is corrupted ({error}). Restore the file from where it came.") from error
    settings = folder / "adapter_config.json"
    if highest is None or path.name != ADAPTER_WEIGHTS or not settings.is_file():
        return
    found = read_settings(folder, settings.name)
    for name, rank in {"r": found.get("r", 8), **(found.get("rank_pattern") or {})}.items():
        if rank > highest:
            raise SempaError(f"{settings}: {name} is {rank}. Expected {highest} at most, the rank in {path.name}.")
