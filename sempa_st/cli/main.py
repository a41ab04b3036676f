"""The command line ``sempa``: parser and thin commands; what is heavy is imported inside the commands."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from sempa_st import __version__
from sempa_st.cli.copy import add_average, add_copy
from sempa_st.cli.demo import add_demo
from sempa_st.cli.encode import add_encode
from sempa_st.cli.evaluate import add_evaluate
from sempa_st.cli.generation import add_generation
from sempa_st.cli.sweep import add_sweep
from sempa_st.cli.table import add_table
from sempa_st.cli.train import add_train
from sempa_st.errors import SempaError

_EXIT_UNFORESEEN = 1
_EXIT_BAD_INPUT = 2
_EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for bad input (one paragraph on standard error), 130 for Ctrl-C, or 1."""
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            silence_libraries(args.debug)
            command: Callable[[argparse.Namespace], None] = args.command
            command(args)
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            raise
        return _report(error)
    return 0


def _report(error: BaseException) -> int:
    """Print one paragraph on an error, from one process only, and return the exit code."""
    if isinstance(error, SempaError | OSError):
        message, code = str(error), _EXIT_BAD_INPUT
    elif isinstance(error, KeyboardInterrupt):
        message, code = "interrupted", _EXIT_INTERRUPTED
    else:
        message = f"{type(error).__name__}: {error} (not an error we foresaw; --debug shows where it comes from)"
        code = _EXIT_UNFORESEEN
    if os.environ.get("RANK", "0") == "0":
        print(f"sempa: {' '.join(message.split())}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="sempa", description="Sentence embeddings from an LLM that keeps generating.")
    parser.add_argument("--version", action="version", version=f"sempa-st {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        add_train,
        add_sweep,
        add_encode,
        add_evaluate,
        add_table,
        add_generation,
        add_copy,
        add_average,
        add_demo,
    ):
        add(commands)
    return parser


def silence_libraries(debug: bool) -> None:
    """Silence the libraries' chatter for this process; our own messages and their errors stay."""
    if debug:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
