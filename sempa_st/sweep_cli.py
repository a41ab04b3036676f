"""The command ``sempa sweep``: its flags, and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sempa_st.config import TrainConfig
from sempa_st.errors import SempaError
from sempa_st.grid import SWEEP_OWNED, make_points, read_grid
from sempa_st.options import add_options, option_values


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a sweep, and those of a training run for the settings that all of its runs share."""
    parser.add_argument(
        "--grid", metavar="FILE", help="YAML file: options and lists of values, or a list of such mappings"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="NAME=VALUE,...",
        help="one more option to vary, such as learning_rate=1e-4,2e-4; values that hold a comma go into --grid",
    )
    parser.add_argument("--output", required=True, help="folder of the sweep; the same command goes on with it")
    parser.add_argument("--keep-models", action="store_true", help="keep the model of every run, not only the best")
    parser.add_argument("--retry-failed", action="store_true", help="try again what has failed before")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    add_options(parser, TrainConfig, without=SWEEP_OWNED)


def sweep_command(args: argparse.Namespace) -> None:
    """Run ``sempa sweep``.

    Raises:
        SempaError: On a bad grid, settings, data or output folder, or if no run ends well.
    """
    fixed = option_values(TrainConfig, vars(args))
    for name in ("resume", "overwrite"):
        if name in fixed:
            raise SempaError(f"The config file {args.config} sets {name}, which a sweep sets itself. Leave it out.")
    points = make_points(fixed, read_grid(args.grid, args.assignments))
    from sempa_st.train.ranking import results_table
    from sempa_st.train.sweep import BEST, run_sweep

    results = run_sweep(points, args.output, keep_models=args.keep_models, retry_failed=args.retry_failed)
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
        return
    print(results_table(results))
    best = Path(args.output) / BEST
    print(f'The best model is in {best}. Load it with sempa_st.load("{best}") or SentenceTransformer("{best}").')
