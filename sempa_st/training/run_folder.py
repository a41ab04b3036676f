"""The folder of an unfinished run: its identity, its checkpoints, and a lock against other processes."""

from __future__ import annotations

import os
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.training.checkpoints import (
    UnreadableError,
    checkpoints_in,
    damage_in,
    fault_in,
    is_checkpoint,
    rename_damaged,
    run_identity,
)
from sempa_st.utils.claims import CLAIM, is_claimed
from sempa_st.utils.files import check_output_folder, is_filled, lock_beside, locked, read_json, write_json, write_text
from sempa_st.utils.leftovers import clear_leftovers, delete
from sempa_st.utils.names import resolved

_IDENTITY = "identity.json"
_CHECKPOINTS = "checkpoints"
_MODELS = "models"
_PROCESS = "process.txt"
_MODEL = re.compile(r"samples-[0-9]+|\.samples-[0-9]+\.partial-[0-9a-f]{8}")
"""A kept model, or one that was being written."""
_SCRATCH = re.compile(r"\.(identity\.json|process\.txt|published\.json)\.partial-[0-9a-f]{8}")
_DESKTOP_FILES = (".DS_Store", ".directory")
"""Files that file managers create in folders they display."""


class RunFolder:
    """The folder ``<output>.training`` next to the output folder, which exists until the run is finished.

    With ``--keep-checkpoints`` its subfolder ``models`` stays.

    Args:
        output: Output folder of the run.
    """

    def __init__(self, output: str | Path) -> None:
        self.output = resolved(output)
        self.path = self.output.with_name(self.output.name + ".training")
        self.checkpoints = self.path / _CHECKPOINTS
        self.models = self.path / _MODELS
        self.logs = self.output.with_name(self.output.name + ".logs")
        self._lock = lock_beside(self.path)
        self._stack = ExitStack()

    def check_free(self) -> None:
        """Clear what a finished run has left; raise :class:`SempaError` if another process trains to the output."""
        if self._lock.exists():
            self._take_lock()
            self.close()
        self.clear_finished()

    def open(self, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Lock the folder until :meth:`close`, and create it or check that it belongs to the same run.

        The folder of an interrupted run without a checkpoint is replaced.

        Args:
            identity: Everything that determines the result, such as settings and data fingerprint.
            resume: Resume the run in the folder from its newest complete checkpoint.
            overwrite: Delete an earlier run in the folder.

        Raises:
            SempaError: If there is nothing to resume, the folder holds another run or other files, or another process
                uses it.
        """
        check_output_folder(self.output, overwrite=overwrite)
        if resume and not checkpoints_in(self.checkpoints):
            raise SempaError(
                f"There is no unfinished run with a checkpoint in {self.path} to resume. Start a new run without "
                "--resume."
            )
        self._take_lock()
        try:
            check_output_folder(self.output, overwrite=overwrite)  # another process may have written it meanwhile
            self._check_no_other_files()
            if resume:
                self._check_resumable(identity)
            else:
                self._clear(overwrite=overwrite)
                check_output_folder(self.path, overwrite=True)
                self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.path / _IDENTITY, identity)
            write_text(self.path / _PROCESS, f"{os.getpid()}\n")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unlock the folder."""
        self._stack.close()

    def clear_finished(self) -> None:
        """Remove what is left of a run that was killed after its output was in its place.

        Raises:
            SempaError: If another process uses the folder.
        """
        if not (self.path.is_dir() and is_filled(self.output)):
            return
        self._take_lock()
        try:
            if is_claimed(self.output, self.path):
                self.remove(models=False)
                clear_leftovers(self.output.parent, self.output.name)
        finally:
            self.close()

    def _take_lock(self) -> None:
        path = self.path / _PROCESS
        process = path.read_text(encoding="utf-8").strip() if path.is_file() else "of unknown number"
        in_use = (
            f"{self.output} is being trained by process {process} at this moment. Wait for it, stop it, or choose "
            "another --output."
        )
        self._stack.enter_context(locked(self._lock, in_use, "runs"))
        clear_leftovers(self.models)  # a kept model that was being written when its run was killed

    def _check_no_other_files(self) -> None:
        """Raise :class:`SempaError` if the folder holds files that no run has written."""
        if not self.path.is_dir():
            if self.path.is_symlink() or self.path.exists():
                raise SempaError(
                    f"{self.path}, the folder for the unfinished run, is a file or a broken link. Move it away, or "
                    "choose another --output."
                )
            return
        others = sorted(path for path in self._entries() if not self._is_own(path))
        if others:
            raise SempaError(
                f"{self.path}, the folder for the unfinished run, holds files that are not a run's: "
                f"{others[0].relative_to(self.path)}. Move it away, or choose another --output."
            )

    def _entries(self) -> list[Path]:
        """Return the entries of the folder, of its checkpoint folder and of its folder of kept models."""
        return [
            path
            for folder in (self.checkpoints, self.models, self.path)
            if folder.is_dir()
            for path in folder.iterdir()
        ]

    def _is_own(self, path: Path) -> bool:
        """Whether an entry was certainly written by a run or by a file manager, so that it can be deleted."""
        if path.parent == self.checkpoints and (is_checkpoint(path) or _is_card_of_trainer(path)):
            return True
        if path.parent == self.models and _MODEL.fullmatch(path.name):
            return path.is_dir()
        if path in (self.checkpoints, self.models) or (path.parent == self.path and _SCRATCH.fullmatch(path.name)):
            return path.is_dir()
        own = path.parent == self.path and path.name in (_IDENTITY, _PROCESS, CLAIM)
        expected = own or path.name in _DESKTOP_FILES
        return expected and path.is_file()

    def _clear(self, *, overwrite: bool) -> None:
        """Delete an earlier run; without ``overwrite``, raise :class:`SempaError` if it has checkpoints or models."""
        if checkpoints_in(self.checkpoints) and not overwrite:
            fault = self._fault()
            advice = f"It cannot be resumed: {fault}. Pass" if fault else "Pass --resume to continue it, or"
            raise SempaError(f"There is an unfinished run in {self.path}. {advice} --overwrite to start a new one.")
        if self.models.is_dir() and any(self.models.iterdir()) and not overwrite:
            raise SempaError(
                f"{self.models} holds the models that --keep-checkpoints kept of an earlier run. Move them away, "
                "choose another --output, or pass --overwrite to delete them."
            )
        self.remove()

    def _fault(self) -> str | None:
        """Return why the run in the folder, which has a checkpoint, cannot be resumed; None if it can.

        Raises:
            UnreadableError: If the newest checkpoint cannot be read because of a system error.
        """
        if self.last_checkpoint() is None:
            newest = checkpoints_in(self.checkpoints)[-1]
            return f"none of its checkpoints is complete ({newest.name}: {damage_in(newest)})"
        return None if self.started_with() is not None else f"{_IDENTITY}, which records its settings, is missing"

    def _check_resumable(self, identity: dict[str, Any]) -> None:
        if fault := self._fault():
            raise SempaError(
                f"The run in {self.path} cannot be resumed: {fault}. Pass --overwrite instead of --resume to start it "
                "again."
            )
        started = self.started_with() or {}
        for name in identity.keys() | started.keys():
            if identity.get(name) != started.get(name):
                raise SempaError(
                    f"The run in {self.path} was started with {name} = {started.get(name)!r}, now it is "
                    f"{identity.get(name)!r}. Resume with the same settings, or pass --overwrite to start again."
                )
        for line in rename_damaged(self.checkpoints):
            print(f"{line} Resuming from {Path(str(self.last_checkpoint())).name}.", file=sys.stderr)

    def started_with(self) -> dict[str, Any] | None:
        """Return the identity of the run in the folder, or None if there is no run or its identity is lost."""
        try:
            identity = read_json(self.path / _IDENTITY)
        except SempaError:  # the checkpoints record it, too
            identity = None
        if isinstance(identity, dict):
            return identity
        last = self.last_checkpoint()
        return run_identity(Path(last)) if last else None

    def last_checkpoint(self) -> str | None:
        """Return the newest complete checkpoint, or None."""
        return next((str(path) for path in reversed(checkpoints_in(self.checkpoints)) if not fault_in(path)), None)

    def after_interruption(self) -> str | None:
        """Return a line on how to continue an interrupted run; remove the folder if there is no checkpoint.

        A run whose output is in its place has ended, and only what is left of it is removed.
        """
        if is_claimed(self.output, self.path):
            self.remove(models=False)
            return None
        try:
            checkpoints = checkpoints_in(self.checkpoints)
        except UnreadableError as error:
            return str(error)
        if not checkpoints:
            self.remove(models=not is_filled(self.output))  # a run that has ended may have kept some
            return None
        if self.last_checkpoint() is None:
            newest = checkpoints[-1]
            return f"{self.path} is kept, but none of its checkpoints is complete: {newest.name}: {fault_in(newest)}"
        return f"The checkpoints are kept in {self.path}. Run the same command with --resume to continue."

    def remove(self, *, models: bool = True) -> None:
        """Delete the run's files, after it has finished or if there is nothing to resume from.

        Other files are kept, and so is a link to another disk in place of the folder.

        Args:
            models: Delete the kept models as well.
        """
        for path in sorted(self._entries(), key=lambda path: path.name == CLAIM):  # last what says that it is finished
            if path in (self.checkpoints, self.models) or not self._is_own(path):
                continue
            if path.parent == self.models and not models:
                continue
            delete(path)
        for folder in (self.checkpoints, self.models, self.path):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()


def _is_card_of_trainer(path: Path) -> bool:
    """Whether ``path`` is the model card that TRL writes next to the checkpoints."""
    return path.name == "README.md" and path.is_file() and b"\n- generated_from_trainer\n" in path.read_bytes()
