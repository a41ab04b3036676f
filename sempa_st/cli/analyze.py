"""The command ``sempa analyze``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sempa_st.analysis.settings import AnalysisSettings
from sempa_st.cli.arguments import add_command
from sempa_st.utils.options import add_options, option_values, split_list

_GROUPS = {
    "settings": ("sentences", "share", "k", "seed"),
    "training (part templates)": ("cell_triplets", "cell_seeds", "cell_pairs"),
    "compute": ("batch_size", "dtype", "device"),
}


def add(commands: Any) -> None:
    """Add ``sempa analyze``."""
    parser = add_command(
        commands,
        "analyze",
        _analyze,
        "Compare how models embed, in a report with tables and pictures.",
        examples=(
            "gemma3-270m sempa-gemma3-270m --output report",
            "mean:gemma3-270m sempa-gemma3-270m --only geometry,gar --sentences 1000 --output report",
        ),
        kept=lambda args: f"Finished parts are kept in {Path(args.output, 'parts')}. Run the same command to go on.",
    )
    add_models(parser)
    parser.add_argument("--output", required=True, help="folder of the report; the same command continues it")
    parser.add_argument("--only", metavar="PART,...", help="comma-separated parts to run (default: all but templates)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--data-dir",
        help="folder with nli/triplets.parquet and sts/*.parquet (default: $SEMPA_DATA_DIR, else the shipped samples)",
    )
    parser.add_argument("--corpus", metavar="FILE", help="file with the sentences to measure on, instead of the data's")
    parser.add_argument(
        "--records",
        nargs="+",
        default=[],
        metavar="PATH",
        help="run folders, and JSON files of sempa evaluate, table or generation, for the curve and the frontier",
    )
    add_options(parser, AnalysisSettings, groups=_GROUPS)


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the models to compare."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="models to compare, as for sempa encode, or METHOD:MODEL to embed by a method, such as mean:gemma3-270m",
    )


def _analyze(args: argparse.Namespace) -> None:
    from sempa_st.analysis.run import REPORT, analyze
    from sempa_st.data.sts import data_dir_or_default

    results = analyze(
        args.models,
        args.output,
        data_dir=data_dir_or_default(args.data_dir),
        only=split_list(args.only) if args.only is not None else None,
        corpus=args.corpus,
        records=args.records,
        **option_values(AnalysisSettings, vars(args)),
    )
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    print(f"Wrote {', '.join(results['parts'])} of {len(args.models)} model(s) to {Path(args.output) / REPORT}.")
