"""The command line ``sempa``: parser and thin commands; what is heavy is imported inside the commands."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sempa_st import __version__
from sempa_st.bases import EMBEDDED_BASE
from sempa_st.config import TrainConfig
from sempa_st.console import table
from sempa_st.copy_cli import add_average_options, add_copy_options, average_command, copy_command
from sempa_st.devices import DTYPES
from sempa_st.errors import SempaError
from sempa_st.generation_cli import add_generation_options, generation_command
from sempa_st.options import add_options, read_options
from sempa_st.prompts import EMBEDDING_TEMPLATES
from sempa_st.sweep_cli import add_sweep_options, sweep_command
from sempa_st.table_cli import add_table_options, table_command

_EXIT_UNFORESEEN = 1
_EXIT_BAD_INPUT = 2
_EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return 0, 2 for bad input (one paragraph on standard error), 130 for Ctrl-C, or 1."""
    args = build_parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            _calm_libraries(args.debug)
            command: Callable[[argparse.Namespace], None] = args.command
            command(args)
    except (Exception, KeyboardInterrupt) as error:
        if args.debug:
            raise
        return _report(error)
    return 0


def _report(error: BaseException) -> int:
    """Print one paragraph on an error, from one process only, and return the exit code."""
    if isinstance(error, SempaError | OSError):
        message, code = str(error), _EXIT_BAD_INPUT
    elif isinstance(error, KeyboardInterrupt):
        message, code = "interrupted", _EXIT_INTERRUPTED
    else:
        message = f"{type(error).__name__}: {error} (not an error we foresaw; --debug shows where it comes from)"
        code = _EXIT_UNFORESEEN
    if os.environ.get("RANK", "0") == "0":
        print(f"sempa: {' '.join(message.split())}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(prog="sempa", description="Sentence embeddings from an LLM that keeps generating.")
    parser.add_argument("--version", action="version", version=f"sempa-st {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for add in (
        _add_train,
        _add_sweep,
        _add_encode,
        _add_evaluate,
        _add_table,
        _add_generation,
        _add_copy,
        _add_average,
        _add_demo,
    ):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], None], help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(command=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and libraries' warnings")
    return parser


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", _train, "Train an adapter by preference optimisation on NLI data.")
    add_options(parser, TrainConfig)


def _add_sweep(commands: Any) -> None:
    add_sweep_options(_command(commands, "sweep", sweep_command, "Train a grid of settings and keep the best model."))


def _add_encode(commands: Any) -> None:
    parser = _command(commands, "encode", _encode, "Embed the sentences of a file.")
    _add_model(parser)
    parser.add_argument("input", help="txt (a sentence a line), csv, jsonl, json or parquet file")
    parser.add_argument("--output", required=True, help="npy or parquet file to write")
    parser.add_argument("--column", help="column with the sentences, where there are several")
    parser.add_argument("--skip-bad-rows", action="store_true", help="leave out and count empty sentences")


def _add_evaluate(commands: Any) -> None:
    parser = _command(commands, "evaluate", _evaluate, "Score a model on STS tasks, with MTEB's own task classes.")
    _add_model(parser)
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


def _add_table(commands: Any) -> None:
    parser = _command(commands, "table", table_command, "Score methods and models on the seven STS sets, side by side.")
    add_table_options(parser)
    _add_batch_size(parser)


def _add_generation(commands: Any) -> None:
    parser = _command(
        commands, "generation", generation_command, "Measure how well models still generate, by lm-evaluation-harness."
    )
    add_generation_options(parser)
    parser.add_argument("--batch-size", type=_positive, default=32, help="prompts a batch (default: 32)")


def _add_copy(commands: Any) -> None:
    parser = _command(
        commands,
        "copy",
        copy_command,
        "Copy a model to work here: after a move, in the other format, or merged.",
    )
    add_copy_options(parser)


def _add_average(commands: Any) -> None:
    parser = _command(
        commands, "average", average_command, "Make one model of several: the mean of their adapters' updates."
    )
    add_average_options(parser)


def _add_demo(commands: Any) -> None:
    parser = _command(commands, "demo", _demo, "Train a small adapter on the shipped sample and look at what it does.")
    parser.add_argument("--output", default="runs/demo", help="folder to write the model to (default: runs/demo)")


def _add_model(parser: argparse.ArgumentParser) -> None:
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
    _add_batch_size(parser)


def _add_batch_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size",
        type=_positive,
        default=32,
        help="sentences a batch; more of short ones, where rows are run in packs (default: 32)",
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number above 0")
    return value


def _train(args: argparse.Namespace) -> None:
    config = read_options(TrainConfig, vars(args))
    from sempa_st.train.record import run_table
    from sempa_st.train.run import train

    record, to_report = train(config)
    if to_report:
        print(run_table(record))
        print(f"Wrote {config.output} in {record['seconds']:.0f} s.")


def _load(args: argparse.Namespace) -> Any:
    from sempa_st.loading import load

    return load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        template=args.template,
        base=args.base,
        reader=args.reader,
        method=_method(args),
        int8=args.int8,
    )


def _method(args: argparse.Namespace) -> str | None:
    method: str | None = args.method
    if args.layer is None:
        return method
    if method is None:
        raise SempaError("--layer is for a --method, such as --method prompteol.")
    return f"{method}:layer={args.layer}"


def _encode(args: argparse.Namespace) -> None:
    from sempa_st.encoding import OUTPUT_SUFFIXES, encode_to_file, read_sentences
    from sempa_st.files import check_output_file

    check_output_file(args.output, OUTPUT_SUFFIXES)
    sentences = read_sentences(args.input, column=args.column, skip_bad_rows=args.skip_bad_rows)
    rows, width = encode_to_file(_load(args), sentences, args.output, batch_size=args.batch_size)
    skipped = f", {sentences.skipped} empty rows skipped" if sentences.skipped else ""
    print(f"Wrote {rows} vectors of width {width} to {args.output}{skipped}.")


def _evaluate(args: argparse.Namespace) -> None:
    from sempa_st.evaluate.sts import average, expand_tasks, load_tasks, score_tasks
    from sempa_st.files import check_output_file, write_json
    from sempa_st.runinfo import run_info
    from sempa_st.sources import describe_method, find_model
    from sempa_st.stsdata import data_dir_or_default

    output = Path(args.output)
    score_files = [output / "scores.json", *([Path(args.json)] if args.json else [])]
    for file in score_files:
        check_output_file(file, (".json",))
    method = describe_method(find_model(args.model, for_method=True), args.template, _method(args))
    cells = load_tasks(
        expand_tasks(args.tasks),
        split=args.split,
        protocols=[protocol.strip() for protocol in args.protocol.split(",")],
        data_dir=data_dir_or_default(args.data_dir),
    )
    scores = score_tasks(_load(args), cells, output=output, batch_size=args.batch_size)
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


def _demo(args: argparse.Namespace) -> None:
    from sempa_st.demo import run_demo

    run_demo(Path(args.output))


def _calm_libraries(debug: bool) -> None:
    """Silence the libraries' chatter for this process; our own messages and their errors stay."""
    if debug:
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
