"""The command line ``sempa``: one parser, and error messages. Each command imports heavy libraries when it runs."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from logging import getLogger
from typing import Any

from sempa_st import __version__
from sempa_st.cli import (
    analyze,
    compare,
    copy,
    demo,
    encode,
    evaluate,
    generation,
    hub,
    mteb,
    serve,
    sweep,
    table,
    tokens,
    train,
)
from sempa_st.cli.arguments import CommandParser, PrintCompletion
from sempa_st.errors import SempaError, first_line, is_panic
from sempa_st.utils.leftovers import unwritable_reason

_EXIT_UNEXPECTED = 1
_EXIT_BAD_INPUT = 2
_EXIT_INTERRUPTED = 130
_EXIT_TERMINATED = 143
_MAX_MESSAGE, _MESSAGE_END = 1900, 500
"""Characters shown of an error's message, and how many of them are its last ones, which say what to do."""


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which a scheduler sends before it kills: the command ends as by Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; those of this process when None.

    Returns:
        Exit code: 0, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM, 1 for any other error. An error is one paragraph
        on standard error.
    """
    args = build_parser().parse_args(argv)
    try:
        with _sigterm_interrupts(), nullcontext() if args.debug else quiet_libraries():
            command: Callable[[argparse.Namespace], None] = args.command
            command(args)
    except BaseException as error:
        if args.debug or not (isinstance(error, Exception | KeyboardInterrupt) or is_panic(error)):
            raise
        return _report(error, args)
    return 0


def _report(error: BaseException, args: argparse.Namespace) -> int:
    """Print an error as one paragraph, in one process only, and return the exit code."""
    if isinstance(error, SempaError | OSError):
        message, code = str(error), _EXIT_BAD_INPUT
    elif is_panic(error):
        message = (
            f"A library gave up ({first_line(error)}), as tokenizers does where the files of a tokenizer are damaged "
            "or one of its expressions takes too long. Restore or download the model again, or take other sentences."
        )
        code = _EXIT_BAD_INPUT
    elif reason := unwritable_reason(error):  # such as safetensors' own error for a full disk
        message, code = f"What the command was writing could not be written ({reason}).", _EXIT_BAD_INPUT
    elif isinstance(error, KeyboardInterrupt):
        message = f"interrupted. {args.kept(args)}"
        code = _EXIT_TERMINATED if isinstance(error, _Terminated) else _EXIT_INTERRUPTED
    else:
        message = f"{type(error).__name__}: {error} (unexpected; --debug shows the traceback)"
        code = _EXIT_UNEXPECTED
    if os.environ.get("RANK", "0") == "0":
        print(f"sempa: {_paragraph(message)}", file=sys.stderr)
    return code


def _paragraph(message: str) -> str:
    """Return a message as one line that a terminal shows as it is: files bring control characters and endless names."""
    line = " ".join(message.split())
    if len(line) > _MAX_MESSAGE:
        line = f"{line[: _MAX_MESSAGE - _MESSAGE_END]} [...] {line[-_MESSAGE_END:]}"
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in line)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = CommandParser(
        prog="sempa",
        description="Sentence embeddings from an LLM that keeps generating.",
        epilog="examples:\n  sempa demo\n  sempa encode --help\n  sempa --print-completion bash > ~/.sempa-completion",
    )
    parser.add_argument("--version", action="version", version=f"sempa-st {__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        default=argparse.SUPPRESS,
        help="print a shell's completion script, to be sourced by it",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (
        train,
        sweep,
        encode,
        serve,
        evaluate,
        compare,
        table,
        generation,
        mteb,
        analyze,
        tokens,
        copy,
        hub,
        demo,
    ):
        command.add(commands)
    return parser


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Make SIGTERM end this process as Ctrl-C does within the block, unless the program has a handler of its own.

    A process that is forked within the block dies of SIGTERM as it would without it.
    """
    on_main_thread = threading.current_thread() is threading.main_thread()
    if not on_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    process = os.getpid()

    def interrupt(number: int, _: Any) -> None:
        if os.getpid() == process:
            raise _Terminated
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the libraries' warnings, log lines and progress bars within the block; errors and ours are still shown.

    Downloads show their bars.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # for processes that are started, too
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # PEFT imports it, and on some processors it asks for a package that nothing here needs.
    bitsandbytes = getLogger("bitsandbytes")
    level = bitsandbytes.level
    bitsandbytes.setLevel(logging.ERROR)
    if verbosity < logging.ERROR:
        logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        bitsandbytes.setLevel(level)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
