"""Kill a command at a random moment and run it again: the result is an undisturbed run's, and nothing else is left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.attacks.world import CPU, REPOSITORY, TRAIN, Child, Outcome, World, content, unlike
from sempa_st.model.embedded import embedded_base

_TRIALS, _QUICK_TRIALS = 20, 2
_TERMINATED = 143
_WAYS_ON = {"no unfinished run": "", "Pass --overwrite": "--overwrite"}
"""Flags by what the answer to ``--resume`` says: before the first checkpoint, or in the middle of it."""
_FINISHED = ("exists", "is not empty")
"""Parts of answers to a command whose output was there already when it was killed."""


@dataclass(frozen=True)
class Job:
    """A command that is killed.

    Attributes:
        name: Name in the table.
        command: Its words; see :meth:`World.words`.
        output: Name of its output.
        resume: Flag with which it goes on, if it needs one.
        quick: Whether it is one of the quick form.
        trials: How often it is killed at most.
        environment: Variables of its process; the value OUT stands for the output.
        given: Returns a folder that the output holds from the start, by links to its files.
        in_parts: Whether the output shows finished parts while others are missing.
        rounded: Whether scores may differ in their last digits after a restart: the sentences of the tasks that are
            left make up other batches.
    """

    name: str
    command: str
    output: str = "out"
    resume: str = ""
    quick: bool = False
    trials: int = _TRIALS
    environment: Mapping[str, str] = field(default_factory=dict)
    given: Callable[[], Path] | None = None
    in_parts: bool = False
    rounded: bool = False


_ENCODE = f"encode NATIVE TEXTS --output OUT --shard-size 4 {CPU}"
_RUN = TRAIN.replace("--max-triplets 24", "--max-triplets 8").replace(
    "--checkpoint-samples 8", "--checkpoint-samples 4"
)
JOBS = [
    Job("encode to npy", _ENCODE, "v.npy", quick=True),
    Job("encode to parquet", _ENCODE, "v.parquet"),
    Job("encode to a folder", _ENCODE),
    Job("train: dpo (TRL's trainer)", TRAIN, resume="--resume", quick=True),
    Job("train: contrastive (sentence-transformers' trainer)", f"{TRAIN} --objective contrastive", resume="--resume"),
    Job("train: one-word-listwise", f"{TRAIN} --objective one-word-listwise", resume="--resume"),
    Job(
        "train: retrieval with a KL term", f"{TRAIN} --objective retrieval --kl 1 --kl-text template", resume="--resume"
    ),
    Job("train: all weights", f"{TRAIN} --tuning full", resume="--resume"),
    Job("sweep", _RUN.replace("train ", "sweep ", 1) + " --set lora_r=2,4", in_parts=True),
    Job(
        "table",
        f"table --base BASE --methods mean last-token --data-dir DATA --output OUT {CPU}",
        in_parts=True,
        rounded=True,
    ),
    Job(
        "evaluate",
        f"evaluate NATIVE --tasks STSBenchmark --split dev --data-dir DATA --output OUT {CPU}",
        in_parts=True,
    ),
    Job("analyze", f"analyze BASE --only geometry --output OUT {CPU}", in_parts=True),
    Job("copy --merge", "copy NATIVE OUT --merge", quick=True),
    Job("copy --format server", "copy NATIVE OUT --format server"),
    Job("average", "average NATIVE OTHER --output OUT", quick=True),
]
_SPARE = f"encode MODEL TEXTS --output SPARE --overwrite {CPU}"
_CACHE = {"SEMPA_CACHE_DIR": "OUT"}
_SHIPPED = "sempa-smollm2-135m-activated"
FULL_JOBS = [
    Job("prepare a base", _SPARE.replace("MODEL", "smollm2-135m"), environment=_CACHE),
    Job(
        "complete a shipped model",
        _SPARE.replace("MODEL", _SHIPPED),
        environment=_CACHE,
        given=lambda: embedded_base("smollm2-135m"),
    ),
    Job(
        "encode on Ray",
        f"{_ENCODE} --engine ray --workers 1",
        trials=5,
        environment={"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)},
    ),
]
"""Commands of half a minute."""


def attack(world: World) -> Iterator[Outcome]:
    """Yield what became of each command, killed and ended by SIGTERM."""
    for job in JOBS if world.quick else [*JOBS, *FULL_JOBS]:
        if job.quick or not world.quick:
            yield attack_job(world, job, _QUICK_TRIALS if world.quick else job.trials)


def attack_job(world: World, job: Job, trials: int) -> Outcome:
    """Kill one command ``trials`` times, each time anew, and end it once by SIGTERM."""
    outcome, started = Outcome(f"kill: {job.name}"), time.perf_counter()
    moments = random.Random(job.name)
    output = _fresh(world, job)
    began = time.perf_counter()
    code = _start(world, job, output).wait()
    seconds = time.perf_counter() - began
    expected = content(output)
    outcome.check(code == 0 and bool(expected), f"undisturbed: exit code {code}")
    for number in [signal.SIGKILL] * trials + [signal.SIGTERM]:
        moment = moments.uniform(0, seconds)
        fault = _fault(world, job, moment, number, expected)
        outcome.check(not fault, f"{number.name} after {moment:.2f} of {seconds:.2f} s: {fault}")
    shutil.rmtree(world.root / "kill")
    outcome.seconds = time.perf_counter() - started
    return outcome


def _fresh(world: World, job: Job) -> Path:
    """Return the path of a job's output in an empty folder, with what it holds from the start."""
    output = world.folder("kill", "trial") / job.output
    if job.given is not None:
        source = job.given()
        shutil.copytree(source, output / source.name, copy_function=os.link)
    return output


def _start(world: World, job: Job, output: Path, flag: str = "") -> Child:
    variables = {name: str(output) if value == "OUT" else value for name, value in job.environment.items()}
    words = [*world.words(job.command, output), *flag.split()]
    return Child.start(words, world.root / "log.txt", before=lambda: os.environ.update(variables))


def _fault(world: World, job: Job, moment: float, number: signal.Signals, expected: dict[str, str]) -> str:
    """Return what is wrong after a command was ended at a moment and run again; empty if nothing is."""
    output = _fresh(world, job)
    child = _start(world, job, output)
    code = child.kill_after(moment, number)
    if number == signal.SIGTERM and code not in (0, _TERMINATED, -number):  # the last before main() has begun
        return f"SIGTERM led to exit code {code}: {child.last_line}"
    code, line = again(world, job, output)
    if code and not (code == 2 and output.exists() and any(part in line for part in _FINISHED)):
        return f"run again: exit code {code}: {line}"
    return unlike(output, [expected], "undisturbed", rounded=job.rounded)


def again(world: World, job: Job, output: Path) -> tuple[int, str]:
    """Return exit code and last line of the command run again, with the flags that its own messages name."""
    code, line = _once(world, job, output, job.resume)
    for words, flag in _WAYS_ON.items():
        if job.resume and code and words in line:
            code, line = _once(world, job, output, flag)
    return code, line


def _once(world: World, job: Job, output: Path, flag: str) -> tuple[int, str]:
    child = _start(world, job, output, flag)
    return child.wait(), child.last_line
