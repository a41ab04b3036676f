"""Fill the disk under a command: one paragraph, no part left for the whole, and the next run succeeds."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.attacks.kill import JOBS, Job, again
from benchmarks.attacks.world import Child, Outcome, World, content, unlike

_SIZES = (16, 64, 160)
"""Sizes of the disk in KiB; the tiny outputs are larger than the first and most than the others."""
_ENOUGH = 256 * 1024
_BAD_INPUT = 2
_FULL = "No space left"


def attack(world: World) -> Iterator[Outcome]:
    """Yield what became of each command on disks of several sizes; nothing where a file system cannot be mounted."""
    for job in JOBS:
        if job.quick or not world.quick:
            yield attack_job(world, job, _SIZES[:1] if world.quick else _SIZES)


def attack_job(world: World, job: Job, sizes: tuple[int, ...]) -> Outcome:
    """Run a command on disks of these sizes (KiB), then on one with room enough."""
    outcome, started = Outcome(f"full disk: {job.name}"), time.perf_counter()
    log = world.root / "log.txt"
    undisturbed = world.folder("disk", "undisturbed") / job.output
    Child.start(world.words(job.command, undisturbed), log).wait()
    for size in sizes:
        with tmpfs(world.folder("disk", "full"), size) as disk:
            if disk is None:
                return outcome
            child = Child.start(world.words(job.command, disk / job.output), log)
            code, line = child.wait(), child.last_line
            if code == 0 and (disk / job.output).exists():
                continue  # it fitted
            outcome.check(code == _BAD_INPUT and _FULL in line, f"{size} KiB: exit code {code}: {line}")
            sound = _whole_files(disk / job.output) if job.in_parts else not (disk / job.output).exists()
            outcome.check(sound, f"{size} KiB: a part was left for the whole")
            subprocess.run(["mount", "-o", f"remount,size={_ENOUGH}k", str(disk)], check=True)
            code, line = again(world, job, disk / job.output)
            fault = unlike(disk / job.output, [content(undisturbed)], "undisturbed", rounded=job.rounded)
            outcome.check(code == 0 and not fault, f"{size} KiB, then room: exit code {code}: {fault or line}")
    shutil.rmtree(world.root / "disk")
    outcome.seconds = time.perf_counter() - started
    return outcome


def _whole_files(output: Path) -> bool:
    """Whether all records of an output that comes in parts can be read, but for those of an unfinished run in it."""
    records = [file for file in output.rglob("*.json") if ".training" not in str(file.relative_to(output))]
    with suppress(ValueError):
        return all(json.loads(file.read_bytes()) is not None for file in records)
    return False


@contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[Path | None]:
    """Mount an empty file system of ``size`` KiB within the block; yields None where that is not allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "sempa-st", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
