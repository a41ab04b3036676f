"""Portable names: records and commands without local paths, so that shared files do not reveal the author's folders."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

_FILE_SUFFIXES = (".csv", ".json", ".jsonl", ".npy", ".parquet", ".safetensors", ".txt", ".yaml", ".yml")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
_PLACEHOLDER = "{sentence}"
"""What marks an instruction to paraphrase, which may contain slashes and is no path."""
_SEPARATORS = re.compile(r"([=,]|:(?=[/~]))")


def portable_name(name: str) -> str:
    """Return a name that can be published: the last component of a local path; a Hub id or built-in name unchanged.

    >>> portable_name("/home/me/runs/first"), portable_name("google/gemma-3-270m"), portable_name("../nli.csv")
    ('first', 'google/gemma-3-270m', 'nli.csv')
    """
    if _WINDOWS.match(name):
        return PureWindowsPath(name).name
    if not name or _PLACEHOLDER in name or not _is_local(name):
        return name
    last = Path(name).name
    return last if last.strip(".") else Path(name).expanduser().resolve().name


def _is_local(name: str) -> bool:
    """Return whether a name is a local path, on this machine or on the one that wrote the record."""
    if name.startswith(("/", "~", "./", "../")) or name in (".", ".."):
        return True
    if os.path.exists(name):  # noqa: PTH110 (unlike Path.exists, False for a name that is too long)
        return True
    _, slash, rest = name.partition(":")[0].partition("/")  # a colon separates a Hub dataset from a file in it
    return bool(slash) and ("/" in rest or rest.endswith(_FILE_SUFFIXES))


def portable_command(words: list[str]) -> str:
    """Return a command as one shell line, with portable names in place of local paths.

    Args:
        words: The command and its arguments, such as ``--data=/home/me/nli.csv`` or ``base=/a,/b``.
    """
    return shlex.join(map(_portable_word, words))


def _portable_word(word: str) -> str:
    if _PLACEHOLDER in word or os.path.exists(word):  # noqa: PTH110
        return portable_name(word)
    return "".join(map(portable_name, _SEPARATORS.split(word)))


def portable_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run record with portable names in place of local paths.

    Args:
        record: Record of a run, written by this version or an earlier one. A portable record stays unchanged.
    """
    portable = dict(record)
    if isinstance(command := portable.get("command"), str):
        try:
            portable["command"] = portable_command(shlex.split(command))
        except ValueError:  # truncated, or edited by hand
            del portable["command"]
    if isinstance(portable.get("base"), str):
        portable["base"] = portable_name(portable["base"])
    if isinstance(config := portable.get("config"), dict):
        portable["config"] = {key: portable_name(v) if isinstance(v, str) else v for key, v in config.items()}
    for key in ("data", "dev"):
        data = portable.get(key)
        if isinstance(data, dict) and isinstance(data.get("source"), str):
            portable[key] = {**data, "source": portable_name(data["source"])}
    if isinstance(start := portable.get("started_from"), dict):
        portable["started_from"] = {**start, "model": portable_name(str(start.get("model")))}
    if isinstance(averaged := portable.get("averaged"), list):
        portable["averaged"] = [{**entry, "model": portable_name(str(entry["model"]))} for entry in averaged]
    return portable
