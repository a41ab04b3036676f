"""The attack by malformed files: its payloads do what they say, and its judge sees each fault of a command."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.attacks import changes as changes_of
from benchmarks.attacks import files, world
from benchmarks.attacks.files import CANARY, CODE, CORPUS, PICKLE, judge
from benchmarks.attacks.world import Outcome, World
from benchmarks.robustness import ATTACKS

pytestmark = pytest.mark.names_dtype

TOLD = b"sempa: x is 3. Expected 4; mend it.\n"


@pytest.fixture
def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a trial in a world with a file."""
    monkeypatch.setenv("SEMPA_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "texts.txt").write_text("A cat.\n")
    (tmp_path / "files" / "given").mkdir(parents=True)
    return tmp_path / "files"


def judged(
    trial: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: Callable[[], int],
    *,
    sound: bool = False,
    seconds: float = 60,
) -> str:
    """Return what is wrong with a stand-in for the command line."""
    monkeypatch.setattr(world, "main", lambda words: command())
    return judge(World(trial.parent), [], trial, sound=sound, seconds=seconds)


def say(text: bytes, code: int) -> int:
    os.write(2, text)
    return code


def spin() -> int:
    assert resource.getrlimit(resource.RLIMIT_CPU) == (60, 60)
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
    while True:
        pass


def test_the_corpus_is_large_and_each_input_is_another() -> None:
    kinds = {kind: {(of, name) for of in table for name in table[of]} for kind, table in CORPUS.items()}
    assert set(kinds) == {"model folders", "adapters", "tokenizers", "chat templates", "data files"}
    assert min(map(len, kinds.values())) >= 20 and sum(map(len, kinds.values())) >= 60
    assert ATTACKS["files"] is files.attack


def test_each_change_of_a_model_is_one(tiny_base: Path, adapter_folder: Path, tmp_path: Path) -> None:
    """All of them write, remove or link something, and none of them fails."""
    for table in CORPUS.values():
        for of, model in (("base", tiny_base), ("native", adapter_folder), ("activated", adapter_folder)):
            for name, change in table.get(of, {}).items():
                shutil.copytree(model, tmp_path / "given")
                before = files._listing(tmp_path, ())
                change(tmp_path / "given")
                assert files._listing(tmp_path, ()) != before, name
                shutil.rmtree(tmp_path / "given")


def test_inputs_are_made(trial: Path) -> None:
    """A folder of changes for those that need no model: no two of them make the same file."""
    made = set()
    for name, change in CORPUS["data files"]["data"].items():
        folder = trial / name.replace("/", " ")
        folder.mkdir()
        change(folder)
        (path,) = folder.iterdir()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else str(path.lstat().st_mode).encode()
        made.add((path.name, content, path.is_symlink() and str(path.readlink())))
    assert len(made) == len(CORPUS["data files"]["data"])


@pytest.mark.parametrize(
    "program",
    [
        "import json, sys; exec(json.load(sys.stdin)['code'])",
        "import json, pickle, sys; pickle.loads(json.load(sys.stdin)['pickle'].encode())",
        "import json, jinja2, sys; jinja2.Template(json.load(sys.stdin)['template']).render(messages='x')",
    ],
)
def test_a_payload_makes_the_canary(tmp_path: Path, program: str) -> None:
    malformed = json.loads(Path(files.__file__).with_name("malformed.json").read_text())
    payloads = {"code": CODE, "pickle": PICKLE.decode(), "template": malformed["templates"]["a command"]}
    environment = {**os.environ, CANARY: str(tmp_path / "canary")}
    command = [sys.executable, "-c", program]
    subprocess.run(command, env=environment, input=json.dumps(payloads), text=True, check=False, capture_output=True)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        (lambda: say(b"Wrote x.\n", 0), ""),
        (lambda: say(TOLD, 2), ""),
        (lambda: say(b"encode:  50%\r" + TOLD, 2), ""),
        (
            lambda: say(b"sempa: KeyError: 'x' (unexpected; --debug shows the traceback)\n", 1),
            "exit code 1: sempa: KeyError",
        ),
        (lambda: say(b"Traceback (most recent call last):\n" + TOLD, 2), "shows a traceback"),
        (lambda: say(b"thread '<unnamed>' panicked at x.rs\n" + TOLD, 2), ""),
        (lambda: say(TOLD + TOLD, 2), "is not told in one paragraph"),
        (lambda: say(b"usage: sempa\nerror: x\n", 2), "is not told in one paragraph"),
        (lambda: say(b"sempa: \x1b[31mred\n", 2), "is not told in one paragraph"),
        (lambda: say(b"sempa: " + b"x" * 9000, 2), "is not told in one paragraph"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM) or 0, "exit code -15"),
        (lambda: len(bytes(4 << 30)) and 0, "exit code 1"),
        (spin, "exit code -9 (out of time)"),
        (lambda: exec(CODE) or 0, "code of the input was run"),
        (lambda: (pickle.loads(PICKLE) and 0) or 2, "code of the input was run"),
    ],
)
def test_each_fault_of_an_answer_is_seen(
    trial: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[[], int], fault: str
) -> None:
    found = judged(trial, monkeypatch, command)
    assert found.startswith(fault) if fault else not found


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("files/out/made", ""),
        ("cache/x", ""),
        ("beside", "beside"),
        ("files/beside", "files/beside"),
        ("files/given/x", "files/given/x"),
        ("files/scratch/left", "files/scratch/left"),
        ("texts.txt", "texts.txt"),
    ],
)
def test_what_is_written_outside_of_the_output_is_seen(
    trial: Path, monkeypatch: pytest.MonkeyPatch, path: str, named: str
) -> None:
    def command() -> int:
        target = trial.parent / path
        target.parent.mkdir(exist_ok=True)
        target.write_text("A dog.\n")
        return 0

    found = judged(trial, monkeypatch, command)
    assert found == (f"wrote outside of its output: {named}" if named else "")


