"""Scratch folders that the next run clears if theirs was killed, locks, and outputs that appear whole and on disk."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

_LOCK = ".sempa.lock"
_PARTIAL, _OLD = ".partial-", ".old-"
_DIGITS = 8
_LONGEST = 255 - len("." + _PARTIAL) - _DIGITS
"""Bytes of a name that leave room for the rest of a scratch name; file systems allow 255."""
_STAND_IN = re.compile(r"[0-9a-f]{16}~")
_NO_SPACE_OR_RIGHT = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO,
    errno.EFBIG, errno.ENOTSUP,
)  # fmt: skip


class InUseError(Exception):
    """Another process, or another part of this one, holds the lock."""


@contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` for the time of a block; afterwards the file is gone.

    The system frees the lock of a process that ends, however it ends.

    Raises:
        InUseError: If the lock is held already and ``wait`` is false.
        OSError: If the file cannot be made, or its file system has no locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        # It takes no file that was removed while we waited: whoever held it before us does so.
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise InUseError(path) from error
    except NotImplementedError as error:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(path)) from error
    try:
        yield
    finally:
        if os.name == "posix":  # elsewhere an open file cannot be removed, and the lock does it by itself
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a new hidden folder beside ``target``, marked as in use; it is removed when the block ends.

    What killed runs have left of the same target is cleared first; see :func:`clear_leftovers`.
    """
    clear_leftovers(target.parent, target.name)
    with ExitStack() as stack:
        folder = _new_scratch(target, stack)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _stem(name: str) -> str:
    """Return what scratch names of the output ``name`` are made of: the name, or a stand-in where that is too long."""
    raw = os.fsencode(name)
    return name if len(raw) <= _LONGEST else f"{hashlib.sha256(raw).hexdigest()[:16]}~"


def _new_scratch(target: Path, stack: ExitStack) -> Path:
    while True:
        folder = target.with_name(f".{_stem(target.name)}{_PARTIAL}{uuid.uuid4().hex[:_DIGITS]}")
        folder.mkdir()
        try:
            stack.enter_context(held(folder / _LOCK))
        except (InUseError, FileNotFoundError):
            continue  # another run took it for a leftover before it was locked
        except OSError:
            return folder  # a file system without locks: nobody can clear it then, which is safe
        return folder


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove from ``folder`` what killed runs left of the output ``name`` there, or of any output.

    A scratch folder whose run is alive is locked, and stays. An output that its run had moved away, to put a new one in
    its place, is put back where the new one is missing.
    """
    start = "." + ("*" if name is None else glob.escape(_stem(name)))
    digits = "[0-9a-f]" * _DIGITS
    for scratch in folder.glob(start + _PARTIAL + digits):
        # What cannot be locked or removed is in use, or somebody else's.
        with suppress(InUseError, OSError), held(scratch / _LOCK):
            _settle(_old_of(scratch), name)
            shutil.rmtree(scratch)
    for old in folder.glob(start + _OLD + digits):
        if not old.with_name(old.name.replace(_OLD, _PARTIAL)).exists():
            with suppress(OSError):
                _settle(old, name)


def _old_of(scratch: Path) -> Path:
    return scratch.with_name(f"{scratch.name[: -len(_PARTIAL) - _DIGITS]}{_OLD}{scratch.name[-_DIGITS:]}")


def _settle(old: Path, name: str | None) -> None:
    """Put a folder that was moved away back, or remove it where another one has taken its place."""
    stem = old.name[1 : -len(_OLD) - _DIGITS]
    if not old.exists() or (name is None and _STAND_IN.fullmatch(stem)):
        return  # a stand-in does not tell the name; a command that knows it will do
    target = old.with_name(name or stem)
    if target.exists():
        shutil.rmtree(old)
    else:
        old.rename(target)


def publish(made: Path, target: Path) -> None:
    """Move ``made``, a file or folder in a scratch folder beside ``target``, to ``target``, whole or not at all.

    Its modes become those that the user's umask asks for, whatever the library that wrote it chose, and all of it is
    on the disk before it appears. A folder that stands at ``target`` is removed only once the new one is there.
    """
    _write_through(made, mode=made.parent.stat().st_mode & 0o777)
    if target.is_dir() and made.is_dir():
        old = _old_of(made.parent)
        target.rename(old)
        try:
            made.rename(target)
        except OSError:
            old.rename(target)
            raise
        _sync_folder(target.parent)
        shutil.rmtree(old)
    else:
        made.replace(target)
        _sync_folder(target.parent)


def write_through(folder: Path) -> None:
    """Return once everything in ``folder``, and the folder's own place, is on the disk."""
    _write_through(folder)
    _sync_folder(folder.parent)


def _write_through(path: Path, mode: int | None = None) -> None:
    if path.is_symlink():
        return
    if path.is_dir():
        for child in path.iterdir():
            _write_through(child, mode)
    _set_mode(path, mode if path.is_dir() or mode is None else mode & 0o666)
    if path.is_dir():
        _sync_folder(path)
    else:
        with path.open("rb" if os.name == "posix" else "r+b") as handle:
            os.fsync(handle.fileno())


def _set_mode(path: Path, mode: int | None) -> None:
    now = path.stat().st_mode
    if mode is not None and now & 0o777 != mode:
        with suppress(PermissionError):  # a file system that has no such modes
            path.chmod(now & 0o7000 | mode)


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return  # folders cannot be opened there
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing
            raise
    finally:
        os.close(number)


def unwritable_reason(error: BaseException) -> str | None:
    """Return why a disk did not take what was written, or None if ``error`` and its causes are of another kind."""
    from safetensors import SafetensorError

    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if isinstance(cause, SafetensorError):  # which brings the number as text only
            found = re.search(r"os error (\d+)", str(cause))
            number = int(found[1]) if found else None
        if number in _NO_SPACE_OR_RIGHT:
            return os.strerror(number)
        cause = cause.__cause__
    return None
