"""Lock files, scratch folders that outlive no run, and the atomic move of an output to its place.

A run writes its output in a scratch folder beside the target, and holds a lock in it for as long as it lives::

    .model.partial-0123abcd/            scratch folder of the output "model"
        .sempa.lock                     locked while the run is alive
        model/                          the output until it is complete
    .model.old-0123abcd/                the previous output, for the moment between the two renames

The next run on the same target clears the scratch folders whose lock is free: their runs were killed.
"""

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
_MAX_STEM = 255 - len("." + _PARTIAL) - _DIGITS
"""Longest output name, in bytes, that fits into the name of a scratch folder; file systems allow 255 bytes."""
_HASHED_STEM = re.compile(r"[0-9a-f]{16}~")
_RUST = re.compile(r"\bos error (\d+)\)")
_TORCH = re.compile(r"inline_container\.cc:\d+\].*(unexpected pos|file write failed)")
_UNWRITABLE = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EIO,
    errno.EFBIG, errno.ENOTSUP,
)  # fmt: skip


class InUseError(Exception):
    """The lock is held by another process, or elsewhere in this one."""


@contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock file ``path`` during the block and remove it afterwards.

    The operating system releases the lock when the process ends, even if it is killed.

    Args:
        path: Lock file; it is created.
        wait: Wait until the lock is free instead of raising :class:`InUseError`.

    Raises:
        InUseError: If the lock is already held and ``wait`` is false.
        OSError: If the file cannot be created, or its file system does not support locks.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        # The previous holder removes the file. filelock then locks a new file, not the removed one.
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise InUseError(path) from error
    except NotImplementedError as error:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), str(path)) from error
    try:
        yield
    finally:
        if os.name == "posix":  # on Windows an open file cannot be removed, and filelock removes it on release
            path.unlink(missing_ok=True)
        lock.release()


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a new, locked scratch folder beside ``target``, and remove it when the block ends.

    Leftovers of killed runs on the same target are cleared first; see :func:`clear_leftovers`.
    """
    clear_leftovers(target.parent, target.name)
    with ExitStack() as stack:
        folder = _new_scratch(target, stack)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _stem(name: str) -> str:
    """Return the part of a scratch folder's name that identifies the output: its name, or a hash if it is too long."""
    raw = os.fsencode(name)
    return name if len(raw) <= _MAX_STEM else f"{hashlib.sha256(raw).hexdigest()[:16]}~"


def _new_scratch(target: Path, stack: ExitStack) -> Path:
    while True:
        folder = target.with_name(f".{_stem(target.name)}{_PARTIAL}{uuid.uuid4().hex[:_DIGITS]}")
        folder.mkdir()
        try:
            stack.enter_context(held(folder / _LOCK))
        except (InUseError, FileNotFoundError):
            continue  # another run cleared it as a leftover before it was locked
        except OSError:
            return folder  # the file system has no locks, so no other run can clear it either
        return folder


def clear_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove the leftovers of killed runs from ``folder``.

    The scratch folder of a running process is locked, and is kept. If a run was killed between the two renames of an
    overwrite, the previous output is moved back.

    Args:
        folder: Folder that contains the outputs.
        name: Name of the output whose leftovers are removed; those of all outputs when None.
    """
    start = "." + ("*" if name is None else glob.escape(_stem(name)))
    digits = "[0-9a-f]" * _DIGITS
    for scratch in folder.glob(start + _PARTIAL + digits):
        # A folder that cannot be locked or removed is in use, or belongs to another user.
        with suppress(InUseError, OSError), held(scratch / _LOCK):
            _restore_or_remove(_backup_path(scratch), name)
            shutil.rmtree(scratch, ignore_errors=True)  # its run may have ended just now, and be removing it
    for backup in folder.glob(start + _OLD + digits):
        if not backup.with_name(backup.name.replace(_OLD, _PARTIAL)).exists():
            with suppress(OSError):
                _restore_or_remove(backup, name)


def delete(path: Path) -> None:
    """Delete a file, a folder with all that is in it, or a link itself."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _backup_path(scratch: Path) -> Path:
    """Return where the previous output is kept while the output in ``scratch`` replaces it."""
    return scratch.with_name(f"{scratch.name[: -len(_PARTIAL) - _DIGITS]}{_OLD}{scratch.name[-_DIGITS:]}")