def test_what_is_removed_is_seen(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = judged(trial, monkeypatch, lambda: (trial.parent / "texts.txt").unlink() or 0)
    assert found == "wrote outside of its output: texts.txt"


def test_a_command_that_hangs_is_killed_with_what_it_started(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def command() -> int:
        started = subprocess.Popen(["sleep", "100"])
        (trial / "out" / "process").write_text(str(started.pid))
        signal.pause()
        return 0

    found = judged(trial, monkeypatch, command, seconds=2)
    assert found.startswith("exit code -9 (out of time): ")
    state = Path(f"/proc/{(trial / 'out' / 'process').read_text()}/stat")
    deadline = time.monotonic() + 30
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_sound_input_must_be_taken(trial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(trial, monkeypatch, lambda: say(TOLD, 2), sound=True).startswith("exit code 2: sempa: x is 3.")


@pytest.mark.parametrize(("quick", "trials"), [(True, 3 + 2), (False, 3 + 2 * 5)])
def test_each_input_goes_to_a_command_of_each_kind_and_failures_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick: bool, trials: int
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    changes = {f"x{number}": changes_of.put("config.json", str(number)) for number in range(5)}
    monkeypatch.setattr(files, "CORPUS", {"models": {"base": changes}})
    monkeypatch.setattr(
        files, "judge", lambda world, words, folder, sound: "" if sound else (folder / "given/config.json").read_text()
    )
    (outcome,) = files.attack(World(tmp_path, quick))
    assert isinstance(outcome, Outcome) and outcome.trials == trials
    assert outcome.failures[0] == "base, x0: encode INPUT TEXTS: 0"
    commands = {failure.split(": ")[1].split()[0] for failure in outcome.failures}
    assert commands == ({"encode", "train"} if quick else {"encode", "train", "copy"})
