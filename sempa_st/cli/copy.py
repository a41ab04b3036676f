"""The commands ``sempa copy`` and ``sempa average``, which make a model folder of others."""

from __future__ import annotations

import argparse
from typing import Any

from sempa_st.cli.arguments import add_command
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.utils.devices import DTYPES


def add_copy_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sempa copy``."""
    parser.add_argument("model", help="shipped model, SemPA folder, Hub id, or a base (which becomes such a folder)")
    parser.add_argument("output", help="folder to write")
    parser.add_argument("--format", choices=("native", "custom"), help="format of the copy (default: the source's)")
    parser.add_argument("--merge", action="store_true", help="write a full model with the adapter merged in")
    parser.add_argument(
        "--activate",
        action="store_true",
        help="let a plain adapter act on sentences under the template only; other text gets the base's exact output",
    )
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="multiply the adapter's update by this")
    parser.add_argument("--dtype", default="float32", choices=DTYPES[1:], help="type of merged weights")
    parser.add_argument("--base", help="base to use instead of the one that the adapter names")
    parser.add_argument("--template", choices=tuple(EMBEDDING_TEMPLATES), help="template of a bare base")
    _add_overwrite(parser)


def add_average_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``sempa average``."""
    parser.add_argument("models", nargs="+", metavar="model", help="shipped model, SemPA folder or Hub id")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--rank", type=int, help="rank to cut the mean to (default: the sum of the models' ranks)")
    _add_overwrite(parser)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what stands at the output folder")


def copy_command(args: argparse.Namespace) -> None:
    """Copy a model and say where to.

    Raises:
        SempaError: As :func:`sempa_st.folder.copying.copy_model` does.
    """
    from sempa_st.folder.copying import copy_model

    path = copy_model(
        args.model,
        args.output,
        format=args.format,
        merge=args.merge,
        activate=args.activate,
        scale=args.scale,
        dtype=args.dtype,
        base=args.base,
        template=args.template,
        overwrite=args.overwrite,
    )
    print(f"Wrote {path}.")


def average_command(args: argparse.Namespace) -> None:
    """Average models and say where to.

    Raises:
        SempaError: As :func:`sempa_st.folder.averaging.average_models` does.
    """
    from sempa_st.folder.averaging import average_models

    path = average_models(args.models, args.output, rank=args.rank, overwrite=args.overwrite)
    print(f"Wrote {path}.")


def add_copy(commands: Any) -> None:
    """Add ``sempa copy``."""
    parser = add_command(
        commands,
        "copy",
        copy_command,
        "Copy a model to work here: after a move, in the other format, or merged.",
    )
    add_copy_options(parser)


def add_average(commands: Any) -> None:
    """Add ``sempa average``."""
    parser = add_command(
        commands, "average", average_command, "Make one model of several: the mean of their adapters' updates."
    )
    add_average_options(parser)
