"""Inspect an untrusted model folder once, before any library opens a file in it."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.utils.files import lone_surrogates, read_json
from sempa_st.utils.hub import model_folder
from sempa_st.utils.names import check_entry, inside

CONFIG = "config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_MAX_SETTINGS_BYTES = 64 << 20
_MAX_DEPTH = 100
"""Maximum depth of lists and objects in settings: libraries copy them by recursion."""
_MAX_BYTES = {".jinja": 1 << 20, ".json": 1 << 29, ".txt": 1 << 29, ".model": 1 << 29}
"""Maximum size by suffix of files that libraries read into memory: many times the largest known vocabulary file."""
_TEMPLATES = "additional_chat_templates"
_MODULES = "modules.json"
_WEIGHTS = "model.safetensors"
_PICKLED = {"pytorch_model.bin": _WEIGHTS, "adapter_model.bin": ADAPTER_WEIGHTS}
"""Pickled weights, each with the safetensors file that libraries prefer to it."""
_CONTAINER_MODULE = re.compile(r"(^|\.)(Router|Asym)$")
"""Types of sentence-transformers modules that keep other modules in subfolders."""
_MAX_FOLDERS = 256
_MAX_FOLDER_DEPTH = 8
_FILE_SUFFIXES = (".json", ".safetensors", ".jinja")
"""Suffixes of names that must be files, not folders."""
_RELEVANT = re.compile(
    r"(?!optimizer|training_args)(.*\.(json|safetensors|jinja|model|tiktoken|html)|(vocab|merges)\.txt)"
)
"""Names of the files that libraries open or that a copy includes; all other files are ignored."""
LICENCE_FILE = re.compile(r"(licen[cs]e|notice|copying|use_policy|gemma_terms)", re.IGNORECASE)
"""Beginning of the names of files that say under which terms a model may be used."""
_INDEX = ".safetensors.index.json"


def checked_folder(name: str, revision: str | None = None) -> Path:
    """Return the local folder of a model after :func:`check_folder`.

    Args:
        name: Local folder or Hub id.
        revision: Branch, tag or commit of the Hub's repository; the newest commit when None.
    """
    return check_folder(model_folder(name, revision=revision))


def check_folder(folder: Path) -> Path:
    """Check the links, settings, weight files and adapter ranks of a model folder, and return the folder.

    Raises:
        SempaError: If a file cannot be read, leads out of the folder, would run code, or would exhaust the memory.
    """
    from sempa_st.checks.schemas import SETTINGS_FILES

    # Links come first, so that nothing is read through a link that leads out of the folder.
    files = [path for path in _relevant_entries(folder, folder) if not path.is_dir() or path.suffix in _FILE_SUFFIXES]
    for path in files:
        check_entry(folder, path)
    subfolders = _subfolders(folder)
    inner = [path for subfolder in subfolders for path in _relevant_entries(folder, subfolder)]
    for path in inner:
        check_entry(folder, path)
    files += inner
    for directory in (folder, *subfolders):
        _check_not_pickled(folder, directory)
        for name in SETTINGS_FILES:
            if (directory / name).exists():
                read_settings(directory, name)
    for path in files:
        if path.is_dir() and path.suffix in _FILE_SUFFIXES:
            raise SempaError(f"{path} is a folder. Expected a file; restore or download the folder again.")
        _check_size(path, _MAX_BYTES.get(path.suffix))
        if path.name.endswith(_INDEX):
            _check_index(path)
        if path.suffix == ".safetensors":
            _check_weights(path)
    return folder


def files_read(folder: Path) -> list[str]:
    """Return the relative paths of the files in a model folder that libraries may open."""
    directories = [folder, *_subfolders(folder)]
    paths = [path for directory in directories for path in _relevant_entries(folder, directory) if path.is_file()]
    return [path.relative_to(folder).as_posix() for path in paths]


def _subfolders(folder: Path) -> list[Path]:
    """Return the subfolders of modules and named templates, and recursively all folders in them.

    Raises:
        SempaError: If one is a link that leads out of the model folder, or there are too many or too deep ones.
    """
    modules = settings_if_any(folder, _MODULES) or []
    pending = {inside(folder, name) for name in (_TEMPLATES, *(module["path"] for module in modules))} - {folder}
    if any(module["path"] in ("", ".") and _CONTAINER_MODULE.search(module["type"]) for module in modules):
        pending |= set(_child_folders(folder, folder))
    visited: set[Path] = set()
    while pending:
        subfolder = pending.pop()
        if subfolder in visited or not subfolder.exists():
            continue
        check_entry(folder, subfolder)
        visited.add(subfolder)
        if len(visited) > _MAX_FOLDERS or len(subfolder.relative_to(folder).parts) > _MAX_FOLDER_DEPTH:
            raise SempaError(
                f"The modules in {folder} have too many folders, or too deep ones ({subfolder}). Expected at most "
                f"{_MAX_FOLDERS} folders, nested at most {_MAX_FOLDER_DEPTH} deep."
            )
        pending |= set(_child_folders(folder, subfolder))
    return sorted(visited)


def _relevant_entries(folder: Path, directory: Path) -> list[Path]:
    entries = _entries(folder, directory)
    return [path for path in entries if _RELEVANT.fullmatch(path.name) or LICENCE_FILE.match(path.name)]


def _child_folders(folder: Path, directory: Path) -> list[Path]:
    """Return the folders in a directory, including hidden ones, since a module can be stored in one."""
    return [path for path in _entries(folder, directory, hidden=True) if path.is_dir()]


def _entries(folder: Path, directory: Path, *, hidden: bool = False) -> list[Path]:
    try:
        return sorted(path for path in directory.iterdir() if hidden or not path.name.startswith("."))
    except OSError as error:
        raise SempaError(
            f"{directory}, in the folder {folder}, cannot be read: {error.strerror}. Expected a readable folder."
        ) from error


def read_settings(folder: Path, name: str) -> Any:
    """Return the content of a settings file.

    Args:
        folder: Model folder.
        name: One of :data:`sempa_st.checks.schemas.SETTINGS_FILES`.

    Raises:
        SempaError: If it cannot be read, or does not match its schema; the message names the key, the value and what
            was expected.
    """
    return _read(folder / name, name)


def settings_if_any(folder: Path, name: str) -> Any:
    """Return the content of a settings file like :func:`read_settings`, or None if the file does not exist."""
    return read_settings(folder, name) if (folder / name).is_file() else None


def _read(path: Path, schema: str) -> Any:
    from sempa_st.checks.schemas import first_mismatch

    _check_size(path, _MAX_SETTINGS_BYTES)
    content = read_json(path)
    if _is_deeper(content, _MAX_DEPTH):
        raise SempaError(f"{path} is nested more than {_MAX_DEPTH} deep. Restore or download the file again.")
    if lone_surrogates(json.dumps(content, ensure_ascii=False)):
        raise SempaError(
            f"{path}: a text in it holds a lone surrogate, which is no character. Restore or download the file again."
        )
    if mismatch := first_mismatch(schema, content):
        key, value, expected = mismatch
        raise SempaError(
            f"{path}: {key or 'its content'} is {reprlib.repr(value)}. Expected {expected}. Fix the file, or restore "
            "or download it again."
        )
    return content


def _is_deeper(content: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than ``limit``."""
    level = [content]
    for _ in range(limit):
        level = [item for each in level if isinstance(each, dict | list) for item in _items(each)]
    return any(isinstance(each, dict | list) for each in level)


