"""The parser of all commands, and the options that several of them share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from sempa_st.errors import SempaError
from sempa_st.model.embedded import EMBEDDED_BASE
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.utils.devices import DTYPES

NOTHING_KEPT = "Nothing was kept."
"""What to say of an interrupted command whose output appears whole, at the end."""


class CommandParser(argparse.ArgumentParser):
    """Argument parser that names the nearest command or flag for one that it does not know.

    Its help is coloured on a terminal, and plain text in a pipe or file.
    """

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse all arguments of a command, whose own parser knows its flags; nothing is left over."""
        self._words = sys.argv[1:] if args is None else args
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Print the message, and the nearest names of what is not known, and end with exit code 2."""
        near = [f"{match} for {word}" for word, known in self._unknown() for match in get_close_matches(word, known, 1)]
        super().error(f"{message}; did you mean {', '.join(near)}?" if near else message)

    def _unknown(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each command and flag that was given and is not known, with those that are."""
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        commands = [name for action in self._actions if isinstance(action.choices, dict) for name in action.choices]
        names = (word.partition("=")[0] for word in self._words)
        for name in dict.fromkeys(names):
            if name.startswith("--") and len(name) > 2:
                if not any(flag.startswith(name) for flag in flags):
                    yield name, flags
            elif commands and not name.startswith("-"):
                if name not in commands:
                    yield name, commands
                return  # what follows a command is its own

    def format_help(self) -> str:
        """Return the help text."""
        # Set here because argparse builds a formatter for each option that is added, and rich takes 0.1 s to import.
        self.formatter_class = _coloured_formatter() if sys.stdout.isatty() else argparse.RawDescriptionHelpFormatter
        return super().format_help()


def _coloured_formatter() -> type[argparse.HelpFormatter]:
    from rich_argparse import RawDescriptionRichHelpFormatter

    class Formatter(RawDescriptionRichHelpFormatter):
        group_name_formatter = str  # as in the plain help
        help_markup = text_markup = False  # brackets are text

    return Formatter


class PrintCompletion(argparse.Action):
    """Option that prints a shell's completion script and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        """Print the script for the shell that the option names."""
        import shtab

        _namespace, shell, *_ = given
        commands = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
        for command in commands.values():
            for action in command._actions:
                if action.nargs != 0 and action.choices is None:
                    action.complete = shtab.FILE  # models and data are names or paths
        print(shtab.complete(parser, shell))
        parser.exit()


def add_command(
    commands: Any,
    name: str,
    run: Callable[[argparse.Namespace], None],
    help: str,
    *,
    examples: Sequence[str],
    kept: Callable[[argparse.Namespace], str] = lambda args: NOTHING_KEPT,
) -> argparse.ArgumentParser:
    """Add a command to the parser, with the options that all commands have.

    Args:
        commands: Where to add it: what ``add_subparsers`` returned.
        name: Name of the command.
        run: Function that runs it.
        help: One sentence on what it does.
        examples: Arguments to show under the help, each after ``sempa NAME``.
        kept: Says what an interrupted run has left, and how to go on.
    """
    lines = [f"  sempa {name} {example}".rstrip() for example in examples]
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=help, epilog="\n".join(["examples:", *lines])
    )
    parser.set_defaults(command=run, kept=kept)
    parser.add_argument("--debug", action="store_true", help="show the traceback of errors, and libraries' warnings")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model and say how to read it."""
    parser.add_argument(
        "model",
        help=f"shipped model (sempa-{EMBEDDED_BASE}), SemPA folder or Hub id, base ({EMBEDDED_BASE}, folder, Hub id), "
        "any sentence-transformers model, or (with --method) a bare LoRA adapter",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--template", choices=tuple(EMBEDDING_TEMPLATES), help="embedding template of a bare base")
    model.add_argument(
        "--method",
        metavar="NAME[:SETTING=VALUE...]",
        help="embed by another method. For a decoder: mean, last-token, prompteol, pretended-cot, "
        "knowledge-enhancement, echo, contrastive-prompting, token-prepending, llm2vec; for an encoder: bert-avg, "
        "promptbert",
    )
    model.add_argument(
        "--layer", type=int, help="layer whose output the method pools; -1 is the last (default: the method's own)"
    )
    add_base(model)
    model.add_argument(
        "--reader",
        default="sempa",
        choices=("sempa", "native"),
        help="sempa: this package's faster module; native: plain sentence-transformers (default: sempa)",
    )
    compute = add_compute_options(parser)
    compute.add_argument("--int8", action="store_true", help="multiply in int8: faster on a CPU, not exact")
    add_batch_size(compute)


def add_base(parser: Any) -> None:
    """Add ``--base``, which replaces the base that an adapter names."""
    parser.add_argument("--base", help="base to use instead of the one that the adapter names")


def add_compute_options(parser: argparse.ArgumentParser) -> Any:
    """Add ``--dtype`` and ``--device`` in a group, and return the group."""
    group = parser.add_argument_group("compute")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="floating-point type (default: auto)")
    group.add_argument("--device", help="cpu, cuda, ... (default: the fastest available)")
    return group


def add_batch_size(parser: Any, help: str = "sentences per batch; more when they are short and are packed") -> None:
    """Add ``--batch-size``."""
    parser.add_argument("--batch-size", type=positive, default=32, help=f"{help} (default: 32)")


def add_data_dir(parser: Any, files: str = "sts/*.parquet") -> None:
    """Add ``--data-dir``, a folder with ``files``."""
    parser.add_argument("--data-dir", help=f"folder with {files}, to use instead of the Hub (default: $SEMPA_DATA_DIR)")


def positive(text: str) -> int:
    """Return an integer above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0")
    return value


def given(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a command by name, as arguments of the function that it calls.

    ``--layer`` becomes one of the settings of ``--method``.

    Raises:
        SempaError: If there is a layer and no method.
    """
    options = {name: value for name, value in vars(args).items() if name not in ("command", "debug", "kept")}
    layer = options.pop("layer", None)
    if layer is not None:
        if options["method"] is None:
            raise SempaError("--layer is for a --method, such as --method prompteol.")
        options["method"] += f":layer={layer}"
    return options
