"""``sempa evaluate``: score a model on STS tasks."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sempa_st.cli.arguments import add_command, add_model_options, load_model, method_of
from sempa_st.utils.tables import table


def add_evaluate(commands: Any) -> None:
    """Add ``sempa evaluate``."""
    parser = add_command(commands, "evaluate", _evaluate, "Score a model on STS tasks, with MTEB's own task classes.")
    add_model_options(parser)
    parser.add_argument("--tasks", default="sts", help="comma-separated MTEB tasks, or sts for the paper's seven")
    parser.add_argument("--split", default="test", choices=("test", "dev"), help="default: test")
    parser.add_argument(
        "--protocol",
        default="mteb",
        help="mteb, senteval, or both with a comma; they differ in SICK-R (all rows, or the test rows; default: mteb)",
    )
    parser.add_argument("--data-dir", help="folder with sts/*.parquet, instead of the Hub (or set SEMPA_DATA_DIR)")
    parser.add_argument("--output", required=True, help="folder for MTEB's result files")
    parser.add_argument("--json", metavar="FILE", help="also write the scores to this file")


def _evaluate(args: argparse.Namespace) -> None:
    from sempa_st.data.sts import data_dir_or_default
    from sempa_st.evaluation.sts import average, expand_tasks, load_tasks, score_tasks
    from sempa_st.folder.resolve import describe_method, find_model
    from sempa_st.utils.files import check_output_file, write_json
    from sempa_st.utils.run_info import run_info

    output = Path(args.output)
    score_files = [output / "scores.json", *([Path(args.json)] if args.json else [])]
    for file in score_files:
        check_output_file(file, (".json",))
    method = describe_method(find_model(args.model, for_method=True), args.template, method_of(args))
    cells = load_tasks(
        expand_tasks(args.tasks),
        split=args.split,
        protocols=[protocol.strip() for protocol in args.protocol.split(",")],
        data_dir=data_dir_or_default(args.data_dir),
    )
    scores = score_tasks(load_model(args), cells, output=output, batch_size=args.batch_size)
    rows: list[list[object]] = [list(asdict(score).values()) for score in scores]
    for protocol in dict.fromkeys(score.protocol for score in scores):
        same = [score for score in scores if score.protocol == protocol]
        if len(same) > 1:
            rows.append(["average", args.split, protocol, sum(score.pairs for score in same), average(same)])
    print(table(["task", "split", "protocol", "pairs", "Spearman x 100"], rows))
    result = {"model": args.model, "method": method, "results": [asdict(score) for score in scores]}
    run = {"dtype": args.dtype, "int8": args.int8, "reader": args.reader, **run_info()}
    for file in score_files:
        write_json(file, {**result, "run": run})
