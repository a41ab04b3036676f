"""Atomic writes, checks of output paths, JSON and text helpers, and the cache folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeGuard

from platformdirs import user_cache_path

from sempa_st.errors import SempaError
from sempa_st.utils.leftovers import InUseError, clear_leftovers, held, publish, scratch_folder, unwritable_reason
from sempa_st.utils.names import resolved

UTF8 = "utf-8-sig"
"""Encoding for reading text files: UTF-8, without a leading byte order mark."""


def atomic_file(path: str | Path) -> AbstractContextManager[Path]:
    """Yield a temporary path with the same name, and move it to ``path`` if the block ends without an error.

    Raises:
        SempaError: If the folder cannot be created or written to.
    """
    return _atomic(Path(path), Path.touch, overwrite=True)


def atomic_folder(path: str | Path, *, overwrite: bool = False) -> AbstractContextManager[Path]:
    """Yield an empty temporary folder, and move it to ``path`` if the block ends without an error.

    An existing folder is removed only after the new one is in place.

    Raises:
        SempaError: If ``path`` is not empty and ``overwrite`` is false, be it since another process has filled it
            meanwhile, or if it cannot be written.
    """
    target = resolved(path)  # if path is a link, replace the folder it points to and keep the link
    check_output_folder(target, overwrite=overwrite)
    return _atomic(target, Path.mkdir, overwrite=overwrite)


@contextmanager
def filled_folder(path: str | Path, replaced: Sequence[str]) -> Iterator[Path]:
    """Yield an empty temporary folder, and move its files into ``path`` if the block ends without an error.

    Args:
        path: A new folder, or one whose other files stay.
        replaced: Patterns of files in ``path`` that are removed unless a new file has their name.

    Raises:
        SempaError: If the folder cannot be written.
    """
    target = resolved(path)
    if target.is_file():
        raise SempaError(f"The output {target} is a file. Expected a folder; choose another path.")
    with ExitStack() as stack:
        with os_errors_as_sempa_errors(f"{target} cannot be written"):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(scratch_folder(target)) / target.name
            partial.mkdir()
        yield partial
        with os_errors_as_sempa_errors(f"{target} cannot be written"):
            written = [file.relative_to(partial) for file in partial.rglob("*") if file.is_file()]
            for file in written:
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (partial / file).replace(target / file)
            for old in {file for pattern in replaced for file in target.glob(pattern)}:
                if old.relative_to(target) not in written and not old.is_dir():
                    old.unlink()


@contextmanager
def _atomic(target: Path, create: Callable[[Path], None], *, overwrite: bool) -> Iterator[Path]:
    with ExitStack() as stack:
        with os_errors_as_sempa_errors(f"{target} cannot be written"):
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(scratch_folder(target)) / target.name
            create(partial)
        yield partial
        with os_errors_as_sempa_errors(f"{target} cannot be written"):
            try:
                publish(partial, target, overwrite=overwrite)
            except FileExistsError as error:
                raise SempaError(_not_empty(target)) from error


def lock_beside(path: Path) -> Path:
    """Return the hidden lock file of an output, which stands beside it."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(path: Path, in_use: str, what: str) -> Iterator[None]:
    """Hold the lock file ``path`` during the block; its folder is created.

    Args:
        path: Lock file.
        in_use: Error message if the lock is held already.
        what: What the lock keeps apart, for the other error message.

    Raises:
        SempaError: If the lock is held already, or cannot be written.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(path))
        except InUseError as error:
            raise SempaError(in_use) from error
        except OSError as error:
            raise SempaError(
                f"{path}, the lock that keeps two {what} apart, cannot be written: {error.strerror}. Check the path, "
                "its owner and the free space."
            ) from error
        yield


def build_once(target: Path, mark: str, build: Callable[[Path], None]) -> Path:
    """Return the cached folder ``target``, and build it on first use; other processes wait until it is complete.

    Args:
        target: Folder to return.
        mark: Name of a file that every complete folder contains; a folder without it is rebuilt.
        build: Function that fills the empty folder it is given. The parent of that folder is temporary as well and can
            be used for scratch files.

    Raises:
        SempaError: If the folder does not exist yet and cannot be written.
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
                    build(partial)
    except (SempaError, OSError, SafetensorError) as error:
        reason = unwritable_reason(error)
        if reason is None:
            raise
        raise SempaError(
            f"The cache folder {target.parent} cannot be written, so {target.name} cannot be built: {reason}. Free "
            "some space or fix the permissions, or set SEMPA_CACHE_DIR to a writable folder."
        ) from error
    return target


