"""What a person at the keyboard sees: no chatter of libraries, and after Ctrl-C what was kept and how to go on."""

from __future__ import annotations

import os
import re
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import sample_sentences, save_sts
from safetensors import SafetensorError
from transformers.utils import logging

from sempa_st.encoding import shard_writer
from sempa_st.errors import SempaError
from sempa_st.forward.sentence_transformers import SentenceTransformer
from sempa_st.training.run import explain_interruption

pytestmark = pytest.mark.names_dtype
Cli = Callable[..., tuple[int, str, str]]
CPU = ("--device", "cpu", "--dtype", "float32")
_OWN = re.compile(r"(encode|texts|Batches|train|reference): .*|after \d+ pairs: dev Spearman [-\d.]+|\s*")
"""Lines that are meant: progress bars, that of an embedded split included, and the dev score of a checkpoint."""


@pytest.fixture(autouse=True)
def at_the_keyboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the libraries as they are in a process of its own, whatever tests before have set."""
    logging.enable_progress_bar()
    logging.set_verbosity_warning()


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    (tmp_path / "s.txt").write_text("\n".join(sample_sentences()[:6]))
    return tmp_path / "s.txt"


def chatter(err: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", err) if not _OWN.fullmatch(line)]


def train_arguments(base: Path, output: Path) -> list[object]:
    return [
        *("train", "--base", base, "--data", "sample", "--dev", "sample", "--max-triplets", 8, "--batch-size", 4),
        *("--gradient-accumulation", 1, "--checkpoint-samples", 4, "--output", output, *CPU),
    ]


def test_commands_show_their_own_bars_only(
    run_cli: Cli, adapter_folder: Path, tiny_base: Path, tmp_path: Path, text_file: Path
) -> None:
    save_sts(tmp_path)
    runs: list[list[object]] = [
        ["encode", adapter_folder, text_file, "--output", tmp_path / "v.npy", *CPU],
        ["copy", adapter_folder, tmp_path / "merged", "--merge"],
        train_arguments(tiny_base, tmp_path / "trained"),
        [
            *("evaluate", adapter_folder, "--tasks", "STSBenchmark", "--data-dir", tmp_path),
            *("--output", tmp_path / "results", *CPU),
        ],
    ]
    for argv in runs:
        code, _, err = run_cli(*argv)
        assert code == 0, err
        assert chatter(err) == [], argv[0]
    assert logging.is_progress_bar_enabled()  # the library stays as it was
    assert logging.get_verbosity() == logging.WARNING


def test_debug_shows_the_libraries(run_cli: Cli, adapter_folder: Path, tmp_path: Path) -> None:
    code, _, err = run_cli("copy", adapter_folder, tmp_path / "merged", "--merge", "--debug")
    assert code == 0
    assert any("Loading weights" in line for line in chatter(err))


def test_an_interrupted_encoding_names_its_shards(
    run_cli: Cli, adapter_folder: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["encode", adapter_folder, text_file, "--output", tmp_path / "v.npy", "--shard-size", 2, *CPU]
    original, calls = SentenceTransformer.encode, [0]

    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == stop:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(shard_writer, "WINDOW", 2)
    monkeypatch.setattr(SentenceTransformer, "encode", encode)
    stop = 1
    code, _, err = run_cli(*argv)
    assert code == 130
    assert err.splitlines()[-1] == "sempa: interrupted. Nothing was kept."
    assert not (tmp_path / "v.npy.encoding").exists()
    calls[0], stop = 0, 3
    code, _, err = run_cli(*argv)
    assert code == 130
    kept = f"2 shard(s) are kept in {tmp_path / 'v.npy.encoding'}. Run the same command to go on."
    assert err.splitlines()[-1] == f"sempa: interrupted. {kept}"
    calls[0], stop = 0, 0
    assert run_cli(*argv)[0] == 0
    assert calls[0] == 1


@pytest.mark.parametrize("checkpoint", [False, True])
def test_an_interrupted_training_names_resume(
    run_cli: Cli, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint: bool
) -> None:
    from sempa_st.training.callbacks import PairProgress

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step > checkpoint:
            raise KeyboardInterrupt

    argv = train_arguments(tiny_base, tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(PairProgress, "on_step_end", stop)
        code, _, err = run_cli(*argv)
    assert code == 130
    if not checkpoint:
        assert err.splitlines()[-1] == "sempa: interrupted. Nothing was kept."
        return
    assert f"The checkpoints are kept in {tmp_path / 'm.training'}. Run the same command with --resume" in err
    assert err.splitlines()[-1] == "sempa: interrupted. --resume goes on from the checkpoints."
    assert run_cli(*argv, "--resume")[0] == 0


@pytest.mark.parametrize(
    ("argv", "target", "kept"),
    [
        ("sweep --set lora_r=4,8 --base b --data sample --output OUT", "sempa_st.training.sweep.run_sweep", "in OUT."),
        ("table --methods mean --base BASE --output OUT", "sempa_st.evaluation.table.score_systems", "in OUT/systems."),
        ("analyze BASE --output OUT", "sempa_st.analysis.run.analyze", "in OUT/parts."),
        ("evaluate BASE --output OUT", "sempa_st.evaluation.sts.score_tasks", "in OUT/mteb."),
        ("generation BASE", "sempa_st.evaluation.generation.load_tasks", "Nothing was kept. Scores are written"),
        ("copy BASE OUT", "sempa_st.folder.copying.copy_model", "Nothing was kept."),
        ("push BASE me/x", "sempa_st.hub.push.push", "Large files that were sent stay on the Hub."),
    ],
)
def test_every_long_command_says_what_is_kept(
    run_cli: Cli, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: str, target: str, kept: str
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(target, interrupt)
    names = {"OUT": str(tmp_path / "out"), "BASE": str(tiny_base)}
    code, _, err = run_cli(*(names.get(word, word) for word in argv.split()))
    assert code == 130, err
    line = err.splitlines()[-1]
    assert line.startswith("sempa: interrupted. ")
    assert kept.replace("OUT", names["OUT"]) in line
    assert "Nothing" in kept or "Run the same command" in line


def test_sigterm_is_told_like_ctrl_c(
    run_cli: Cli, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr("sempa_st.folder.copying.copy_model", terminate)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    code, _, err = run_cli("copy", tiny_base, tmp_path / "out")
    assert (code, err.splitlines()[-1]) == (143, "sempa: interrupted. Nothing was kept.")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_full_disk_is_told_in_one_paragraph(
    run_cli: Cli, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("sempa_st.folder.copying.copy_model", full)
    code, _, err = run_cli("copy", tiny_base, tmp_path / "out")
    assert code == 2
    assert err.splitlines()[-1] == "sempa: What the command was writing could not be written (No space left on device)."


def test_a_forked_process_dies_of_sigterm(
    run_cli: Cli, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def fork(*args: object, **kwargs: object) -> None:
        ready, ready_writer = os.pipe()
        child = os.fork()
        if not child:
            os.write(ready_writer, b"x")
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)  # what comes while it is being forked is lost: Python clears it
        os.kill(child, signal.SIGTERM)
        found.append(os.waitpid(child, 0)[1])

    monkeypatch.setattr("sempa_st.folder.copying.copy_model", fork)
    run_cli("copy", tiny_base, tmp_path / "out")
    assert os.WIFSIGNALED(found[0]) and os.WTERMSIG(found[0]) == signal.SIGTERM


def test_a_handler_of_the_program_around_stays(
    run_cli: Cli, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: taken.append(number))
    monkeypatch.setattr("sempa_st.folder.copying.copy_model", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    try:
        run_cli("copy", tiny_base, tmp_path / "out")
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert taken == [signal.SIGTERM]


def test_a_run_within_a_sweep_does_not_name_resume(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        explain_interruption(lambda: "the sweep goes on"),
        explain_interruption(lambda: "--resume"),
    ):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "the sweep goes on\n"
    with pytest.raises(SempaError), explain_interruption(lambda: "--resume"):
        raise SempaError("x")
    assert capsys.readouterr().err == "--resume\n"


def test_commands_hide_warnings(run_cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def warn(**options: object) -> str:
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
        return "x"

    monkeypatch.setattr("sempa_st.folder.copying.copy_model", warn)
    assert run_cli("copy", "x", tmp_path / "y") == (0, "Wrote x.\n", "")
