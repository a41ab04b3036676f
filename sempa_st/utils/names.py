"""Names that come out of a folder: plain ones inside it, and files that are files. Standard library only."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from sempa_st.errors import SempaError

_DRIVE = re.compile(r"[A-Za-z]:")


def is_plain_path(name: str) -> bool:
    """Whether a name stays inside the folder that it is taken in: relative, without ``..``, with slashes only.

    >>> [is_plain_path(name) for name in ("", "1_Pooling", "a/b.json", "../x", "/etc", "a/../../x", "a\\\\b")]
    [True, True, True, False, False, False, False]
    """
    return not (name.startswith("/") or _DRIVE.match(name) or {"\\", "\0"} & set(name) or ".." in name.split("/"))


def inside(folder: Path, name: str) -> Path:
    """Return the path of ``name`` in ``folder``.

    Raises:
        SempaError: If the name leads out of it.
    """
    if not is_plain_path(name):
        raise SempaError(f"{folder} names the file {name!r:.200}. Expected a name inside the folder.")
    return folder / name


def check_entry(folder: Path, path: Path) -> None:
    """Check that a file or folder in a model folder is a real one, and that no link leads out of the model folder.

    A file of a repository that the Hub's client cached is a link to the repository's blobs, which lie in its cache.

    Raises:
        SempaError: If it is a link that leads elsewhere or nowhere, or neither a file nor a folder.
    """
    target = Path(os.path.realpath(path))
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise SempaError(
            f"{path} is a link that leads out of its folder, to {target}. Expected a file; put the file itself in the "
            "link's place if it belongs there."
        )
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise SempaError(f"{path} cannot be read ({error.strerror}). Restore or download the folder again.") from error
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise SempaError(f"{path} is neither a file nor a folder but a pipe, socket or device. Remove it.")


def _roots(folder: Path) -> list[Path]:
    root = Path(os.path.realpath(folder))
    repository = root.parent.parent
    cached = root.parent.name == "snapshots" and repository.name.startswith("models--")
    return [root, repository / "blobs"] if cached else [root]
