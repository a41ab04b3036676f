from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import save_file

from sempa_st.errors import SempaError
from sempa_st.folder.averaging import average_models
from sempa_st.folder.copying import copy_model
from sempa_st.training.run_folder import RunFolder
from sempa_st.utils.files import atomic_file, atomic_folder, build_once, check_output_folder, locked, write_json
from sempa_st.utils.leftovers import InUseError, clear_leftovers, held, unwritable_reason

pytestmark = pytest.mark.names_dtype

WRITER = """
import sys
from pathlib import Path
from sempa_st.utils.files import atomic_file, atomic_folder, build_once

def hang(*found):
    Path(found[0], "half").write_text("x") if Path(found[0]).is_dir() else None
    print("ready", flush=True)
    sys.stdin.read()

kind, target = sys.argv[1], Path(sys.argv[2])
if kind == "once":
    build_once(target, "mark", hang)
elif kind == "held":
    from sempa_st.utils.leftovers import held
    with held(target):
        hang(target)
else:
    with {"file": atomic_file, "folder": lambda path: atomic_folder(path, overwrite=True)}[kind](target) as partial:
        hang(partial)
"""


@contextmanager
def process(kind: str, target: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that is in the middle of writing ``target``."""
    command = [sys.executable, "-c", WRITER, kind, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        try:
            yield child
        finally:
            child.kill()


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("kind", ["file", "folder", "once"])
def test_killed_runs_leave_one_leftover_at_most_and_the_next_run_clears_it(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    for _ in range(3):
        with process(kind, target) as child:
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert len(hidden(tmp_path)) == 1
        assert not target.exists()
    if kind == "file":
        with atomic_file(target) as partial:
            partial.write_text("x")
    else:
        build_once(target, "mark", lambda folder: (folder / "mark").touch())  # type: ignore[arg-type, return-value]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_another_process_is_writing_stays(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    with process(kind, target) as child:
        before = hidden(tmp_path)
        assert len(before) == 1
        clear_leftovers(tmp_path)
        with atomic_file(target) as partial:
            partial.write_text("x")
        assert hidden(tmp_path) == before
        target.unlink()
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait() == 0
    assert target.exists()
    assert hidden(tmp_path) == []


def test_others_files_are_no_leftovers(tmp_path: Path) -> None:
    names = [".out.partial-mine", ".other.partial-0123abcd", ".out", "out.partial-0123abcd", ".out.x"]
    for name in names:
        (tmp_path / name).mkdir()
    with atomic_folder(tmp_path / "out"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names, "out"])


def test_a_folder_that_was_moved_away_is_put_back(tmp_path: Path) -> None:
    """The state after a kill between the two renames of an overwrite."""
    for scratch in (True, False):
        old = tmp_path / ".out.old-0123abcd"
        old.mkdir()
        (old / "mine").write_text("x")
        if scratch:
            (tmp_path / ".out.partial-0123abcd" / "out").mkdir(parents=True)
        with pytest.raises(SempaError, match="not empty"):
            check_output_folder(tmp_path / "out")
        assert (tmp_path / "out" / "mine").read_text() == "x"
        assert hidden(tmp_path) == []
        (tmp_path / "out").rename(old)
        (tmp_path / "out").mkdir()  # the new output is in place
        check_output_folder(tmp_path / "out")
        assert hidden(tmp_path) == []
        (tmp_path / "out").rmdir()


def test_an_interrupt_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with atomic_folder(target) as partial:
        (partial / "a").write_text("1")
    rename = Path.rename

    def interrupted(self: Path, to: Path) -> Path:
        if self.name == "out" and to == target:
            raise KeyboardInterrupt
        return rename(self, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), atomic_folder(target, overwrite=True):
        patch.setattr(Path, "rename", interrupted)
    assert not target.exists()
    clear_leftovers(tmp_path)
    assert (target / "a").read_text() == "1"


def test_the_first_of_two_that_may_not_overwrite_stays(tmp_path: Path) -> None:
    """Both have found the place empty."""
    target = tmp_path / "out"
    with pytest.raises(SempaError, match="out is not empty"), atomic_folder(target) as late:
        (late / "late").touch()
        with atomic_folder(target) as first:
            (first / "first").touch()
    assert [path.name for path in target.iterdir()] == ["first"]
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("moment", ["before", "within"])
def test_the_last_of_two_that_overwrite_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Another process publishes before ours, or moves the old output away and its own into place amid our moves."""
    target, rename = tmp_path / "out", Path.rename
    with atomic_folder(target) as old:
        (old / "old").touch()

    def publish_another() -> None:
        with atomic_folder(target, overwrite=True) as other:
            (other / "other").touch()

    def disturbed(self: Path, to: Path) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", rename)
            publish_another()
        monkeypatch.setattr(Path, "rename", rename)
        if self == target:
            rename(self, tmp_path / "elsewhere")
        return rename(self, to)

    with atomic_folder(target, overwrite=True) as late:
        (late / "late").touch()
        publish_another()
        if moment == "within":
            monkeypatch.setattr(Path, "rename", disturbed)
    assert [path.name for path in target.iterdir()] == ["late"]
    assert hidden(tmp_path) == []


def test_what_is_published_between_our_two_moves_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename, disturb = tmp_path / "out", Path.rename, [True]
    with atomic_folder(target) as old:
        (old / "old").touch()

    def moved(self: Path, to: Path) -> Path:
        if to == target and disturb:
            disturb.clear()
            target.mkdir()
            (target / "other").touch()
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", moved)
    with atomic_folder(target, overwrite=True) as late:
        (late / "late").touch()
    assert [path.name for path in target.iterdir()] == ["late"]
    assert hidden(tmp_path) == []


def test_a_lock_keeps_others_out_and_leaves_no_file(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with process("held", lock) as child:
        with pytest.raises(InUseError), held(lock):
            pass
        child.send_signal(signal.SIGKILL)
        child.wait()
        with held(lock), pytest.raises(InUseError), held(lock):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_was_replaced_meanwhile_is_not_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other processes removed the file and created a new one between our opening and locking it."""
    lock, flock, replaced = tmp_path / "lock", fcntl.flock, []

    def late(number: int, operation: int) -> None:
        if not replaced:
            replaced.append(lock.unlink())
            lock.touch()
        flock(number, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with held(lock, wait=True):
        assert replaced
        with lock.open() as handle, pytest.raises(BlockingIOError):
            flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_file_system_without_locks_is_one_clear_paragraph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FileLock, *args: object, **kwargs: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(FileLock, "acquire", fail)
    reason = os.strerror(errno.ENOTSUP)
    with pytest.raises(SempaError, match=f"keeps two runs apart, cannot be written: {reason}"):
        RunFolder(tmp_path / "model").open({}, resume=False, overwrite=False)
    expected = f"keeps two sweeps apart, cannot be written: {reason}"
    with pytest.raises(SempaError, match=expected), locked(tmp_path / "sweep" / ".lock", "", "sweeps"):
        pass
    with pytest.raises(SempaError, match=f"cache folder .* cannot be written.*{reason}"):
        build_once(tmp_path / "a", "mark", Path.mkdir)
    write_json(tmp_path / "a.json", 1)  # needs no lock
    assert (tmp_path / "a.json").read_text() == "1\n"


@pytest.mark.parametrize("name", ["a" * 237, "a" * 238, "a" * 255, "\u00e9" * 127], ids=len)
def test_names_may_be_as_long_as_a_file_system_allows(tmp_path: Path, name: str) -> None:
    write_json(tmp_path / "file" / name, 1)
    target = tmp_path / "folder" / name
    for text in ("1", "2"):
        with atomic_folder(target, overwrite=True) as partial:
            (partial / "a").write_text(text)
    assert (target / "a").read_text() == "2"
    with process("folder", target) as child:
        scratch = target.parent / hidden(target.parent)[0]
        child.send_signal(signal.SIGKILL)
        child.wait()
    old = scratch.with_name(scratch.name.replace(".partial-", ".old-"))
    target.rename(old)  # the state after a kill between the two renames
    clear_leftovers(target.parent)
    assert len(list(target.parent.iterdir())) == 1
    clear_leftovers(target.parent, name)
    assert [path.name for path in target.parent.iterdir()] == [name]
    assert (target / "a").read_text() == "2"


def test_processes_that_wait_for_one_folder_make_it_once(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from sempa_st.utils.files import build_once

def make(folder):
    with open(sys.argv[2], "a") as handle:
        handle.write(f"{os.getpid()}\\n")
    (folder / "mark").touch()

build_once(Path(sys.argv[1]), "mark", make)
"""
    made = tmp_path / "made"
    arguments = [sys.executable, "-c", code, str(tmp_path / "cache" / "a"), str(made)]
    children = [subprocess.Popen(arguments) for _ in range(4)]
    assert [child.wait() for child in children] == [0] * 4
    assert len(made.read_text().splitlines()) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["a"]


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(path: Path) -> set[tuple[bool, int]]:
    return {(each.is_dir(), each.stat().st_mode & 0o777) for each in (path, *path.rglob("*"))}


def test_the_umask_decides_on_modes(tmp_path: Path, umask: int) -> None:
    """Whatever mode the library that writes a file, or the file that is copied, has."""
    with atomic_folder(tmp_path / "folder") as folder:
        save_file({"a": torch.zeros(2)}, folder / "a.safetensors")
        (folder / "sub").mkdir(mode=0o700)
        (folder / "sub" / "b").touch(mode=0o444)
        (folder / "link").symlink_to("sub")
    assert modes(tmp_path / "folder") == {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}
    with atomic_file(tmp_path / "a.safetensors") as file:
        save_file({"a": torch.zeros(2)}, file)
    write_json(tmp_path / "a.json", [])
    build_once(tmp_path / "cache" / "c", "mark", lambda path: save_file({"a": torch.zeros(2)}, path / "mark"))
    for path in (tmp_path / "a.safetensors", tmp_path / "a.json", tmp_path / "cache" / "c" / "mark"):
        assert modes(path) == {(False, 0o666 & ~umask)}, path


def test_the_umask_decides_on_models_too(adapter_folder: Path, tmp_path: Path, umask: int) -> None:
    made = [
        copy_model(str(adapter_folder), tmp_path / "merged", merge=True),
        copy_model(str(adapter_folder), tmp_path / "half", scale=0.5, format="custom"),
        average_models([str(adapter_folder)] * 2, tmp_path / "mean"),
    ]
    for folder in made:
        assert modes(folder) == {(True, 0o777 & ~umask), (False, 0o666 & ~umask)}


def test_a_file_is_on_the_disk_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power loss the old or the new file is there, complete."""
    events: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def name_of(number: int) -> str:
        return Path(f"/proc/self/fd/{number}").readlink().name

    monkeypatch.setattr(os, "fsync", lambda number: (events.append(f"sync {name_of(number)}"), fsync(number))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("move"), replace(self, to))[1])
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("move"), rename(self, to))[1])
    write_json(tmp_path / "a.json", 1)
    assert events == ["sync a.json", "move", f"sync {tmp_path.name}"]
    events.clear()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert events == ["sync a", "sync out", "move", f"sync {tmp_path.name}"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_one_clear_paragraph(tmp_path: Path, number: int) -> None:
    def fail(folder: Path) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(SempaError, match=rf"cache folder .* cannot be written.*{os.strerror(number)}.*SEMPA_CACHE_DIR"):
        build_once(tmp_path / "a", "mark", fail)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(SempaError, match=r"(Not a directory|File exists).*SEMPA_CACHE_DIR"):
        build_once(tmp_path / "file" / "a", "mark", fail)
    with pytest.raises(OSError, match="something else"):
        build_once(tmp_path / "a", "mark", lambda folder: (_ for _ in ()).throw(OSError("something else")))


def test_a_disk_that_is_full_for_weights_is_told_alike() -> None:
    """The safetensors library raises its own error, with the errno in its message."""
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert unwritable_reason(full) == os.strerror(errno.ENOSPC)
    assert unwritable_reason(Exception("No space left on device (os error 28)")) == os.strerror(
        errno.ENOSPC
    )  # tokenizers
    assert unwritable_reason(Exception("(os error 2)")) is None
    torch = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 39104 vs 38992")
    assert str(unwritable_reason(torch)).startswith(f"{os.strerror(errno.ENOSPC)}, most likely")
    assert unwritable_reason(RuntimeError("[enforce fail at inline_container.cc:145] . no such record")) is None
    assert unwritable_reason(SafetensorError("Error while deserializing header: header too small")) is None