def check_not_inside(output: str | Path, inputs: Sequence[Path]) -> None:
    """Raise :class:`SempaError` if replacing ``output`` would delete one of the ``inputs`` (files or folders)."""
    target = resolved(output)
    for path in inputs:
        if path.resolve().is_relative_to(target):
            raise SempaError(f"The output {output} contains {path}, which is read from. Choose another output.")


def check_output_file(path: str | Path, suffixes: Sequence[str]) -> None:
    """Raise :class:`SempaError` unless ``path`` has one of the ``suffixes`` and can be written."""
    target = Path(path)
    if target.suffix.lower() not in suffixes:
        raise SempaError(f"The output {target} has an unknown ending. Expected one of: {', '.join(suffixes)}.")
    if target.is_dir():
        raise SempaError(f"The output {target} cannot be written: it is a folder. Expected a file name.")
    _check_parent(target)


def _check_parent(target: Path) -> None:
    parent = resolved(target).parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SempaError(f"The output {target} cannot be written: {parent} is not a folder that may be written to.")


def check_output_folder(path: str | Path, *, overwrite: bool = False) -> None:
    """Raise :class:`SempaError` unless ``path`` can become an output folder: absent, empty, or ``overwrite`` is set.

    Leftovers of killed runs are cleared first. This may move an existing output folder back into place.
    """
    target = Path(path)
    with os_errors_as_sempa_errors(f"{target} cannot be read"):
        clear_leftovers(resolved(target).parent, resolved(target).name)
        is_file = target.is_file()
        filled = is_filled(target)
    if is_file:
        raise SempaError(f"The output {target} is a file. Expected a new or empty folder; choose another path.")
    if filled and not overwrite:
        raise SempaError(_not_empty(target))
    _check_parent(target)


def is_filled(folder: Path) -> bool:
    """Return whether a path is a folder with something in it."""
    try:
        return folder.is_dir() and any(folder.iterdir())
    except FileNotFoundError:  # another process has just moved it away
        return False


def _not_empty(folder: Path) -> str:
    return f"The output folder {folder} is not empty. Choose another, or pass --overwrite to replace it."


@contextmanager
def os_errors_as_sempa_errors(message: str) -> Iterator[None]:
    """Turn an :class:`OSError` of the block into a :class:`SempaError` that starts with ``message``."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise SempaError(f"{message}: {reason}. Check the path, the permissions and the free space.") from error


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` atomically."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON to ``path`` atomically; non-finite numbers become null."""
    write_text(path, json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Return ``value`` with each non-finite number in it replaced by None, since JSON cannot represent them.

    >>> finite({"norms": [1.5, float("inf"), float("nan")]})
    {'norms': [1.5, None, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        SempaError: If it cannot be read or parsed; the message names the file and the position of the error.
    """
    if Path(path).exists() and not Path(path).is_file():
        raise SempaError(f"{path} is a folder, pipe or device. Expected a file.")  # reading a pipe would never end
    try:
        return json.loads(Path(path).read_text(encoding=UTF8))
    except FileNotFoundError as error:
        raise SempaError(f"{path} does not exist.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SempaError(f"{path} cannot be read as JSON: {error}. Restore or download the file again.") from error


def is_text(value: Any) -> TypeGuard[str]:
    """Return whether a value is a string that a tokenizer can encode: not blank, and without lone surrogates.

    JSON can contain a lone surrogate such as ``"\\ud800"``, which is not a character.
    """
    return isinstance(value, str) and bool(value.strip()) and not lone_surrogates(value)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def json_digest(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def lone_surrogates(text: str) -> bool:
    """Return whether a string contains a lone surrogate (half of a UTF-16 pair), which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def cache_folder() -> Path:
    """Return the cache folder of this package: ``SEMPA_CACHE_DIR``, or ``sempa-st`` in the user's cache folder."""
    return Path(os.environ.get("SEMPA_CACHE_DIR") or user_cache_path("sempa-st", appauthor=False))