def _restore_or_remove(backup: Path, name: str | None) -> None:
    """Move a previous output back to its place, or remove it if a new output is there."""
    stem = backup.name[1 : -len(_OLD) - _DIGITS]
    if not backup.exists() or (name is None and _HASHED_STEM.fullmatch(stem)):
        return  # a hash does not reveal the name; left for a call that passes it
    target = backup.with_name(name or stem)
    if target.exists():
        shutil.rmtree(backup)
    else:
        backup.rename(target)


def publish(output: Path, target: Path, *, overwrite: bool = True) -> None:
    """Move ``output``, a file or folder in a scratch folder beside ``target``, to ``target`` atomically.

    Everything is flushed to disk first, and gets the permissions that the user's umask asks for, whatever the library
    that wrote it chose. An existing folder at ``target`` is removed only after the new one is in place. Several
    processes may publish folders to one target: the last one stays.

    Args:
        output: File or folder to move.
        target: Where to.
        overwrite: Replace a folder that is not empty.

    Raises:
        FileExistsError: If ``target`` is a folder that is not empty, and ``overwrite`` is false.
    """
    _flush(output, mode=output.parent.stat().st_mode & 0o777)
    if not output.is_dir():
        output.replace(target)
        _sync_folder(target.parent)
        return
    backup = _backup_path(output.parent)
    while True:
        if overwrite and target.is_dir():
            with suppress(FileNotFoundError):  # another process has just moved it away
                target.rename(backup)
        try:
            moved = _moved(output, target)
        except OSError:
            if backup.exists():
                backup.rename(target)
            raise
        if moved:
            break
        if not overwrite:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        shutil.rmtree(backup, ignore_errors=True)  # another process has published in between
    _sync_folder(target.parent)
    if backup.exists():
        shutil.rmtree(backup)


def _moved(folder: Path, target: Path) -> bool:
    """Move a folder; return false if another one that is not empty is in its place."""
    if os.name != "posix" and target.is_dir():  # only POSIX replaces an empty folder
        with suppress(OSError):
            target.rmdir()
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) or (os.name != "posix" and target.is_dir()):
            return False
        raise
    return True


def write_through(folder: Path) -> None:
    """Flush everything in ``folder``, and its entry in the parent folder, to disk."""
    _flush(folder)
    _sync_folder(folder.parent)


def _flush(path: Path, mode: int | None = None) -> None:
    """Flush a file or folder to disk, and set its permissions: ``mode`` for folders, without execution for files."""
    if path.is_symlink():
        return
    if path.is_dir():
        for child in path.iterdir():
            _flush(child, mode)
    _set_mode(path, mode if path.is_dir() or mode is None else mode & 0o666)
    if path.is_dir():
        _sync_folder(path)
    else:
        with path.open("rb" if os.name == "posix" else "r+b") as handle:
            os.fsync(handle.fileno())


def _set_mode(path: Path, mode: int | None) -> None:
    current = path.stat().st_mode
    if mode is not None and current & 0o777 != mode:
        with suppress(PermissionError):  # the file system does not support it
            path.chmod(current & 0o7000 | mode)


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return  # Windows cannot open folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do not support it
            raise
    finally:
        os.close(descriptor)


def unwritable_reason(error: BaseException) -> str | None:
    """Return the reason if ``error`` or one of its causes says that the disk is full or not writable, else None."""
    cause: BaseException | None = error
    while cause is not None:
        number = cause.errno if isinstance(cause, OSError) else None
        if match := _RUST.search(str(cause)):  # of safetensors and tokenizers: the errno is in the message only
            number = int(match[1])
        if number in _UNWRITABLE:
            return os.strerror(number)
        if isinstance(cause, RuntimeError) and _TORCH.search(str(cause)):
            return f"{os.strerror(errno.ENOSPC)}, most likely: PyTorch could not write all of a file"
        cause = cause.__cause__
    return None
