"""The journal of a sweep: its runs as Optuna trials, in lines of JSON. Nothing in it is executed or unpickled."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

from sempa_st.errors import SempaError
from sempa_st.utils.files import json_digest
from sempa_st.utils.run_info import versions

JOURNAL = "journal.jsonl"
_SOURCES = "sources"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=,-]*")
"""Names of runs are folder names; they must not lead out of the sweep's folder."""


def open_journal(folder: Path, sources: Mapping[str, str]) -> tuple[JournalStorage, dict[str, str]]:
    """Open the journal in a sweep's folder; return it with the name of each run by the digest of its settings.

    Results of earlier calls count as results of this one, so the data must not have changed since.

    Args:
        folder: Folder of the sweep.
        sources: Fingerprints of the data, by a name for the error message.

    Raises:
        SempaError: If the journal is damaged, or records another fingerprint of one of the ``sources``.
    """
    path = folder / JOURNAL
    try:
        if path.exists():
            _drop_incomplete_line(path)
        # Left by a killed sweep, since the lock of the sweep's folder keeps others out.
        path.with_name(path.name + ".lock").unlink(missing_ok=True)
        storage = JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
        studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
        entries = [trial.user_attrs for study in studies for trial in study.trials]
        names = {str(entry["digest"]): str(entry["name"]) for entry in entries}
        earlier = {key: value for study in studies for key, value in study.user_attrs.get(_SOURCES, {}).items()}
        if bad := [name for name in names.values() if not _NAME.fullmatch(name)]:
            raise ValueError(f"{bad[0]!r} is not a valid run name")
    except Exception as error:  # Optuna's reader raises many kinds of errors
        raise SempaError(
            f"{path}, the journal of the sweep, is damaged ({type(error).__name__}: {error}). Restore it, or choose "
            "another --output."
        ) from error
    for name, value in sources.items():
        if earlier.get(name, value) != value:
            raise SempaError(
                f"The {name} has changed since the sweep in {folder} was started, so new runs cannot be compared with "
                "earlier ones. Restore it, or choose another --output."
            )
    return storage, names


def _drop_incomplete_line(path: Path) -> None:
    """Truncate a last line without newline, left by a killed sweep: the next entry would be appended to it."""
    content = path.read_bytes()
    complete, _, incomplete = content.rpartition(b"\n")
    if incomplete:
        os.truncate(path, len(content) - len(incomplete))
    for line in complete.splitlines():  # Optuna reports an invalid last line only after another one is appended
        json.loads(line)


def open_study(storage: JournalStorage, kind: str, digests: Sequence[str], sources: Mapping[str, str]) -> optuna.Study:
    """Return the study of a grid or search. Studies of other points in the same journal are left unchanged.

    Args:
        storage: The journal.
        kind: ``"grid"`` or ``"search"``.
        digests: Digests of the points' settings, in any order.
        sources: Fingerprints of the data, to record.
    """
    points = json_digest(sorted(digests))[:12]
    study = optuna.create_study(
        study_name=f"{kind} {points}", storage=storage, direction="maximize", load_if_exists=True
    )
    study.set_user_attr(_SOURCES, dict(sources))
    study.set_user_attr("versions", {**versions(), "optuna": optuna.__version__})
    return study
