"""The command ``sempa table``: its flags, and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sempa_st.cli.arguments import add_batch_size, add_command
from sempa_st.errors import SempaError
from sempa_st.model.gemma import EMBEDDED_BASE
from sempa_st.utils.devices import DTYPES
from sempa_st.utils.tables import table

_ALL = "all"


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command, except ``--batch-size``."""
    parser.add_argument(
        "--base", default=EMBEDDED_BASE, help="base that the methods are applied to (default: %(default)s)"
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        default=[_ALL],
        metavar="NAME[:SETTING=VALUE...]",
        help="methods to score on the base (default: all of them, as they come)",
    )
    parser.add_argument(
        "--models",
        nargs="*",
        default=[],
        metavar="MODEL",
        help="SemPA folders, shipped or any ST models",
    )
    parser.add_argument("--data-dir", help="folder with sts/*.parquet, instead of the Hub (or set SEMPA_DATA_DIR)")
    parser.add_argument("--output", required=True, help="folder of the table; the same command goes on with it")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="default: auto")
    parser.add_argument("--device", help="cpu, cuda, ...; the best there is by default")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")


def table_command(args: argparse.Namespace) -> None:
    """Score the systems, print the table and write it.

    Raises:
        SempaError: On a model, method or data that cannot be used.
    """
    from sempa_st.data.sts import data_dir_or_default
    from sempa_st.evaluation.table import COLUMNS, System, lines_of, score_systems, write_tables
    from sempa_st.folder.resolve import find_model
    from sempa_st.methods.registry import methods_for, parse_method

    encoder = find_model(args.base, for_method=True).takes_encoder_methods
    methods = methods_for(encoders=encoder) if args.methods == [_ALL] else args.methods
    systems = [*(System(args.base, method) for method in methods), *(System(model) for model in args.models)]
    if not systems:
        raise SempaError("There is nothing to score. Name --methods or --models.")
    # What can be refused is refused before hours of work.
    for method in methods:
        if parse_method(method).for_encoders != encoder:
            raise SempaError(
                f"The method {method!r} does not apply to {args.base}. Expected some of: "
                f"{', '.join(methods_for(encoders=encoder))}."
            )
    for model in args.models:
        find_model(model)
    output = Path(args.output)
    found = score_systems(
        systems,
        output,
        data_dir=data_dir_or_default(args.data_dir),
        dtype=args.dtype,
        device=args.device,
        batch_size=args.batch_size,
    )
    write_tables(output, found)
    if args.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return
    lines = [["" if cell is None else cell for cell in line] for line in lines_of(found)]
    print(table(COLUMNS, lines))
    print(f"Wrote table.md, table.csv and table.json to {output}.")


def add_table(commands: Any) -> None:
    """Add ``sempa table``."""
    parser = add_command(
        commands, "table", table_command, "Score methods and models on the seven STS sets, side by side."
    )
    add_table_options(parser)
    add_batch_size(parser)
