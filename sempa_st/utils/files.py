"""Atomic writes, checked reads and row files. Standard library; pyarrow and filelock only where they are needed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from platformdirs import user_cache_path

from sempa_st.errors import SempaError
from sempa_st.utils.leftovers import clear_leftovers, held, publish, scratch_folder, unwritable_reason

UTF8 = "utf-8-sig"
"""How text of others is read: as UTF-8, and a byte order mark at its beginning is no part of it."""


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path of the same name and rename it over ``path`` when the block ends without an error.

    Raises:
        SempaError: If the folder cannot be created or written to.
    """
    target = Path(path)
    with ExitStack() as stack:
        with _explained(f"{target} cannot be written"):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(scratch_folder(target)) / target.name
            partial.touch()
        yield partial
        with _explained(f"{target} cannot be written"):
            publish(partial, target)


@contextmanager
def atomic_folder(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary folder and rename it to ``path`` when the block ends without an error.

    An old folder is only removed after the new one stands in its place.

    Raises:
        SempaError: If ``path`` holds something and ``overwrite`` is false, or if it cannot be written.
    """
    target = Path(path).resolve()  # through a link, the folder that it points to is replaced, and the link stays
    check_output_folder(target, overwrite=overwrite)
    with ExitStack() as stack:
        with _explained(f"{target} cannot be written"):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(scratch_folder(target)) / target.name
            partial.mkdir()
        yield partial
        with _explained(f"{target} cannot be written"):
            publish(partial, target)


def build_once(target: Path, mark: str, make: Callable[[Path], None]) -> Path:
    """Return the cached folder ``target``; on first use one process makes it, whole, and the others wait.

    Args:
        target: Folder to return.
        mark: File that a finished folder holds; a folder without it is replaced.
        make: Fills the empty folder that it is given. The folder around that one is its own too, for scratch files.

    Raises:
        SempaError: If the folder is not there yet and cannot be written.
    """
    if (target / mark).is_file():
        return target
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with held(target.with_name(target.name + ".lock"), wait=True):
            clear_leftovers(target.parent)
            if not (target / mark).is_file():
                with atomic_folder(target, overwrite=True) as partial:
                    make(partial)
    except (SempaError, OSError, SafetensorError) as error:
        fault = unwritable_reason(error)
        if fault is None:
            raise
        raise SempaError(
            f"The cache folder {target.parent} cannot be written, and {target.name} is made there: {fault}. Make room "
            "or give yourself the right to write there, or set SEMPA_CACHE_DIR to a folder that can be written."
        ) from error
    return target


def check_not_inside(output: str | Path, used: Sequence[Path]) -> None:
    """Raise :class:`SempaError` if replacing ``output`` would delete one of the files or folders that are ``used``."""
    target = Path(output).resolve()
    for path in used:
        if path.resolve().is_relative_to(target):
            raise SempaError(f"The output {output} holds {path}, which is read from. Choose another output.")


def check_output_file(path: str | Path, suffixes: Sequence[str]) -> None:
    """Raise :class:`SempaError` unless ``path`` ends in one of ``suffixes`` and can be written."""
    target = Path(path)
    if target.suffix.lower() not in suffixes:
        raise SempaError(f"The output {target} has an unknown ending. Expected one of: {', '.join(suffixes)}.")
    if target.is_dir():
        raise SempaError(f"The output {target} cannot be written: it is a folder. Expected a file name.")
    _check_parent(target)


def _check_parent(target: Path) -> None:
    parent = target.resolve().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SempaError(f"The output {target} cannot be written: {parent} is not a folder that may be written to.")


def sibling(path: Path, word: str) -> Path:
    """Return the path of a hidden neighbour of ``path`` that carries ``word`` in its name."""
    path = path.resolve()
    return path.with_name(f".{path.name}.{word}")


def check_output_folder(path: str | Path, *, overwrite: bool = False) -> None:
    """Raise :class:`SempaError` unless ``path`` can become an output folder: absent, empty, or ``overwrite`` is set.

    What a killed run left of it is cleared first, so that a folder that it had moved away counts as there.
    """
    target = Path(path)
    with _explained(f"{target} cannot be looked into"):
        clear_leftovers(target.resolve().parent, target.resolve().name)
        is_file = target.is_file()
    if is_file:
        raise SempaError(f"The output {target} is a file; expected a folder that does not exist yet. Choose another.")
    with _explained(f"{target} cannot be looked into"):
        holds_something = target.is_dir() and any(target.iterdir())
    if holds_something and not overwrite:
        raise SempaError(
            f"The output folder {target} is not empty. Choose another one, or pass --overwrite to replace it whole."
        )
    _check_parent(target)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SempaError(f"{what}: {error.strerror or error}. Check the path, its owner and the free space.") from error


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path``, whole or not at all."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON to ``path``, whole or not at all; see :func:`finite`."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return ``value`` with None in place of each number in it that is not finite: JSON has no word for them.

    >>> finite({"norms": [1.5, float("inf"), float("nan")]})
    {'norms': [1.5, None, None]}
    """
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """Read a JSON file; raises :class:`SempaError` that names the file and the place of the fault."""
    if Path(path).exists() and not Path(path).is_file():
        raise SempaError(f"{path} is a folder, pipe or device. Expected a file.")  # reading a pipe would never end
    try:
        return json.loads(Path(path).read_text(encoding=UTF8))
    except FileNotFoundError as error:
        raise SempaError(f"{path} does not exist.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SempaError(f"{path} cannot be read as JSON: {error}. Restore the file from where it came.") from error


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is text that a tokenizer can read: a string with more than spaces, and without half characters.

    JSON can hold half of a UTF-16 pair (``"\\ud800"``), which stands for no character.
    """
    return isinstance(value, str) and bool(value.strip()) and not lone_surrogates(value)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def lone_surrogates(text: str) -> bool:
    """Whether a string holds a lone surrogate, half of a character, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def cache_folder() -> Path:
    """Return this package's cache folder: ``SEMPA_CACHE_DIR``, or ``sempa-st`` in the user's cache."""
    return Path(os.environ.get("SEMPA_CACHE_DIR") or user_cache_path("sempa-st", appauthor=False))
