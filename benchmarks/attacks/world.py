"""What the attacks share: tiny models and data in a scratch folder, commands in processes of their own, and outcomes.

A process of a command is forked from one that has imported everything, so that a trial takes seconds and not the half
minute of the imports.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import pkgutil
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # the tests' tiny models
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from helpers.server import activated_adapter
from helpers.tiny import finish_adapter, make_llama, make_tokenizer, sample_sentences, save_base, save_sts
from tqdm import tqdm

import sempa_st
from sempa_st.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = "--device cpu --dtype float32"
TRAIN = (
    "train --base BASE --data sample --dev sample --max-triplets 24 --batch-size 4 --gradient-accumulation 1 "
    f"--checkpoint-samples 8 --learning-rate 5e-3 --max-seq-length 200 {CPU} --output OUT"
)
"""A run of seconds with three checkpoints."""
_REMEMBERED = "digests"
_VARIES = {"created", "seconds", "command", "speed", "run", "date", "evaluation_time", "start", "end"}
"""Keys of records that differ between two runs of the same command; the last four are MTEB's."""
_VARYING_COLUMNS = {"seconds", "sentences/s"}
_TIME = re.compile(rb"\d{4}-\d\d-\d\dT[\d:]+\+00:00")
_ROUNDED = 1e-5
"""Difference of scores that another order of sums may make."""
_JOURNAL = "journal.jsonl"
"""File of a sweep with times, and with numbers of processes."""


@dataclass
class Outcome:
    """What became of an attack.

    Attributes:
        attack: What was done.
        trials: How often.
        failures: What went wrong, a line each.
        seconds: How long all trials took.
    """

    attack: str
    trials: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, holds: bool, otherwise: str) -> None:
        """Count a trial; note what went wrong unless it holds."""
        self.trials += 1
        if not holds:
            self.failures.append(otherwise)


@dataclass(frozen=True)
class World:
    """A scratch folder with tiny models and data, and how hard to try.

    Attributes:
        root: The folder.
        quick: Whether a few trials of each attack do.
    """

    root: Path
    quick: bool = False

    @classmethod
    def build(cls, root: Path, *, quick: bool = False) -> World:
        """Write the models and data, import all that a command needs, and return the world."""
        torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
        # tqdm's own lock is one semaphore of all processes: a command killed while it holds it would stop every other.
        # Its monitor would be a thread that may hold the lock at a fork.
        tqdm.set_lock(threading.RLock())
        tqdm.monitor_interval = 0
        os.environ["SEMPA_CACHE_DIR"] = str(root / "cache")
        for module in pkgutil.walk_packages(sempa_st.__path__, "sempa_st."):
            if not module.name.endswith(("__main__", "on_ray")) and ".serve" not in module.name:
                importlib.import_module(module.name)
        for library in ("mteb", "peft", "trl"):
            importlib.import_module(library)
        base = save_base(root / "base", make_llama(), make_tokenizer(chat=None))
        finish_adapter(root / "native", base, make_llama())
        finish_adapter(root / "other", base, make_llama(), seed=2)
        activated_adapter(root / "activated", base)
        (root / "data").mkdir()
        save_sts(root / "data")
        (root / "texts.txt").write_text("\n".join(sample_sentences()[:240]) + "\n", encoding="utf-8")
        return cls(root, quick)

    def words(self, command: str, output: Path) -> list[str]:
        """Return the words of a command; names in capitals stand for paths of the world, and OUT for ``output``."""
        names = {"OUT": output, "BASE": self.root / "base", "NATIVE": self.root / "native"}
        names |= {"OTHER": self.root / "other", "ACTIVATED": self.root / "activated"}
        names |= {"DATA": self.root / "data", "TEXTS": self.root / "texts.txt", "SPARE": self.root / "spare.npy"}
        return [str(names.get(word, word)) for word in shlex.split(command)]

    def folder(self, *parts: str) -> Path:
        """Return an empty folder of the world."""
        path = self.root.joinpath(*parts)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path


