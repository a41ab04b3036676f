"""Names and links: those in a model folder must not lead out of it, and those of outputs lead somewhere."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from sempa_st.errors import SempaError

_DRIVE = re.compile(r"[A-Za-z]:")


def is_plain_path(name: str) -> bool:
    """Return whether ``name`` is a path inside a folder: relative, without ``..`` and without backslashes.

    >>> [is_plain_path(name) for name in ("", "1_Pooling", "a/b.json", "../x", "/etc", "a/../../x", "a\\\\b")]
    [True, True, True, False, False, False, False]
    """
    return not (name.startswith("/") or _DRIVE.match(name) or {"\\", "\0"} & set(name) or ".." in name.split("/"))


def inside(folder: Path, name: str) -> Path:
    """Return the path of ``name`` in ``folder``.

    Raises:
        SempaError: If ``name`` leads out of ``folder``.
    """
    if not is_plain_path(name):
        raise SempaError(f"{folder} names the file {name!r:.200}. Expected a name inside the folder.")
    return folder / name


def check_entry(folder: Path, path: Path) -> None:
    """Check that ``path`` is a regular file or a folder, and not a link that leads out of the model folder.

    In the cache of the Hub's client every file is a link to a blob of the same repository; those links are allowed.

    Args:
        folder: Model folder.
        path: Path inside it.

    Raises:
        SempaError: If ``path`` is a link that is broken or leads out of ``folder``, or a pipe, socket or device.
    """
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in _allowed_roots(folder)):
        raise SempaError(
            f"{path} is a link that leads out of its folder, to {target}. Expected a file; if it belongs there, "
            "replace the link with a copy of the file."
        )
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise SempaError(f"{path} cannot be read ({error.strerror}). Restore or download the folder again.") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise SempaError(f"{path} is a pipe, socket or device. Expected a file or folder; remove it.")


def _allowed_roots(folder: Path) -> list[Path]:
    """Return the folders that links in ``folder`` may lead to."""
    root = Path(os.path.realpath(folder))
    repository = root.parent.parent
    in_hub_cache = root.parent.name == "snapshots" and repository.name.startswith("models--")
    return [root, repository / "blobs"] if in_hub_cache else [root]


def resolved(path: str | Path) -> Path:
    """Return a path without links.

    Raises:
        SempaError: If its links lead in a circle, or cannot be read.
    """
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:
        raise SempaError(f"{path} cannot be read: {error}. Expected a path without links to itself.") from error
