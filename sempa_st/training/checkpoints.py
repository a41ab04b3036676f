"""Checkpoints: seal one with checksums, verify it, and choose which to keep."""

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
_REQUIRED = (_STATE, "optimizer.pt", "scheduler.pt", "rng_state*.pth")
"""Files that are needed besides the weights to resume a run exactly."""
_NUM_KEPT = 2
_NAME = re.compile(r"checkpoint-[0-9]+")
_DAMAGED = "damaged-"
"""Prefix of the folder name of a checkpoint that was found damaged."""


class UnreadableError(SempaError):
    """A checkpoint cannot be read because of a system error, so nobody knows whether it is complete."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path} cannot be read at this moment: {error.strerror or error}. It may be complete, so nothing was "
            "removed. Check the disk and your read permission, then run the same command again."
        )


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in ``folder``, complete or not, the oldest first.

    Raises:
        UnreadableError: If the folder cannot be listed.
    """
    try:
        checkpoints = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and not path.is_file()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableError(folder, error) from error
    return sorted(checkpoints, key=_step)


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a checkpoint, or one renamed by :func:`rename_damaged`."""
    return path.is_dir() and bool(_NAME.fullmatch(path.name.removeprefix(_DAMAGED)))


def seal(checkpoint: Path, run: dict[str, Any]) -> None:
    """Sync a checkpoint to the disk, then write its seal, a file with the SHA-256 digest of each of its files.

    Args:
        checkpoint: Checkpoint that all processes have finished writing.
        run: Identity of the run, stored in the seal.
    """
    write_through(checkpoint)
    files = {path.name: _digest(path) for path in sorted(checkpoint.iterdir()) if path.is_file() and path.name != _SEAL}
    write_json(checkpoint / _SEAL, {"run": run, "files": files})


def _digest(path: Path) -> str:
    stat = path.stat()
    return _sha256(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """Return a file's digest, cached while its size (bytes) and modification time (ns) stay: files can be large."""
    return file_sha256(path)


def run_identity(checkpoint: Path) -> dict[str, Any] | None:
    """Return the identity of the run that wrote a checkpoint, or None if it has no seal."""
    contents = _read_seal(checkpoint)
    return contents["run"] if contents else None


def _read_seal(checkpoint: Path) -> dict[str, dict[str, Any]] | None:
    try:
        contents = read_json(checkpoint / _SEAL)
    except SempaError:  # lost, or written by an older version
        return None
    valid = isinstance(contents, dict) and contents.keys() == {"run", "files"}
    return contents if valid and all(value and isinstance(value, dict) for value in contents.values()) else None


def fault_in(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be used, or None if it is complete: :func:`damage_in` that does not raise."""
    try:
        return damage_in(checkpoint)
    except UnreadableError as error:
        return str(error)


def damage_in(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is complete: all files exist and match the seal.

    Checkpoints of older versions have no seal; their files are checked by format.

    Raises:
        UnreadableError: If a system error prevents the check.
    """
    path = checkpoint
    try:
        names = sorted(file.name for file in checkpoint.iterdir())
        for path in (checkpoint / name for name in names):
            if not path.is_dir():
                _digest(path)
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        raise UnreadableError(path, error) from error
    contents = _read_seal(checkpoint)
    if contents is None:
        return _damage_without_seal(checkpoint, names)
    for name, digest in contents["files"].items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if _digest(checkpoint / name) != digest:
            return f"{name} has changed since it was written"
    return None


def _damage_without_seal(checkpoint: Path, names: list[str]) -> str | None:
    for pattern in _REQUIRED:
        if not any(fnmatch(name, pattern) for name in names):
            return f"{pattern.replace('*', '')} is missing"
    for name in names:
        try:
            complete = _is_complete(checkpoint / name)
        except (SempaError, SafetensorError, zipfile.BadZipFile, OSError):
            complete = False
        if not complete:
            return f"{name} cannot be read"
    try:
        weights = ModelFolder(checkpoint).weight_files
    except SempaError as error:  # the index is not a valid one
        return str(error)
    present = [name for name in weights if name in names]
    sharded = weights[0].endswith(".index.json")
    return None if present == weights or (present and not sharded) else "weights are missing"


def _is_complete(path: Path) -> bool:
    """Whether a file of a checkpoint can be parsed by the format of its extension; parsers may raise, too."""
    if path.suffix == ".json":
        state = read_json(path)
        return path.name != _STATE or (isinstance(state, dict) and isinstance(state.get("global_step"), int))
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # checks the header against the file length
            return True
    if path.suffix in (".pt", ".pth"):
        with zipfile.ZipFile(path) as archive:  # checks the CRC of each member
            return archive.testzip() is None
    return True


def rename_damaged(folder: Path) -> list[str]:
    """Rename the damaged checkpoints in ``folder`` unless all are damaged; return a line of text on each.

    Raises:
        UnreadableError: If one of them cannot be read; then none is renamed.
    """
    damaged = {path: damage for path in checkpoints_in(folder) if (damage := damage_in(path))}
    if len(damaged) == len(checkpoints_in(folder)):
        return []
    lines = []
    for path, damage in damaged.items():
        target = path.with_name(_DAMAGED + path.name)
        if target.exists():
            shutil.rmtree(target)
        path.rename(target)
        lines.append(f"{path.name} is damaged ({damage}) and was renamed to {target.name}.")
    return lines


class Checkpoints(TrainerCallback):
    """Seal each checkpoint, keep the newest and the best, and make sure that the best one is complete.

    Older checkpoints are deleted only after the new one is on the disk. So a power loss at any time leaves a complete
    one.

    Args:
        run: Identity of the run.
    """

    def __init__(self, run: dict[str, Any]) -> None:
        self._run = run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the best checkpoint of a resumed run; at its end, the one that becomes the finished model."""
        _find_best(Path(str(args.output_dir)), state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint after all processes have written their files, then delete older ones."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir))
            seal(folder / f"checkpoint-{state.global_step}", self._run)
            write_through(folder)
            rotate_checkpoints(str(folder), _NUM_KEPT, state.best_model_checkpoint)

    on_train_end = on_train_begin


def _find_best(folder: Path, state: TrainerState) -> None:
    """Set the best checkpoint in ``state`` to its path in ``folder``, or to the next best one if it is damaged."""
    if not state.best_global_step:
        return
    recorded = folder / f"checkpoint-{state.best_global_step}"
    if fault_in(recorded) is None:
        state.best_model_checkpoint = str(recorded)
        return
    scores = {int(line["step"]): line[DEV_METRIC] for line in state.log_history if DEV_METRIC in line}
    complete = [path for path in checkpoints_in(folder) if _step(path) in scores and fault_in(path) is None]
    best = max(complete, key=lambda path: scores[_step(path)], default=None)
    if state.is_world_process_zero:
        fallback = f"{best.name} is the best complete one" if best else "no other one is complete"
        print(f"The best checkpoint, {recorded.name}, is damaged or missing; {fallback}.", file=sys.stderr)
    state.best_model_checkpoint = str(best) if best else None
    state.best_global_step = _step(best) if best else None
    state.best_metric = scores[_step(best)] if best else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
