"""The commands ``sempa copy`` and ``sempa average``, which make a model folder from others."""

from __future__ import annotations

import argparse
from typing import Any

from sempa_st.cli.arguments import add_base, add_command, given
from sempa_st.model.templates import EMBEDDING_TEMPLATES
from sempa_st.utils.devices import DTYPES


def add(commands: Any) -> None:
    """Add ``sempa copy`` and ``sempa average``."""
    _add_copy(commands)
    _add_average(commands)


def _add_copy(commands: Any) -> None:
    parser = add_command(
        commands,
        "copy",
        _copy,
        "Copy a model for use on this machine, in another format, merged or scaled.",
        examples=("sempa-gemma3-270m models/gemma", "runs/best models/merged --merge --dtype bfloat16"),
    )
    parser.add_argument("model", help="shipped model, SemPA folder or Hub id, or a base (copied without an adapter)")
    parser.add_argument("output", help="folder to write")
    parser.add_argument(
        "--format",
        choices=("native", "custom", "server"),
        help="format of the copy (default: the source's); server: merged, for text-embeddings-inference and vLLM",
    )
    add_base(parser)
    parser.add_argument("--template", choices=tuple(EMBEDDING_TEMPLATES), help="embedding template of a bare base")
    _add_overwrite(parser)
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--merge", action="store_true", help="merge the adapter and write a full model")
    adapter.add_argument("--dtype", default="float32", choices=DTYPES[1:], help="type of the merged weights")
    adapter.add_argument(
        "--activate",
        action="store_true",
        help="make a plain adapter act on sentences under the template only; other text gets the base's exact output",
    )
    adapter.add_argument("--scale", type=float, default=1.0, metavar="X", help="factor for the adapter's update")


def _add_average(commands: Any) -> None:
    parser = add_command(
        commands,
        "average",
        _average,
        "Average the adapters' updates of several models into one model.",
        examples=("runs/seed1 runs/seed2 --output runs/mean", "runs/seed1 runs/seed2 --output runs/mean --rank 8"),
    )
    parser.add_argument("models", nargs="+", metavar="model", help="shipped model, SemPA folder or Hub id")
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument("--rank", type=int, help="rank to reduce the mean to (default: the sum of the models' ranks)")
    _add_overwrite(parser)


def _add_overwrite(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace the output folder")


def _copy(args: argparse.Namespace) -> None:
    from sempa_st.folder.copying import copy_model

    print(f"Wrote {copy_model(**given(args))}.")


def _average(args: argparse.Namespace) -> None:
    from sempa_st.folder.averaging import average_models

    print(f"Wrote {average_models(**given(args))}.")
