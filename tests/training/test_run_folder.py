"""What interrupted, damaged and concurrent runs leave, and that there is always a way on."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import make_config
from safetensors.torch import load_file

from sempa_st.errors import SempaError
from sempa_st.training import output as writing
from sempa_st.training import run as training
from sempa_st.training.checkpoints import _sha256, checkpoints_in, fault_in
from sempa_st.training.config import TrainConfig
from sempa_st.training.dpo import PreferenceTrainer
from sempa_st.training.run import train
from sempa_st.training.run_folder import RunFolder

FILES = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"]
DAMAGES: dict[str, Callable[[Path], Any]] = {
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


class InterruptError(Exception):
    pass


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[Path, dict[str, Any]]:
    output = tmp_path_factory.mktemp("unbroken") / "model"
    return output, train(make_config(tiny_base, output, epochs=2)).record


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """The folder of the same run, broken off after three checkpoints."""
    output = tmp_path_factory.mktemp("interrupted") / "model"
    original, calls = PreferenceTrainer.training_step, 0

    def fail_later(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 8:
            raise InterruptError
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(InterruptError):
        patch.setattr(PreferenceTrainer, "training_step", fail_later)
        train(make_config(tiny_base, output, epochs=2))
    return output.with_name("model.training")


@pytest.fixture
def config(tiny_base: Path, tmp_path: Path, interrupted: Path) -> TrainConfig:
    """Settings of the run, with a copy of the broken one in place; checkpoint-6 is its newest."""
    shutil.copytree(interrupted, tmp_path / "model.training")
    return make_config(tiny_base, tmp_path / "model", epochs=2)


def checkpoints(config: TrainConfig) -> list[Path]:
    return checkpoints_in(RunFolder(config.output).checkpoints)


def unseal(config: TrainConfig) -> None:
    """Make the checkpoints those of a version that did not seal them."""
    for path in checkpoints(config):
        (path / "complete.json").unlink()


def test_a_broken_run_leaves_whole_checkpoints_and_no_lock(config: TrainConfig, interrupted: Path) -> None:
    found = checkpoints(config)
    assert len(found) == 2
    assert found[-1].name == "checkpoint-6"
    assert [fault_in(path) for path in found] == [None, None]
    assert [path.name for path in interrupted.parent.iterdir()] == [interrupted.name]
    seal = json.loads((found[-1] / "complete.json").read_text())
    assert set(FILES) < seal["files"].keys()
    assert seal["run"] == json.loads((interrupted / "identity.json").read_text())


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "of-an-older-version"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_every_damage_is_seen(config: TrainConfig, file: str, damage: str, sealed: bool) -> None:
    older, newest = checkpoints(config)
    if not sealed:
        unseal(config)
    work = RunFolder(config.output)
    assert work.last_checkpoint() == str(newest)
    DAMAGES[damage](newest / file)
    assert fault_in(newest)
    assert work.last_checkpoint() == str(older)
    DAMAGES[damage](older / file)
    assert work.last_checkpoint() is None


def test_a_changed_byte_is_seen(config: TrainConfig) -> None:
    newest = checkpoints(config)[-1]
    path = newest / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert fault_in(newest) == "adapter_model.safetensors has changed since it was written"


@pytest.mark.parametrize(
    ("file", "damage", "sealed"),
    [
        ("trainer_state.json", "halved", True),
        ("trainer_state.json", "halved", False),
        ("optimizer.pt", "halved", False),
        ("rng_state.pth", "emptied", True),
        ("adapter_model.safetensors", "halved", False),
    ],
)
def test_resume_takes_the_newest_whole_checkpoint_and_says_so(
    config: TrainConfig,
    unbroken: tuple[Path, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    file: str,
    damage: str,
    sealed: bool,
) -> None:
    older, newest = checkpoints(config)
    if not sealed:
        unseal(config)
    DAMAGES[damage](newest / file)
    record = train(replace(config, resume=True)).record
    err = capsys.readouterr().err
    assert f"checkpoint-6 is damaged ({file}" in err
    assert f"Resuming from {older.name}." in err
    assert record["dev"] == unbroken[1]["dev"]
    assert record["best_step"] == unbroken[1]["best_step"]
    weights = [load_file(Path(each) / "adapter_model.safetensors") for each in (unbroken[0], config.output)]
    assert all((weights[0][name] == tensor).all() for name, tensor in weights[1].items())
    assert [path.name for path in Path(config.output).parent.iterdir()] == ["model"]


def test_a_damaged_best_checkpoint_gives_way_to_the_next_best(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    best, newest = checkpoints(config)
    unseal(config)
    state = json.loads((newest / "trainer_state.json").read_text())
    state |= {"best_global_step": int(best.name.rpartition("-")[2]), "best_metric": 99.0}
    state["best_model_checkpoint"] = str(best)
    (newest / "trainer_state.json").write_text(json.dumps(state))
    DAMAGES["emptied"](best / "adapter_model.safetensors")
    record = train(replace(config, resume=True)).record
    err = capsys.readouterr().err
    assert f"The best checkpoint, {best.name}, is damaged or missing; checkpoint-6 is the best" in err
    scores = {score["step"]: score["spearman"] for score in record["dev"]["scores"]}
    assert record["best_step"] == max((step for step in scores if step >= 6), key=lambda step: scores[step])


def test_a_folder_that_was_moved_is_gone_on_with(
    tiny_base: Path, tmp_path: Path, interrupted: Path, unbroken: tuple[Path, dict[str, Any]]
) -> None:
    shutil.copytree(interrupted, tmp_path / "other.training")
    record = train(make_config(tiny_base, tmp_path / "other", epochs=2, resume=True)).record
    assert record["best_step"] == unbroken[1]["best_step"]


def nothing(work: Path) -> None:
    shutil.rmtree(work)


def empty(work: Path) -> None:
    shutil.rmtree(work)
    work.mkdir()


def no_identity(work: Path) -> None:
    (work / "identity.json").unlink()


def half_an_identity(work: Path) -> None:
    DAMAGES["halved"](work / "identity.json")


def no_identity_of_an_older_version(work: Path) -> None:
    no_identity(work)
    for path in checkpoints_in(work / "checkpoints"):
        (path / "complete.json").unlink()


def no_checkpoint(work: Path) -> None:
    shutil.rmtree(work / "checkpoints")
    (work / "checkpoints").mkdir()


def no_checkpoint_and_no_identity(work: Path) -> None:
    no_checkpoint(work)
    no_identity(work)


def half_written_identity_alone(work: Path) -> None:
    empty(work)
    (work / ".identity.json.partial-0123abcd").mkdir()
    (work / ".identity.json.partial-0123abcd" / "identity.json").write_text("{")


def only_damaged_checkpoints(work: Path) -> None:
    for path in checkpoints_in(work / "checkpoints"):
        DAMAGES["halved"](path / "optimizer.pt")


def only_empty_checkpoints(work: Path) -> None:
    for path in checkpoints_in(work / "checkpoints"):
        shutil.rmtree(path)
        path.mkdir()


def output_too(work: Path) -> None:
    output = work.with_name("model")
    output.mkdir()
    (output / "old").touch()


ANEW, GOES_ON = "anew", "goes on"
STATES: dict[Callable[[Path], None], tuple[str, str]] = {
    nothing: (ANEW, "no unfinished run"),
    empty: (ANEW, "no unfinished run"),
    half_written_identity_alone: (ANEW, "no unfinished run"),
    no_checkpoint: (ANEW, "no unfinished run"),
    no_checkpoint_and_no_identity: (ANEW, "no unfinished run"),
    no_identity: ("--resume", GOES_ON),
    half_an_identity: ("--resume", GOES_ON),
    no_identity_of_an_older_version: ("--overwrite", "--overwrite"),
    only_damaged_checkpoints: ("--overwrite", "--overwrite"),
    only_empty_checkpoints: ("--overwrite", "--overwrite"),
    output_too: ("--overwrite", "--overwrite"),
}


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_no_state_is_without_a_way_out(config: TrainConfig, state: Callable[[Path], None]) -> None:
    """What a command advises in a state is a command that works in it."""
    work = RunFolder(config.output)
    state(work.path)
    identity = {"run": 1}
    if GOES_ON in STATES[state]:
        identity = json.loads((checkpoints(config)[-1] / "complete.json").read_text())["run"]
    kept = Path(config.output).parent / "kept"
    if work.path.exists():
        shutil.copytree(work.path, kept)
    for flags, expected in zip(({}, {"resume": True}, {"overwrite": True}), (*STATES[state], ANEW), strict=True):
        shutil.rmtree(work.path, ignore_errors=True)
        if kept.exists():
            shutil.copytree(kept, work.path)
        before = sorted(path.name for path in work.path.rglob("*")) if work.path.exists() else None
        if expected in (ANEW, GOES_ON):
            work.open(identity, **{"resume": False, "overwrite": False, **flags})
            work.close()
            assert bool(work.last_checkpoint()) == (expected == GOES_ON)
            assert json.loads((work.path / "identity.json").read_text()) == identity
            continue
        with pytest.raises(SempaError, match=expected):
            work.open(identity, **{"resume": False, "overwrite": False, **flags})
        after = sorted(path.name for path in work.path.rglob("*")) if work.path.exists() else None
        assert after == before or state is half_written_identity_alone
        assert not [path for path in work.path.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_a_run_that_was_killed_after_its_output_leaves_nothing(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool, keep: bool
) -> None:
    """The next command is refused, since the output is there, and removes what is left of the run."""

    original = RunFolder.remove

    def half(folder: RunFolder, *, models: bool = True) -> None:
        if models:
            return original(folder)
        shutil.rmtree(checkpoints_in(folder.checkpoints)[0])
        raise InterruptError

    config = make_config(tiny_base, tmp_path / "model", epochs=2, keep_checkpoints=keep)
    with monkeypatch.context() as patch, pytest.raises(InterruptError):
        patch.setattr(RunFolder, "remove", half)
        patch.setattr(RunFolder, "after_interruption", lambda folder: None)  # a killed process does nothing more
        train(config)
    left = tmp_path / "model.training"
    assert checkpoints_in(left / "checkpoints")
    written = (tmp_path / "model" / "sempa_run.json").read_bytes()
    with pytest.raises(SempaError, match="model is not empty"):
        train(replace(config, resume=resume))
    assert [path.name for path in left.iterdir()] == ["models"] if keep else not left.exists()
    assert (tmp_path / "model" / "sempa_run.json").read_bytes() == written


@pytest.mark.parametrize("at_once", [True, False])
def test_an_interrupt_after_the_output_keeps_the_kept_models(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], at_once: bool
) -> None:
    interrupts: list[int] = []

    original = RunFolder.remove

    def interrupted(folder: RunFolder, *, models: bool = True) -> None:
        if models or interrupts:
            return original(folder, models=models)
        interrupts.append(1)
        if not at_once:
            original(folder, models=models)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RunFolder, "remove", interrupted)
        train(make_config(tiny_base, tmp_path / "model", epochs=2, keep_checkpoints=True))
    assert [path.name for path in (tmp_path / "model.training").iterdir()] == ["models"]
    assert list((tmp_path / "model.training" / "models").iterdir())
    assert "--resume" not in capsys.readouterr().err


def test_a_run_beside_an_earlier_output_is_not_taken_for_a_finished_one(
    tiny_base: Path, interrupted: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("of an earlier run")
    shutil.copytree(interrupted.with_name("model.training"), tmp_path / "model.training")
    with pytest.raises(SempaError, match="model is not empty"):
        train(make_config(tiny_base, tmp_path / "model", epochs=2, resume=True))
    assert checkpoints_in(tmp_path / "model.training" / "checkpoints")


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_no_run_has_written_is_never_removed(tmp_path: Path, overwrite: bool) -> None:
    work = RunFolder(tmp_path / "model")
    work.path.mkdir()
    (work.path / "thesis.tex").touch()
    with pytest.raises(SempaError, match=r"holds files that are not a run's: thesis\.tex"):
        work.open({}, resume=False, overwrite=overwrite)
    assert (work.path / "thesis.tex").exists()


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        ".git/HEAD",
        ".partial-0123abcd/mine",
        "checkpoints/epoch=9.ckpt",
        "checkpoints/notes.txt",
        "checkpoints/README.md",
        "checkpoints/checkpoint-best/model.safetensors",
        "checkpoints/checkpoint-7b/model.safetensors",
        "checkpoints/.env",
    ],
)
def test_what_no_run_has_written_is_in_the_way_wherever_it_lies(
    config: TrainConfig, name: str, flags: dict[str, bool]
) -> None:
    work = RunFolder(config.output)
    if not flags:
        no_checkpoint(work.path)
    file = work.path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")  # in place of the trainer's own, if it is a README.md
    named = name if name.startswith("checkpoints/") and name.count("/") == 1 else name.rpartition("/")[0]
    with pytest.raises(SempaError, match=f"holds files that are not a run's: {re.escape(named)}\\. Move it away"):
        train(replace(config, **flags))
    assert file.read_text() == "mine"
    work.remove()  # nor is it, where it comes while the run is at work
    assert [path for path in work.path.rglob("*") if path.is_file()] == [file]


def test_what_runs_and_desktops_leave_is_not_in_the_way(tmp_path: Path) -> None:
    work = RunFolder(tmp_path / "model")
    (work.path / ".process.txt.partial-0123abcd").mkdir(parents=True)
    (work.path / ".DS_Store").touch()
    (work.checkpoints / "damaged-checkpoint-3").mkdir(parents=True)
    (work.checkpoints / ".directory").touch()
    work.open({"a": 1}, resume=False, overwrite=False)
    work.close()
    assert sorted(path.name for path in work.path.rglob("*")) == ["checkpoints", "identity.json", "process.txt"]
    work.remove()
    assert not work.path.exists()


def test_a_link_to_another_disk_is_used_and_stays(tiny_base: Path, tmp_path: Path) -> None:
    config = make_config(tiny_base, tmp_path / "model", max_triplets=8)
    work, disk = RunFolder(config.output), tmp_path / "disk"
    work.path.symlink_to(disk)
    with pytest.raises(SempaError, match="a broken link"):
        train(config)
    (disk / "checkpoints").mkdir(parents=True)
    train(config)
    assert (tmp_path / "model" / "adapter_model.safetensors").is_file()
    assert work.path.is_symlink()
    assert list(disk.iterdir()) == []


@contextmanager
def unreadable(*files: Path, number: int = errno.EIO) -> Iterator[None]:
    """A disk that does not give back these files, or list these folders."""
    real, listed = Path.open, Path.iterdir

    def check(path: Path) -> None:
        if path in files:
            raise OSError(number, os.strerror(number), str(path))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *args, **kwargs: (check(path), real(path, *args, **kwargs))[1])
        patch.setattr(Path, "iterdir", lambda path: (check(path), listed(path))[1])
        _sha256.cache_clear()
        yield
    _sha256.cache_clear()


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "of-an-older-version"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "complete.json", "trainer_state.json", "."])
def test_what_cannot_be_read_is_not_taken_for_damaged(
    config: TrainConfig, name: str, number: int, sealed: bool
) -> None:
    newest = checkpoints(config)[-1]
    if not sealed:
        unseal(config)
        if name == "complete.json":
            return
    work = RunFolder(config.output)
    identity = json.loads((work.path / "identity.json").read_text())
    before = sorted(work.path.rglob("*"))
    with unreadable(newest / name, number=number), pytest.raises(SempaError, match="at this moment") as caught:
        work.open(identity, resume=True, overwrite=False)
    assert str(newest / name) in str(caught.value)
    assert os.strerror(number) in str(caught.value)
    assert sorted(work.path.rglob("*")) == before
    work.open(identity, resume=True, overwrite=False)
    work.close()
    assert work.last_checkpoint() == str(newest)


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_run_that_breaks_off_keeps_checkpoints_that_cannot_be_read(config: TrainConfig, whole_folder: bool) -> None:
    work, found = RunFolder(config.output), checkpoints(config)
    files = [work.checkpoints] if whole_folder else [path / "optimizer.pt" for path in found]
    with unreadable(*files):
        assert os.strerror(errno.EIO) in str(work.after_interruption())
    assert checkpoints(config) == found
    assert "with --resume to continue" in str(work.after_interruption())
    no_checkpoint(work.path)
    assert work.after_interruption() is None
    assert not work.path.exists()


def test_damaged_checkpoints_are_set_aside(config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    older, newest = checkpoints(config)
    aside = newest.with_name("damaged-checkpoint-6")
    aside.mkdir()
    (aside / "earlier").touch()
    DAMAGES["halved"](newest / "optimizer.pt")
    work = RunFolder(config.output)
    work.open(json.loads((work.path / "identity.json").read_text()), resume=True, overwrite=False)
    work.close()
    assert checkpoints(config) == [older]
    assert (aside / "optimizer.pt").stat().st_size
    assert not (aside / "earlier").exists()
    assert "and was renamed to damaged-checkpoint-6. Resuming from" in capsys.readouterr().err


def test_a_crash_at_the_very_end_is_gone_on_with(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise InterruptError

    config = make_config(tiny_base, tmp_path / "model", max_triplets=8)
    with monkeypatch.context() as patch, pytest.raises(InterruptError):
        patch.setattr(writing, "write_card", fail)
        train(config)
    assert not Path(config.output).exists()
    train(replace(config, resume=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}], ids=str)
def test_a_second_run_beside_a_running_one_is_refused(config: TrainConfig, flags: dict[str, bool]) -> None:
    first = RunFolder(config.output)
    first.open(json.loads((first.path / "identity.json").read_text()), resume=True, overwrite=False)
    before = sorted(path.name for path in first.path.rglob("*"))
    with pytest.raises(SempaError, match=rf"model is being trained by process {os.getpid()} at this moment"):
        train(replace(config, **flags))
    assert sorted(path.name for path in first.path.rglob("*")) == before
    first.close()
    first.check_free()


def test_an_output_that_appeared_meanwhile_is_not_trained_to(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run has finished between the look at the output and the lock."""
    run, take = RunFolder(config.output), RunFolder._take_lock

    def late(self: RunFolder) -> None:
        Path(config.output).mkdir()
        Path(config.output, "mine").touch()
        take(self)

    monkeypatch.setattr(RunFolder, "_take_lock", late)
    with pytest.raises(SempaError, match="model is not empty"):
        run.open({}, resume=False, overwrite=False)
    monkeypatch.undo()
    run.check_free()