def _items(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _check_size(path: Path, limit: int | None) -> None:
    if limit is not None and path.is_file() and path.stat().st_size > limit:
        raise SempaError(f"{path} has {path.stat().st_size:,} bytes. Expected at most {limit:,}.")


def _check_not_pickled(folder: Path, directory: Path) -> None:
    """Refuse pickled weights that a library would load because there is no safetensors file.

    Modules of sentence-transformers do not support sharded weights, so for them an index does not count.
    """
    for pickled, safe in _PICKLED.items():
        sharded = (
            safe == _WEIGHTS and not (folder / _MODULES).exists() and (directory / (_WEIGHTS + ".index.json")).exists()
        )
        if (directory / pickled).exists() and not (directory / safe).exists() and not sharded:
            raise SempaError(
                f"{directory / pickled} has no .safetensors file beside it. Pickled weights are never loaded; convert "
                f"them to {safe}, or remove them if they are not needed."
            )


def _check_index(index: Path) -> None:
    for name in sorted(set(_read(index, "model.safetensors.index.json")["weight_map"].values())):
        if not inside(index.parent, name).is_file():
            raise SempaError(f"{index} names {name}, which does not exist. Restore or download the folder again.")


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Return the shapes of the tensors in a safetensors file, by name."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118


def _check_weights(path: Path) -> None:
    """Check the header of a safetensors file and, for an adapter, the ranks in its settings against its tensors.

    PEFT allocates memory for the ranks in the settings before it reads the tensors. With a ``rank_pattern`` a rank may
    apply to no layer at all, so ranks are then bounded by the width of the layers only.
    """
    from safetensors import SafetensorError

    try:
        shapes = [
            shape for name, shape in tensor_shapes(path).items() if "lora_A" in name or "lora_embedding_A" in name
        ]
        max_rank = max((shape[0] for shape in shapes), default=None)
        max_width = max((shape[1] for shape in shapes), default=0)
    except (SafetensorError, OSError, IndexError) as error:
        raise SempaError(f"{path} is corrupted ({error}). Restore or download the file again.") from error
    config = path.with_name("adapter_config.json")
    if max_rank is None or path.name != ADAPTER_WEIGHTS or not config.is_file():
        return
    settings = read_settings(path.parent, config.name)
    rank_pattern = settings.get("rank_pattern") or {}
    limit, source = (max(max_rank, max_width), "width of its layers") if rank_pattern else (max_rank, "rank")
    for name, rank in {"r": settings.get("r", 8), **rank_pattern}.items():
        if rank > limit:
            raise SempaError(f"{config}: {name} is {rank}. Expected {limit} at most, the {source} in {path.name}.")
