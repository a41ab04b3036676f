"""Digests of model folders: all that decides the model is hashed, and large files are read once."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.folder.layout import MODULES, RUN_RECORD
from sempa_st.utils.files import cache_folder, file_sha256, read_json, write_text
from sempa_st.utils.names import is_plain_path

_RECORDS = (RUN_RECORD, "trainer_state.json")
_SUFFIXES = (".json", ".safetensors", ".jinja", ".model")
_VOCABULARIES = ("vocab.txt", "merges.txt")
_TEMPLATES = "additional_chat_templates"
_PLACES = ("base_model_name_or_path", "_name_or_path", "name_or_path")
"""Settings that say where on a machine something came from."""
_WITH_PLACES = ("config.json", "adapter_config.json", "tokenizer_config.json")
_LARGE = 1 << 22
"""Bytes of a file from which on its digest is worth remembering."""
_SETTLED = 2.0
"""Seconds after a change within which a file might change again and keep its time."""


def folder_digest(folder: Path) -> str:
    """Return a SHA-256 (hex) that tells models apart: of settings, weights, tokenizer and templates, whole.

    What does not decide the model is left out: records, cards, and where on this machine something lies. The base of an
    adapter is not part of its folder.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_files_of_model(folder)):
        digest.update(f"{name}:{_content_digest(path)}:".encode())
    return digest.hexdigest()


def _files_of_model(folder: Path) -> Iterator[tuple[str, Path]]:
    inner = [path for part in (_TEMPLATES, *module_folders(folder)) for path in (folder / part).rglob("*")]
    for path in {*folder.iterdir(), *inner, *_indexed(folder)}:
        kept = path.suffix in _SUFFIXES or path.name in _VOCABULARIES
        if kept and path.name not in _RECORDS and path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _indexed(folder: Path) -> Iterator[Path]:
    """Yield the files that an index of weights names, which may lie in a folder within."""
    for path in folder.glob("*.safetensors.index.json"):
        index = read_json(path)
        names = index.get("weight_map") if isinstance(index, dict) else None
        for name in set(names.values()) if isinstance(names, dict) else ():
            if isinstance(name, str) and is_plain_path(name):
                yield folder / name


def module_folders(folder: Path) -> list[str]:
    """Return the folders of a sentence-transformers model's modules, none of them outside and not its own."""
    modules = read_json(folder / MODULES) if (folder / MODULES).is_file() else []
    named = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return [path for path in named if isinstance(path, str) and path.strip("./") and is_plain_path(path)]


def _content_digest(path: Path) -> str:
    if path.name in _WITH_PLACES:
        # A file that is no JSON is refused where it is read; here it is only told from others.
        with contextlib.suppress(SempaError):
            content: Any = read_json(path)
            if isinstance(content, dict):
                content = {key: value for key, value in content.items() if key not in _PLACES}
            return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    stat = path.stat()
    # The time of the last change of any kind cannot be set back, as that of the content can.
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    changed = max(stat.st_mtime, stat.st_ctime)
    if stat.st_size < _LARGE or not 0 <= changed < time.time() - _SETTLED:
        return file_sha256(path)
    return _remembered(key)


@functools.lru_cache(maxsize=1024)
def _remembered(key: tuple[str | int, ...]) -> str:
    """Return the digest of the file that ``key`` names first, kept on disk for other processes."""
    note = cache_folder() / "digests" / f"{hashlib.sha256(str(key[0]).encode(errors='replace')).hexdigest()[:32]}.json"
    with contextlib.suppress(SempaError, KeyError, TypeError):
        held = read_json(note)
        if held["file"] == list(key):
            return str(held["sha256"])
    digest = file_sha256(Path(str(key[0])))
    # A cache that cannot be written costs the next process the reading.
    with contextlib.suppress(SempaError, OSError):
        write_text(note, json.dumps({"file": key, "sha256": digest}))
    return digest


def combined_digest(parts: dict[str, Any]) -> str:
    """Return the SHA-256 (hex) of some JSON values by name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