@dataclass
class Child:
    """A command in a process of its own; its output goes to a file."""

    process: int
    log: Path
    code: int | None = None

    @classmethod
    def start(cls, words: Sequence[str], log: Path, before: Callable[[], Any] = lambda: None) -> Child:
        """Fork this process and run a command of ``sempa`` in the copy, after ``before``."""
        process = os.fork()
        if process:
            return cls(process, log)
        code = 1
        try:
            torch.set_num_threads(1)  # PyTorch makes its pool of threads anew here, and not in two threads at a time
            os.setsid()
            output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout = sys.stderr = open(output, "w", 1, encoding="utf-8", errors="replace")  # noqa: PTH123, SIM115
            sys.argv = ["sempa", *words]
            before()
            code = main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    @classmethod
    def call(cls, work: Callable[[], Any], log: Path) -> Child:
        """Fork this process and call a function in the copy; an exception is the exit code 1."""

        def before() -> None:
            work()
            sys.stdout.flush()
            os._exit(0)

        return cls.start([], log, before)

    def wait(self) -> int:
        """Return the exit code; negative is the number of the signal that ended the process."""
        if self.code is None:
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return self.code

    def wait_within(self, seconds: float) -> int:
        """Return the exit code; kill the process, and those that it has started, if they take longer."""
        code = self.kill_after(seconds, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        return code

    def kill_after(self, seconds: float, number: int) -> int:
        """Send a signal after some seconds, unless the command has ended by then; return the exit code."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            done, status = os.waitpid(self.process, os.WNOHANG)
            if done:
                self.code = os.waitstatus_to_exitcode(status)
                return self.code
            time.sleep(0.002)
        os.kill(self.process, number)
        return self.wait()

    @property
    def last_line(self) -> str:
        """Return the last line that the command wrote so far."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").strip().splitlines()
        return lines[-1] if lines else ""


def content(path: Path) -> dict[str, str]:
    """Return a SHA-256 of each file of an output, by its path in it, without what differs from run to run.

    A sweep's journal and the remembered digests of a cache folder are left out: they hold times and places.
    """
    folder = path if path.is_dir() else path.parent
    names = {file: file.relative_to(folder) for file in files_of(path)}
    return {str(name): _digest(file) for file, name in names.items() if name.parts[0] not in (_REMEMBERED, _JOURNAL)}


def unlike(output: Path, expected: Sequence[dict[str, str]], which: str, *, rounded: bool = False) -> str:
    """Return what is wrong with an output, the only entry of its folder; empty if it is one of those expected.

    Args:
        output: The output.
        expected: What :func:`content` returned of sound ones.
        which: What these are.
        rounded: Take numbers in JSON as equal whose difference is that of another order of sums.
    """
    found = content(output)
    if found not in expected and not (rounded and any(_equal(found, each) for each in expected)):
        keys = sorted(key for key in expected[0].keys() | found.keys() if expected[0].get(key) != found.get(key))
        return f"other than {which}: {', '.join(keys)}"
    left = sorted(path.name for path in output.parent.iterdir() if path != output)
    return f"left: {', '.join(left)}" if left else ""


def files_of(path: Path) -> Iterator[Path]:
    """Yield the files of a folder and below, sorted, or the file itself."""
    yield from [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _equal(found: dict[str, str], expected: dict[str, str]) -> bool:
    """Whether two outputs differ in the last digits of numbers in JSON at most."""
    if found.keys() != expected.keys():
        return False
    differing = [name for name in found if found[name] != expected[name]]
    return all(
        name.endswith(".json") and _close(json.loads(found[name]), json.loads(expected[name])) for name in differing
    )


def _close(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=_ROUNDED, abs_tol=_ROUNDED)
    return bool(one == other)


def _digest(file: Path) -> str:
    """Return a SHA-256 of a file without what varies; of JSON the content itself."""
    raw = file.read_bytes()
    if file.suffix == ".json":
        return json.dumps(_constant(json.loads(raw)), sort_keys=True)
    if separator := {".md": "|", ".csv": ","}.get(file.suffix):
        raw = repr(list(_constant_cells(raw.decode(), separator))).encode()
    elif file.suffix == ".html":
        raw = _TIME.sub(b"", raw)
    return hashlib.sha256(raw).hexdigest()


def _constant(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _constant(item) for key, item in value.items() if key not in _VARIES}
    return [_constant(item) for item in value] if isinstance(value, list) else value


def _constant_cells(text: str, separator: str) -> Iterator[list[str]]:
    """Yield the lines of a text as cells, without the columns of a table that differ from run to run."""
    varying: set[int] = set()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(separator)]
        varying = {place for place, cell in enumerate(cells) if cell in _VARYING_COLUMNS} or varying
        yield [cell for place, cell in enumerate(cells) if place not in varying]
