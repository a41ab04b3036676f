"""Options that several commands share, and the model that they name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sempa_st.errors import SempaError
from sempa_st.model.gemma import EMBEDDED_BASE
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.utils.devices import DTYPES


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str
) -> argparse.ArgumentParser:
    """Add a command to the parser, with the options that all commands have."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(command=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and libraries' warnings")
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model and say how it is read."""
    parser.add_argument(
        "model",
        help=f"shipped model (sempa-{EMBEDDED_BASE}), SemPA folder or Hub id, base ({EMBEDDED_BASE}, folder, Hub id), "
        "any ST model, or (with --method) a bare LoRA adapter",
    )
    parser.add_argument("--template", choices=tuple(EMBEDDING_TEMPLATES), help="template of a bare base")
    parser.add_argument(
        "--method",
        metavar="NAME[:SETTING=VALUE...]",
        help="another way to embed with a decoder: mean, last-token, prompteol, pretended-cot, knowledge-enhancement, "
        "echo, contrastive-prompting, token-prepending, llm2vec; with an encoder: bert-avg, promptbert",
    )
    parser.add_argument("--layer", type=int, help="whose output the method reads: -1 the last, ... (default: its own)")
    parser.add_argument("--base", help="base to use instead of the one that the adapter names")
    parser.add_argument("--reader", default="sempa", choices=("sempa", "native"), help="our module, or plain ST")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="default: auto")
    parser.add_argument("--device", help="cpu, cuda, ...; the best there is by default")
    parser.add_argument("--int8", action="store_true", help="round products to integers: faster on a CPU, not exact")
    add_batch_size(parser)


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """Add ``--batch-size``."""
    parser.add_argument(
        "--batch-size",
        type=positive,
        default=32,
        help="sentences a batch; more of short ones, where rows are run in packs (default: 32)",
    )


def positive(text: str) -> int:
    """Return a whole number above 0, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0")
    return value


def load_model(args: argparse.Namespace) -> Any:
    """Load the model that the options name."""
    from sempa_st.loading import load

    return load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        template=args.template,
        base=args.base,
        reader=args.reader,
        method=method_of(args),
        int8=args.int8,
    )


def method_of(args: argparse.Namespace) -> str | None:
    """Return the ``--method``, with ``--layer`` as one of its settings."""
    method: str | None = args.method
    if args.layer is None:
        return method
    if method is None:
        raise SempaError("--layer is for a --method, such as --method prompteol.")
    return f"{method}:layer={args.layer}"
