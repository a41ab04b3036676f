"""Names that mean the same on every machine: what is written down to be shared says nothing of its author's folders."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

_FILE_SUFFIXES = (".csv", ".json", ".jsonl", ".npy", ".parquet", ".safetensors", ".txt", ".yaml", ".yml")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_BETWEEN_NAMES = re.compile(r"([=,]|:(?=[/~]))")


def portable_name(name: str) -> str:
    """Return a name to publish: of a file or folder its last part; a Hub id or a name of ours as it is.

    >>> portable_name("/home/me/runs/first"), portable_name("google/gemma-3-270m"), portable_name("../nli.csv")
    ('first', 'google/gemma-3-270m', 'nli.csv')
    """
    if _WINDOWS.match(name):
        return PureWindowsPath(name).name
    if not name or not _is_local(name):
        return name
    last = Path(name).name
    return last if last.strip(".") else Path(name).expanduser().resolve().name


def _is_local(name: str) -> bool:
    """Whether a name is one of a file or folder, here or, in an older record, on another machine."""
    if name.startswith(("/", "~", "./", "../")) or name in (".", ".."):
        return True
    if _exists(Path(name)):
        return True
    _, slash, rest = name.partition(":")[0].partition("/")  # after a colon, a file of a data set on the Hub
    return bool(slash) and ("/" in rest or rest.endswith(_FILE_SUFFIXES))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long for a file's name, or not one at all
        return False


def portable_command(words: list[str]) -> str:
    """Return a command as one line for a shell, with portable names in place of files and folders.

    Args:
        words: The command and its arguments, such as ``--data=/home/me/nli.csv`` or ``base=/a,/b``.
    """
    return shlex.join(map(_portable_word, words))


def _portable_word(word: str) -> str:
    if _exists(Path(word)):
        return portable_name(word)
    return "".join(map(portable_name, _BETWEEN_NAMES.split(word)))


def portable_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run record with portable names in place of files and folders.

    Args:
        record: Record of a run, of this version or an earlier one. A portable one stays as it is.
    """
    found = dict(record)
    if isinstance(command := found.get("command"), str):
        try:
            found["command"] = portable_command(shlex.split(command))
        except ValueError:  # cut or edited by hand
            del found["command"]
    if isinstance(found.get("base"), str):
        found["base"] = portable_name(found["base"])
    if isinstance(config := found.get("config"), dict):
        found["config"] = {key: portable_name(v) if isinstance(v, str) else v for key, v in config.items()}
    for key in ("data", "dev"):
        part = found.get(key)
        if isinstance(part, dict) and isinstance(part.get("source"), str):
            found[key] = {**part, "source": portable_name(part["source"])}
    if isinstance(averaged := found.get("averaged"), list):
        found["averaged"] = [{**each, "model": portable_name(str(each["model"]))} for each in averaged]
    return found