def test_ctrl_c_on_a_refused_run_takes_nothing_from_the_first(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it comes: here where the first run started after the second one had looked."""
    first = RunFolder(config.output)
    gather = training.load_inputs

    def started_meanwhile(*args: Any) -> Any:
        first.open(json.loads((first.path / "identity.json").read_text()), resume=True, overwrite=False)
        no_checkpoint(first.path)  # the first has no checkpoint of its own yet
        return gather(*args)

    monkeypatch.setattr(training, "load_inputs", started_meanwhile)
    with pytest.raises(SempaError, match="being trained by process"):
        train(replace(config, overwrite=True))
    monkeypatch.setattr(training, "load_inputs", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(RunFolder, "check_free", lambda self: None)
    with pytest.raises(KeyboardInterrupt):
        train(replace(config, overwrite=True))
    assert (first.path / "identity.json").exists()
    first.close()


def test_a_killed_process_frees_its_output(tiny_base: Path, tmp_path: Path) -> None:
    """A process of its own that trains is named, and is no obstacle once it is dead."""
    config = make_config(tiny_base, tmp_path / "model", epochs=2)
    command = [
        sys.executable, "-m", "sempa_st", "train", "--base", str(tiny_base), "--data", "sample", "--dev", "sample",
        "--device", "cpu", "--dtype", "float32", "--output", config.output, "--epochs", "999", "--log-steps", "9",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        work = RunFolder(config.output)
        try:
            while not (work.path / "process.txt").exists():
                assert child.poll() is None
                time.sleep(0.1)
            with pytest.raises(SempaError, match=f"by process {child.pid} "):
                work.check_free()
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
    work.check_free()
    train(replace(config, epochs=1, max_triplets=8))  # it had no checkpoint yet, so nothing is in the way
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_kept_model_that_was_being_written_is_put_back(tmp_path: Path) -> None:
    work = RunFolder(tmp_path / "model")
    backup = work.models / ".samples-320.old-0123abcd"
    backup.mkdir(parents=True)
    (backup / "adapter_config.json").write_text("{}")
    with pytest.raises(SempaError, match="earlier run"):
        work.open({}, resume=False, overwrite=False)
    assert [path.name for path in work.models.iterdir()] == ["samples-320"]
    work.open({}, resume=False, overwrite=True)
    work.close()
