"""Digests of model folders, which tell models apart. The digests of large files are kept on disk."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.folder.formats import RUN_RECORD
from sempa_st.utils.files import cache_folder, file_sha256, json_digest, read_json, write_text
from sempa_st.utils.names import is_plain_path

_RECORDS = (RUN_RECORD, "trainer_state.json")
_SUFFIXES = (".json", ".safetensors", ".jinja", ".model")
_VOCABULARIES = ("vocab.txt", "merges.txt")
_TEMPLATES = "additional_chat_templates"
_ORIGINS = ("base_model_name_or_path", "_name_or_path", "name_or_path")
"""Settings that say from which path or repository something was loaded."""
_WITH_ORIGINS = ("config.json", "adapter_config.json", "tokenizer_config.json")
_DIGESTED = re.compile(r"local/.+-([0-9a-f]{12})")
_LARGE = 1 << 22
"""Bytes from which on the digest of a file is kept on disk."""
_SETTLED = 2.0
"""Seconds after a change within which a file may change again without a new modification time."""


def folder_digest(folder: Path, module_folders: Sequence[str]) -> str:
    """Return a SHA-256 (hex) of the whole content of all files that decide a model.

    These are settings, weights, tokenizer and templates. Left out are records, model cards, and settings that say from
    where something was loaded, so that a moved folder keeps its digest. The base of an adapter is not part of its
    folder.

    Args:
        folder: Model folder.
        module_folders: Names of the folders of its sentence-transformers modules.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_files_of_model(folder, module_folders)):
        digest.update(f"{name}:{_content_digest(path)}:".encode())
    return digest.hexdigest()


def _files_of_model(folder: Path, module_folders: Sequence[str]) -> Iterator[tuple[str, Path]]:
    inner = [path for name in (_TEMPLATES, *module_folders) for path in (folder / name).rglob("*")]
    for path in {*folder.iterdir(), *inner, *_indexed(folder)}:
        kept = path.suffix in _SUFFIXES or path.name in _VOCABULARIES
        if kept and path.name not in _RECORDS and path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _indexed(folder: Path) -> Iterator[Path]:
    """Yield the files that an index of weights names, which may lie in subfolders."""
    for path in folder.glob("*.safetensors.index.json"):
        index = read_json(path)
        names = index.get("weight_map") if isinstance(index, dict) else None
        for name in set(names.values()) if isinstance(names, dict) else ():
            if isinstance(name, str) and is_plain_path(name):
                yield folder / name


def _content_digest(path: Path) -> str:
    if path.name in _WITH_ORIGINS:
        # A file that is not JSON is hashed like any other here, and refused where it is read.
        with contextlib.suppress(SempaError):
            content: Any = read_json(path)
            if isinstance(content, dict):
                content = {key: value for key, value in content.items() if key not in _ORIGINS}
            return json_digest(content)
    stat = path.stat()
    # Tools set the modification time back, but never the change time (ctime).
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    changed = max(stat.st_mtime, stat.st_ctime)
    if stat.st_size < _LARGE or not 0 <= changed < time.time() - _SETTLED:
        return file_sha256(path)
    return _remembered(key)


@functools.lru_cache(maxsize=1024)
def _remembered(key: tuple[str | int, ...]) -> str:
    """Return the digest of the file whose path is the first part of ``key``, from the cache on disk if it is there."""
    path = str(key[0])
    entry = cache_folder() / "digests" / f"{hashlib.sha256(path.encode(errors='replace')).hexdigest()[:32]}.json"
    with contextlib.suppress(SempaError, KeyError, TypeError):
        kept = read_json(entry)
        if kept["file"] == list(key):
            return str(kept["sha256"])
    digest = file_sha256(Path(path))
    # Without a writable cache, the next process reads the file again.
    with contextlib.suppress(SempaError, OSError):
        write_text(entry, json.dumps({"file": key, "sha256": digest}))
    return digest


def digest_in(name: str) -> str | None:
    """Return the digest in a model name of :func:`digested_name`, or None if it is not one."""
    match = _DIGESTED.fullmatch(name)
    return match[1] if match else None


def digested_name(name: str, identity: dict[str, Any]) -> str:
    """Return a model name for MTEB, which gives two models of one name the same cached scores.

    Args:
        name: What the user called the model; of a path or Hub id the last part is kept.
        identity: All that decides a vector.
    """
    # Of "." the folder's name is wanted; abspath, unlike resolve, keeps the name of a link.
    shown = os.path.abspath(name) if Path(name).is_dir() else name  # noqa: PTH100
    return f"local/{Path(shown).name}-{json_digest(identity)[:12]}"
