"""Help texts and completion scripts."""

from __future__ import annotations

import os
import pty
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from sempa_st.cli import build_parser
from sempa_st.cli.train import TRAIN_GROUPS
from sempa_st.training.config import TrainConfig

pytestmark = pytest.mark.names_dtype

Cli = Callable[..., tuple[int, str, str]]
COMMANDS = {
    "train", "sweep", "encode", "evaluate", "compare", "table", "generation", "analyze", "tokens", "copy",
    "average", "demo",
}  # fmt: skip
SEMPA = [sys.executable, "-m", "sempa_st"]
ESCAPE = "\x1b["


def on_terminal(*argv: str) -> str:
    """Return what a command prints on a terminal of its own."""
    master, slave = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    with subprocess.Popen([*SEMPA, *argv], stdout=slave, env={**environment, "TERM": "xterm-256color"}) as process:
        os.close(slave)
        printed = b""
        try:
            while chunk := os.read(master, 1 << 16):
                printed += chunk
        except OSError:  # Linux reports the end of a terminal's output as an error
            pass
        finally:
            os.close(master)
    assert process.returncode == 0
    return printed.decode()


@pytest.mark.parametrize("argv", [["--help"], ["encode", "--help"]])
def test_help_is_coloured_on_a_terminal_only(argv: list[str]) -> None:
    piped = subprocess.run([*SEMPA, *argv], capture_output=True, text=True, check=True).stdout
    assert piped.startswith("usage: sempa")
    assert ESCAPE not in piped
    assert ESCAPE in on_terminal(*argv)


def test_the_parser_needs_no_library_of_the_help() -> None:
    code = (
        "import sys; from sempa_st.cli import build_parser; build_parser(); "
        "print([name for name in ('rich', 'rich_argparse', 'shtab') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_shows_examples_that_its_parser_takes(run_cli: Cli, name: str) -> None:
    code, out, _ = run_cli(name, "--help")
    assert code == 0
    examples = out.partition("\nexamples:\n")[2].splitlines()
    assert examples
    for example in examples:
        program, *argv = shlex.split(example)
        assert program == "sempa"
        assert build_parser().parse_args(argv)


def test_every_option_of_a_training_run_has_one_heading() -> None:
    grouped = [name for names in TRAIN_GROUPS.values() for name in names]
    assert sorted(grouped) == sorted(item.name for item in fields(TrainConfig))


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_the_completion_script_names_every_command(run_cli: Cli, shell: str) -> None:
    code, script, _ = run_cli("--print-completion", shell)
    assert code == 0
    assert all(name in script for name in COMMANDS)


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash here")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["eval"], ["evaluate"]),
        (["encode", "--skip"], ["--skip-bad-rows"]),
        (["encode", "--reader", ""], ["sempa", "native"]),
        (["encode", "model", "sent"], ["sentences.txt"]),
    ],
)
def test_bash_completes(run_cli: Cli, tmp_path: Path, words: list[str], completed: list[str]) -> None:
    (tmp_path / "complete.sh").write_text(run_cli("--print-completion", "bash")[1])
    (tmp_path / "sentences.txt").touch()
    script = (
        'source complete.sh; COMP_WORDS=(sempa "$@"); COMP_CWORD=$#; _shtab_sempa; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    result = subprocess.run(["bash", "-c", script, "bash", *words], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout.split() == completed, result.stderr


def test_an_unknown_shell_is_refused(run_cli: Cli) -> None:
    code, out, err = run_cli("--print-completion", "cmd")
    assert (code, out) == (2, "")
    assert "choose from 'bash', 'zsh', 'tcsh'" in err


@pytest.mark.parametrize(
    ("argv", "near"),
    [
        (["encod", "model", "x.txt"], "encode for encod"),
        (["train", "--obective", "dpo", "--output", "x", "--base", "b", "--data", "d"], "--objective for --obective"),
        (["train", "--obective=dpo"], "--objective for --obective"),  # beside what argparse misses
        (["encode", "model", "x.txt", "--ouput", "v.npy"], "--output for --ouput"),
        (["copy", "a", "b", "--merg", "--actvate"], "--activate for --actvate"),  # --merg is short for --merge
        (["--verison"], "--version for --verison"),
    ],
)
def test_the_nearest_name_is_told(run_cli: Cli, argv: list[str], near: str) -> None:
    code, out, err = run_cli(*argv)
    assert (code, out) == (2, "")
    assert err.rstrip().endswith(f"; did you mean {near}?")


def test_names_that_are_near_to_nothing(run_cli: Cli) -> None:
    for argv in (["copy", "a", "b", "--xyzzy", "1"], ["xyzzy"]):
        code, _, err = run_cli(*argv)
        assert code == 2
        assert "xyzzy" in err
        assert "did you mean" not in err
