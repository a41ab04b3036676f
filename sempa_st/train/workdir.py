"""The folder of a run in progress: what it was started with, and its checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import sort_checkpoints

from sempa_st.errors import SempaError
from sempa_st.files import check_output_folder, read_json, write_json

_IDENTITY = "identity.json"
_COMPLETE = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


class WorkDir:
    """``<output>.training``, beside the output folder, until the finished folder stands.

    Args:
        output: The output folder of the run.
    """

    def __init__(self, output: str | Path) -> None:
        self.output = Path(output).resolve()
        self.path = self.output.with_name(self.output.name + ".training")
        self.checkpoints = self.path / "checkpoints"

    def open(self, identity: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Start the folder, or check that the one there belongs to the same run.

        Args:
            identity: Everything that decides the result: settings, data fingerprint.
            resume: Go on with the folder that is there.
            overwrite: Throw away what is there.

        Raises:
            SempaError: If there is nothing to resume, the run there is another one, or it is in the way.
        """
        check_output_folder(self.output, overwrite=overwrite)
        if resume:
            self._check_same(identity)
            return
        if self.path.exists():
            if not overwrite:
                raise SempaError(
                    f"An unfinished run stands in {self.path}. Pass --resume to go on with it, or --overwrite to start "
                    "anew."
                )
            shutil.rmtree(self.path)
        check_output_folder(self.path)
        self.checkpoints.mkdir(parents=True)
        write_json(self.path / _IDENTITY, identity)

    def started_with(self) -> dict[str, Any] | None:
        """Return the identity that the run in progress was started with, or None where there is no such run."""
        path = self.path / _IDENTITY
        return read_json(path) if path.is_file() else None

    def _check_same(self, identity: dict[str, Any]) -> None:
        started = self.started_with()
        if started is None:
            raise SempaError(f"There is no unfinished run in {self.path} to resume. Start one without --resume.")
        for name in identity.keys() | started.keys():
            if identity.get(name) != started.get(name):
                raise SempaError(
                    f"The run in {self.path} was started with {name} = {started.get(name)!r}, now it is "
                    f"{identity.get(name)!r}. Resume with the same settings, or start anew with --overwrite."
                )

    def last_checkpoint(self) -> str | None:
        """Return the newest checkpoint that was written to its end, if any."""
        complete = [
            path
            for path in sort_checkpoints(str(self.checkpoints))
            if all((Path(path) / name).is_file() for name in _COMPLETE) and any(Path(path).glob("*.safetensors"))
        ]
        return complete[-1] if complete else None

    def remove(self) -> None:
        """Delete the folder; the finished model has taken its place."""
        shutil.rmtree(self.path)
