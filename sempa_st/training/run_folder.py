"""The folder of a run in progress: what it was started with, its checkpoints, and the lock that keeps others out."""

from __future__ import annotations

import os
import re
import shutil
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
    run_of,
    set_aside_damaged,
)
from sempa_st.utils.files import check_output_folder, read_json, write_json, write_text
from sempa_st.utils.leftovers import InUseError, held

_IDENTITY = "identity.json"
_CHECKPOINTS = "checkpoints"
_PROCESS = "process.txt"
_SCRATCH = re.compile(r"\.(identity\.json|process\.txt)\.partial-[0-9a-f]{8}")
_OF_DESKTOPS = (".DS_Store", ".directory")
"""Files that a desktop puts into any folder that it shows."""


class RunFolder:
    """``<output>.training``, beside the output folder, until the finished folder stands.

    Args:
        output: The output folder of the run.
    """

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output).resolve()
        self.path = self.output.with_name(self.output.name + ".training")
        self.checkpoints = self.path / _CHECKPOINTS
        self._lock = self.path.with_name(f".{self.path.name}.lock")
        self._held = ExitStack()

    def check_free(self) -> None:
        """Raise :class:`SempaError` if another process is training into the output folder at this moment."""
        if self._lock.exists():
            self._take_lock()
            self.close()

    def open(self, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Take the folder: start it, or check that the one there belongs to the same run. :meth:`close` lets it go.

        What an interrupted run left without a checkpoint is no obstacle: a new run starts in its place.

        Args:
            identity: Everything that decides the result: settings, data fingerprint.
            resume: Go on with the folder that is there, from its newest whole checkpoint.
            overwrite: Throw away what is there.

        Raises:
            SempaError: If there is nothing to resume, the run there is another one, it is in the way, or another
                process is at it.
        """
        check_output_folder(self.output, overwrite=overwrite)
        if resume and not checkpoints_in(self.checkpoints):
            raise SempaError(
                f"There is no unfinished run with a checkpoint in {self.path} to resume. Start it anew, without "
                "--resume."
            )
        self._take_lock()
        try:
            self._check_own()
            if resume:
                self._check_resumable(identity)
            else:
                self._make_room(overwrite=overwrite)
                check_output_folder(self.path, overwrite=True)
                self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_json(self.path / _IDENTITY, identity)
            write_text(self.path / _PROCESS, f"{os.getpid()}\n")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let other processes have the folder."""
        self._held.close()

    def _take_lock(self) -> None:
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._held.enter_context(held(self._lock))
        except InUseError as error:
            raise SempaError(
                f"{self.output} is being trained by process {self._process()} at this moment. Wait for it, stop it, or "
                "choose another --output."
            ) from error
        except OSError as error:
            raise SempaError(
                f"{self._lock} cannot be written, which keeps two runs apart: {error.strerror}. Check the path, its "
                "owner and the free space."
            ) from error

    def _process(self) -> str:
        path = self.path / _PROCESS
        return path.read_text(encoding="utf-8").strip() if path.is_file() else "of unknown number"

    def _check_own(self) -> None:
        """Raise :class:`SempaError` if the folder holds what no run has put there."""
        if not self.path.is_dir():
            if self.path.is_symlink() or self.path.exists():
                raise SempaError(
                    f"{self.path}, where the run is to be kept until it is done, is a file, or a link to no folder. "
                    "Move it away."
                )
            return
        others = sorted(path for path in self._entries() if not self._is_own(path))
        if others:
            raise SempaError(
                f"{self.path}, where the run is to be kept until it is done, holds other things than a run: "
                f"{others[0].relative_to(self.path)}. Move it away, or choose another --output."
            )

    def _entries(self) -> list[Path]:
        """Return what is in the folder and in that of its checkpoints."""
        return [path for folder in (self.checkpoints, self.path) if folder.is_dir() for path in folder.iterdir()]

    def _is_own(self, path: Path) -> bool:
        """Whether ``path``, one of the entries, is a run's beyond doubt, or worth nothing to anyone."""
        if path.parent == self.checkpoints and (is_checkpoint(path) or _is_card_of_trainer(path)):
            return True
        if path == self.checkpoints or (path.parent == self.path and _SCRATCH.fullmatch(path.name)):
            return path.is_dir()
        named = path.name in _OF_DESKTOPS or (path.parent == self.path and path.name in (_IDENTITY, _PROCESS))
        return named and path.is_file()

    def _make_room(self, *, overwrite: bool) -> None:
        """Remove what an earlier run has left, or raise :class:`SempaError` if that may be worth something."""
        if checkpoints_in(self.checkpoints) and not overwrite:
            goes_on = self.last_checkpoint() and self.started_with() is not None
            advice = (
                "Pass --resume to go on with it, or --overwrite to start anew."
                if goes_on
                else f"It cannot be gone on with: {self._fault()}. Pass --overwrite to start anew."
            )
            raise SempaError(f"An unfinished run stands in {self.path}. {advice}")
        self.remove()

    def _fault(self) -> str:
        """Return why the run in the folder cannot be gone on with.

        Raises:
            UnreadableError: If nobody can know, since the system does not let its newest checkpoint be read.
        """
        found = checkpoints_in(self.checkpoints)
        if not found:
            return "it has no checkpoint yet"
        if self.last_checkpoint() is None:
            return f"none of its checkpoints is whole ({found[-1].name}: {damage_in(found[-1])})"
        return f"{_IDENTITY} is lost, and with it what the run was started with"

    def _check_resumable(self, identity: dict[str, Any]) -> None:
        started = self.started_with()
        if started is None or self.last_checkpoint() is None:
            raise SempaError(
                f"The run in {self.path} cannot be resumed: {self._fault()}. Pass --overwrite in place of --resume to "
                "start it anew."
            )
        for name in identity.keys() | started.keys():
            if identity.get(name) != started.get(name):
                raise SempaError(
                    f"The run in {self.path} was started with {name} = {started.get(name)!r}, now it is "
                    f"{identity.get(name)!r}. Resume with the same settings, or start anew with --overwrite."
                )
        for line in set_aside_damaged(self.checkpoints):
            print(f"{line} Going on from {Path(str(self.last_checkpoint())).name}.", file=sys.stderr)

    def started_with(self) -> dict[str, Any] | None:
        """Return the identity that the run in progress was started with, or None where there is none or it is lost."""
        try:
            found = read_json(self.path / _IDENTITY)
        except SempaError:  # its checkpoints know it too
            found = None
        if isinstance(found, dict):
            return found
        last = self.last_checkpoint()
        return run_of(Path(last)) if last else None

    def last_checkpoint(self) -> str | None:
        """Return the newest checkpoint that is whole, if any."""
        return next((str(path) for path in reversed(checkpoints_in(self.checkpoints)) if not fault_in(path)), None)

    def broken_off(self) -> str | None:
        """Return a line on what a run that broke off leaves, or remove its folder if there is no checkpoint at all."""
        try:
            found = checkpoints_in(self.checkpoints)
        except UnreadableError as error:
            return str(error)
        if not found:
            self.remove()
            return None
        if self.last_checkpoint() is None:
            return f"{self.path} is kept, but none of its checkpoints is whole: {found[-1].name}: {fault_in(found[-1])}"
        return f"Checkpoints are kept in {self.path}; the same command with --resume goes on."

    def remove(self) -> None:
        """Delete what is the run's; the finished model has taken its place, or there is nothing to go on from.

        What is somebody else's stays, such as a link to another disk that stands in place of the folder.
        """
        for path in self._entries():
            if path == self.checkpoints or not self._is_own(path):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for folder in (self.checkpoints, self.path):
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()


def _is_card_of_trainer(path: Path) -> bool:
    """Whether ``path`` is the model card that TRL puts beside the checkpoints."""
    return path.name == "README.md" and path.is_file() and b"\n- generated_from_trainer\n" in path.read_bytes()
