"""The command ``sempa table``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sempa_st.cli.arguments import add_batch_size, add_command, add_compute_options, add_data_dir
from sempa_st.errors import SempaError
from sempa_st.model.embedded import EMBEDDED_BASE
from sempa_st.utils.tables import table

_ALL = "all"


def add(commands: Any) -> None:
    """Add ``sempa table``."""
    parser = add_command(
        commands,
        "table",
        _table,
        "Score methods and models on the seven STS tasks, side by side.",
        examples=("--output table", "--methods mean prompteol:layer=-2 --models runs/best --output table"),
        kept=lambda args: f"Scores so far are kept in {Path(args.output, 'systems')}. Run the same command to go on.",
    )
    parser.add_argument(
        "--base", default=EMBEDDED_BASE, help="base that the methods are applied to (default: %(default)s)"
    )
    parser.add_argument(
        "--methods",
        nargs="*",
        default=[_ALL],
        metavar="NAME[:SETTING=VALUE...]",
        help="methods to score on the base (default: all, with their own settings)",
    )
    parser.add_argument(
        "--models",
        nargs="*",
        default=[],
        metavar="MODEL",
        help="models to score: shipped ones, SemPA folders or any sentence-transformers models",
    )
    add_data_dir(parser)
    parser.add_argument("--output", required=True, help="folder of the table; the same command continues it")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    add_batch_size(add_compute_options(parser))


def _table(args: argparse.Namespace) -> None:
    from sempa_st.evaluation.table import COLUMNS, System, lines_of, score_systems, write_tables
    from sempa_st.folder.resolve import find_model
    from sempa_st.loading import check_method
    from sempa_st.methods.registry import methods_for
    from sempa_st.utils.files import lock_beside, locked

    source = find_model(args.base, for_method=True)
    methods = methods_for(encoders=source.takes_encoder_methods) if args.methods == [_ALL] else args.methods
    systems = [*(System(args.base, method) for method in methods), *(System(model) for model in args.models)]
    if not systems:
        raise SempaError("There is nothing to score. Name --methods or --models.")
    # Check every request before hours of work.
    for method in methods:
        check_method(source, method)
    for model in args.models:
        find_model(model)
    output = Path(args.output)
    # Another one would take half of this one's scores for an interrupted run's.
    running = f"Another table is being made in {output}. Wait for it, or choose another --output."
    with locked(lock_beside(output.resolve()), running, "tables"):
        results = score_systems(
            systems,
            output,
            data_dir=args.data_dir,
            dtype=args.dtype,
            device=args.device,
            batch_size=args.batch_size,
        )
        write_tables(output, results)
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    print(table(COLUMNS, lines_of(results)))
    print(f"Wrote table.md, table.csv and table.json to {output}.")
