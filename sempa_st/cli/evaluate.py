"""The command ``sempa evaluate``."""

from __future__ import annotations

import argparse
from dataclasses import asdict, astuple
from pathlib import Path
from statistics import fmean
from typing import Any

from sempa_st.cli.arguments import add_command, add_data_dir, add_model_options, given
from sempa_st.utils.options import split_list
from sempa_st.utils.tables import table


def add(commands: Any) -> None:
    """Add ``sempa evaluate``."""
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "Score a model on MTEB's tasks and benchmarks, with MTEB's own task classes.",
        examples=(
            "sempa-gemma3-270m --output results",
            "gemma3-270m --method mean --tasks STSBenchmark --split dev --output results",
            "sempa-gemma3-270m --tasks 'MTEB(eng, v2)' --output results",
        ),
        kept=lambda args: (
            f"MTEB's results of finished tasks are kept in {Path(args.output, 'mteb')}. Run the same command to go on: "
            "it takes these, and scores the seven STS tasks anew."
        ),
    )
    add_model_options(parser)
    tasks = parser.add_argument_group("tasks and results")
    tasks.add_argument(
        "--tasks",
        default="sts",
        help="comma-separated MTEB tasks of any type and benchmarks, such as 'ArguAna,MTEB(eng, v2)', sts for the "
        "paper's seven, SentEval's transfer tasks such as SICK-E, or transfer for all of these in --data-dir "
        "(default: sts)",
    )
    tasks.add_argument(
        "--split", default="test", choices=("test", "dev"), help="dev is for the paper's seven (default: test)"
    )
    tasks.add_argument(
        "--protocol",
        default="mteb",
        help="mteb, senteval, or both, comma-separated; they differ in SICK-R: all rows, or its test rows only "
        "(default: mteb)",
    )
    add_data_dir(tasks, "sts/*.parquet and transfer/*.parquet")
    tasks.add_argument("--output", required=True, help="folder for MTEB's result files")
    tasks.add_argument("--json", metavar="FILE", help="JSON file to write the scores to as well")


def _evaluate(args: argparse.Namespace) -> None:
    from sempa_st.evaluation.sts import score_tasks
    from sempa_st.folder.resolve import describe_method, find_model
    from sempa_st.utils.files import check_output_file, lock_beside, locked, write_json
    from sempa_st.utils.portable import portable_name
    from sempa_st.utils.run_info import run_info

    score_files = [Path(args.output, "scores.json"), *([Path(args.json)] if args.json else [])]
    for file in score_files:
        check_output_file(file, (".json",))
    options = given(args)
    method = describe_method(find_model(args.model, for_method=True), args.template, options["method"])
    protocols = split_list(options.pop("protocol"))
    del options["json"]
    # MTEB reads its files and writes them whole: of two at once, the later one would lose the other's lines.
    running = f"Another evaluation writes to {args.output}. Wait for it, or choose another --output."
    with locked(lock_beside(Path(args.output).resolve()), running, "evaluations"):
        scores, others = score_tasks(protocols=protocols, **options)
    rows: list[list[object]] = [list(asdict(score).values()) for score in scores]
    for protocol in dict.fromkeys(score.protocol for score in scores):
        same = [score for score in scores if score.protocol == protocol]
        if len(same) > 1:
            average = fmean(score.spearman for score in same)
            rows.append(["average", args.split, protocol, sum(score.pairs for score in same), average])
    if rows:
        print(table(["task", "split", "protocol", "pairs", "Spearman x 100"], rows))
    if others:
        print(table(["task", "type", "split", "metric", "score x 100"], [list(astuple(each)[:5]) for each in others]))
    result = {"model": portable_name(args.model), "method": method, "results": [asdict(score) for score in scores]}
    if others:
        result["tasks"] = [asdict(score) for score in others]
    run = {"dtype": args.dtype, "int8": args.int8, "reader": args.reader, **run_info()}
    for file in score_files:
        write_json(file, {**result, "run": run})
