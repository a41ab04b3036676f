"""What a run's folder says of the output that it is about to move to its place: a run that is killed then knows it.

A run has a folder of its own until its output is in its place. Between the two steps that end it, the move and the
removal of that folder, it may be killed. The claim in the folder tells its output from an earlier or a later one.
"""

from __future__ import annotations

import json
from pathlib import Path

from sempa_st.utils.files import write_json

CLAIM = "published.json"


def claim_output(output: Path, folder: Path) -> None:
    """Write into a run's folder which output it has made.

    Args:
        output: The finished file or folder, before it is moved by a rename.
        folder: Folder of the run.
    """
    write_json(folder / CLAIM, _stamp(output))


def is_claimed(output: Path, folder: Path) -> bool:
    """Return whether an output is the one that a run's folder claims."""
    try:
        return bool(json.loads((folder / CLAIM).read_text(encoding="utf-8")) == _stamp(output))
    except (OSError, ValueError):  # there is none, or none that this package has written
        return False


def _stamp(output: Path) -> dict[str, int]:
    """Return what a rename keeps, and what no other file or folder has."""
    status = output.stat()
    return {"inode": status.st_ino, "modified_ns": status.st_mtime_ns}
