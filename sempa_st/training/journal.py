"""The journal of a sweep: its runs as Optuna trials, one JSON line for each step. Nothing in it is run or unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

from sempa_st.errors import SempaError
from sempa_st.utils.run_info import versions

JOURNAL = "journal.jsonl"
_SOURCES = "sources"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=,-]*")
"""Names of runs become folders, and must not lead out of the sweep's own."""


def open_journal(folder: Path, sources: Mapping[str, str]) -> tuple[JournalStorage, dict[str, str]]:
    """Open the journal of a sweep's folder, and return it with the name of each run by the digest of its settings.

    Records of an earlier call count as results of this one, so that their data must not have changed since.

    Raises:
        SempaError: If the journal is damaged, or one of the ``sources`` has another fingerprint there.
    """
    path = folder / JOURNAL
    try:
        if path.exists():
            _drop_half_line(path)
        path.with_name(path.name + ".lock").unlink(missing_ok=True)  # a killed sweep's; ours keeps others out
        storage = JournalStorage(JournalFileBackend(str(path), JournalFileOpenLock(str(path))))
        studies = [optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)]
        entries = [trial.user_attrs for study in studies for trial in study.trials]
        names = {str(entry["digest"]): str(entry["name"]) for entry in entries}
        earlier = {key: value for study in studies for key, value in study.user_attrs.get(_SOURCES, {}).items()}
        if bad := [name for name in names.values() if not _NAME.fullmatch(name)]:
            raise ValueError(f"{bad[0]!r} is no name of a run")
    except Exception as error:  # Optuna's reader raises whatever it meets
        raise SempaError(
            f"{path}, the journal of the sweep, is damaged ({type(error).__name__}: {error}). Restore it, or choose "
            "another --output."
        ) from error
    for name, value in sources.items():
        if earlier.get(name, value) != value:
            raise SempaError(
                f"The {name} has changed since the sweep in {folder} was started, so that new runs could not be "
                "compared with its earlier ones. Restore it, or choose another --output."
            )
    return storage, names


def _drop_half_line(path: Path) -> None:
    """Cut off a last line that was being written when a sweep was killed: the next one would be joined to it."""
    content = path.read_bytes()
    whole = content.rpartition(b"\n")
    if whole[2]:
        os.truncate(path, len(content) - len(whole[2]))
    for line in whole[0].splitlines():  # of a bad last line Optuna says nothing before there is another one
        json.loads(line)


def open_study(storage: JournalStorage, kind: str, digests: Sequence[str], sources: Mapping[str, str]) -> optuna.Study:
    """Return the study of a grid or search; those over other points in the same journal stay as they are.

    Args:
        storage: The journal.
        kind: ``"grid"`` or ``"search"``.
        digests: Digests of the settings of the points, in any order.
        sources: Fingerprints of the data, to write down.
    """
    points = hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()[:12]
    study = optuna.create_study(
        study_name=f"{kind} {points}", storage=storage, direction="maximize", load_if_exists=True
    )
    study.set_user_attr(_SOURCES, dict(sources))
    study.set_user_attr("versions", {**versions(), "optuna": optuna.__version__})
    return study
