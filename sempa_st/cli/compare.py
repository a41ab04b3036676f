"""The command ``sempa compare``."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sempa_st.cli.arguments import add_batch_size, add_command, add_compute_options, given, positive
from sempa_st.utils.tables import table


def add(commands: Any) -> None:
    """Add ``sempa compare``."""
    parser = add_command(
        commands,
        "compare",
        _compare,
        "Say whether one model is better than another on STS beyond chance, by a paired bootstrap.",
        examples=(
            "gemma3-270m sempa-gemma3-270m",
            "runs/a runs/b --tasks STSBenchmark --split dev --data-dir data --json",
        ),
    )
    parser.add_argument(
        "first", metavar="A", help="model: shipped, SemPA folder or Hub id, base, any SentenceTransformer"
    )
    parser.add_argument("second", metavar="B", help="model to compare with it")
    sets = parser.add_argument_group("sets and resamples")
    sets.add_argument(
        "--data-dir",
        help="folder with sts/*.parquet (default: $SEMPA_DATA_DIR, or else the graded pairs shipped with this package)",
    )
    sets.add_argument("--tasks", help="comma-separated, such as STSBenchmark,SICK-R (default: all that the folder has)")
    sets.add_argument("--split", default="test", choices=("test", "dev"), help="default: test")
    sets.add_argument("--resamples", type=positive, default=10_000, help="default: %(default)s")
    sets.add_argument("--seed", type=int, default=0, help="seed of the resamples (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_batch_size(add_compute_options(parser))


def _compare(args: argparse.Namespace) -> None:
    from sempa_st.evaluation.significance import compare
    from sempa_st.folder.resolve import find_model
    from sempa_st.utils.portable import portable_name
    from sempa_st.utils.run_info import run_info

    for model in (args.first, args.second):
        find_model(model)
    options = given(args)
    del options["json"]
    results = compare(options.pop("first"), options.pop("second"), **options)
    if args.json:
        chosen = {name: getattr(args, name) for name in ("first", "second", "split", "resamples", "seed", "dtype")}
        chosen |= {name: portable_name(chosen[name]) for name in ("first", "second")}
        report = {**chosen, "results": [asdict(result) for result in results], "run": run_info()}
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    rows = [
        [r.task, r.pairs, r.first, r.second, r.difference, f"{r.low:.2f} to {r.high:.2f}", f"{r.p_value:.4f}"]
        for r in results
    ]
    header = ["set", "pairs", Path(args.first).name, Path(args.second).name, "difference", "95% interval", "p"]
    print(table(header, rows))
    print(f"Spearman x 100; paired bootstrap over the pairs, {args.resamples:,} resamples, seed {args.seed}.")
