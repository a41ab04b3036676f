"""Checkpoints that are whole: how one is sealed, how it is checked, and which are kept."""

from __future__ import annotations

import functools
import re
import shutil
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from sempa_st.errors import SempaError
from sempa_st.folder.layout import ModelFolder
from sempa_st.training.callbacks import DEV_METRIC
from sempa_st.utils.files import file_sha256, read_json, write_json
from sempa_st.utils.leftovers import write_through

_SEAL = "complete.json"
_STATE = "trainer_state.json"
_WANTED = (_STATE, "optimizer.pt", "scheduler.pt", "rng_state*.pth")
"""What a run cannot be gone on with exactly without; beside the weights."""
_KEPT = 2
_NAME = re.compile(r"checkpoint-[0-9]+")
_ASIDE = "damaged-"


class UnreadableError(SempaError):
    """The system does not let a checkpoint be read, which says nothing on what it holds."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path} cannot be read at this moment: {error.strerror or error}. It may be whole, so nothing was "
            "removed. Check the disk and your right to read there, and run the same command again."
        )


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, the oldest first, whole or not.

    Raises:
        UnreadableError: If the system does not list the folder.
    """
    try:
        found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and not path.is_file()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableError(folder, error) from error
    return sorted(found, key=_step)


def is_checkpoint(path: Path) -> bool:
    """Whether a run has made ``path``: a checkpoint, or one that was set aside."""
    return path.is_dir() and bool(_NAME.fullmatch(path.name.removeprefix(_ASIDE)))


def seal(checkpoint: Path, run: dict[str, Any]) -> None:
    """Write a checkpoint through to the disk, and then the file that says so, with the SHA-256 of each file.

    Args:
        checkpoint: Folder that all processes have written their part of.
        run: What the run was started with, kept in the seal too.
    """
    write_through(checkpoint)
    files = {path.name: _digest(path) for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name != _SEAL}
    write_json(checkpoint / _SEAL, {"run": run, "files": files})


def _digest(path: Path) -> str:
    found = path.stat()
    return _sha256(path, found.st_size, found.st_mtime_ns)


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """Read a file once, as long as its size in bytes and its time in ns stay: optimizer states are large."""
    return file_sha256(path)


def run_of(checkpoint: Path) -> dict[str, Any] | None:
    """Return what the run of a checkpoint was started with, if the checkpoint tells."""
    found = _read_seal(checkpoint)
    return found["run"] if found else None


def _read_seal(checkpoint: Path) -> dict[str, dict[str, Any]] | None:
    try:
        found = read_json(checkpoint / _SEAL)
    except SempaError:  # of an older version, or lost
        return None
    named = isinstance(found, dict) and found.keys() == {"run", "files"}
    return found if named and all(part and isinstance(part, dict) for part in found.values()) else None


def fault_in(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be gone on with, or None if it is whole; see :func:`damage_in`."""
    try:
        return damage_in(checkpoint)
    except UnreadableError as error:
        return str(error)


def damage_in(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is whole: every file is there and as it was written.

    Without a seal, as an older version left it, the files are read for what they are.

    Raises:
        UnreadableError: If the system does not let it be read, so that nobody can know.
    """
    path = checkpoint
    try:
        names = sorted(each.name for each in checkpoint.iterdir())
        for path in (checkpoint / name for name in names):
            if not path.is_dir():
                _digest(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        raise UnreadableError(path, error) from error
    found = _read_seal(checkpoint)
    if found is None:
        return _fault_by_content(checkpoint, names)
    for name, digest in found["files"].items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _digest(checkpoint / name) != digest:
            return f"{name} is not what was written"
    return None


def _fault_by_content(checkpoint: Path, names: list[str]) -> str | None:
    for wanted in _WANTED:
        if not any(fnmatch(name, wanted) for name in names):
            return f"{wanted.replace('*', '')} is missing"
    for name in names:
        try:
            whole = _is_whole(checkpoint / name)
        except (SempaError, SafetensorError, zipfile.BadZipFile, OSError):
            whole = False
        if not whole:
            return f"{name} cannot be read"
    try:
        weights = ModelFolder(checkpoint).weight_files
    except SempaError as error:  # an index that is no index
        return str(error)
    there = [name for name in weights if name in names]
    in_parts = weights[0].endswith(".index.json")
    return None if there == weights or (there and not in_parts) else "weights are missing"


def _is_whole(path: Path) -> bool:
    """Read a file of a checkpoint as what its name says; most faults are errors of its reader."""
    if path.suffix == ".json":
        found = read_json(path)
        return path.name != _STATE or (isinstance(found, dict) and isinstance(found.get("global_step"), int))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # compares the header with the length of the file
            return True
    if path.suffix in (".pt", ".pth"):
        with zipfile.ZipFile(path) as archive:  # with a check sum of each part
            return archive.testzip() is None
    return True


def set_aside_damaged(folder: Path) -> list[str]:
    """Rename the checkpoints in ``folder`` that are not whole, if any other one is; return a line on each of them.

    Raises:
        UnreadableError: If the system does not let one of them be read; all stay as they are then.
    """
    faults = {path: fault for path in checkpoints_in(folder) if (fault := damage_in(path))}
    if len(faults) == len(checkpoints_in(folder)):
        return []
    lines = []
    for path, fault in faults.items():
        aside = path.with_name(_ASIDE + path.name)
        if aside.exists():
            shutil.rmtree(aside)
        path.rename(aside)
        lines.append(f"{path.name} is damaged ({fault}) and is now called {aside.name}.")
    return lines


class Checkpoints(TrainerCallback):
    """Seal each checkpoint, keep the newest and the best, and see that the best is one that is there and whole.

    Older ones go only once the new one is on the disk, so that a power loss at any time leaves a whole one.

    Args:
        run: What the run was started with.
    """

    def __init__(self, run: dict[str, Any]) -> None:
        self._run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for the best checkpoint of a run that is gone on with."""
        _find_best(Path(str(args.output_dir)), state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint once all processes have written their part, and only then remove older ones."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            seal(folder / f"checkpoint-{state.global_step}", self._run)
            write_through(folder)
            rotate_checkpoints(str(folder), _KEPT, state.best_model_checkpoint)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for the best checkpoint of all, which the finished model is made of."""
        _find_best(Path(str(args.output_dir)), state)


def _find_best(folder: Path, state: TrainerState) -> None:
    """Let ``state`` name the best checkpoint in ``folder`` as it is now, or the next best where that one is damaged."""
    if not state.best_global_step:
        return
    recorded = folder / f"checkpoint-{state.best_global_step}"
    if fault_in(recorded) is None:
        state.best_model_checkpoint = str(recorded)
        return
    best = _best_whole(folder, state)
    if state.is_world_process_zero:
        instead = f"{best.name} is the best of those that are whole" if best else "none is whole"
        print(f"The best checkpoint, {recorded.name}, is damaged or gone; {instead}.", file=sys.stderr)
    state.best_model_checkpoint = str(best) if best else None
    state.best_global_step = _step(best) if best else None
    state.best_metric = _scores(state)[_step(best)] if best else None


def _best_whole(folder: Path, state: TrainerState) -> Path | None:
    scores = _scores(state)
    whole = [path for path in checkpoints_in(folder) if _step(path) in scores and fault_in(path) is None]
    return max(whole, key=lambda path: scores[_step(path)], default=None)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _scores(state: TrainerState) -> dict[int, float]:
    return {int(line["step"]): line[DEV_METRIC] for line in state.log_history if DEV_METRIC in line}
